//! The small models of [`crate::write_trial_model`].

use serde_json::{Value, json};

use super::kind::DENOISER;
use crate::family::AUTOENCODER;
use crate::trial::{Trial, Words, autoencoder_kl, clip};

pub(super) fn trial(xl: bool) -> Trial {
    let mut configs =
        vec![("text_encoder", clip("CLIPTextModel", "quick_gelu")), (AUTOENCODER, autoencoder_kl(4, true))];
    let mut tokenizers = vec![("tokenizer", Words::Clip)];
    if xl {
        configs.push(("text_encoder_2", clip("CLIPTextModelWithProjection", "gelu")));
        tokenizers.push(("tokenizer_2", Words::Clip));
    }
    configs.push((DENOISER, if xl { unet_xl() } else { unet() }));
    Trial { configs, tokenizers }
}

fn unet() -> Value {
    json!({
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4, "out_channels": 4, "block_out_channels": [64, 128, 128], "layers_per_block": 1,
        "cross_attention_dim": 128, "attention_head_dim": 2, "use_linear_projection": false,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    })
}

/// Told the pooled state of 128 numbers and six sizes of 32.
fn unet_xl() -> Value {
    json!({
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4, "out_channels": 4, "block_out_channels": [64, 128, 128], "layers_per_block": 1,
        "cross_attention_dim": 256, "attention_head_dim": [1, 2, 2], "use_linear_projection": true,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 128 + 6 * 32,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    })
}
