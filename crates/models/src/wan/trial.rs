//! The small model of [`crate::write_trial_model`].

use serde_json::json;

use super::{AUTOENCODER, DENOISER, TEXT_ENCODER};
use crate::trial::{Trial, Words, t5};

pub(super) fn trial() -> Trial {
    let transformer = json!({
        "_class_name": "WanTransformer3DModel",
        "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 4, "in_channels": 16, "out_channels": 16,
        "text_dim": 128, "freq_dim": 256, "ffn_dim": 512, "cross_attn_norm": true, "eps": 1e-6,
        "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    });
    let vae = json!({
        "_class_name": "AutoencoderKLWan", "base_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    });
    Trial {
        configs: vec![
            (TEXT_ENCODER, t5("UMT5EncoderModel", 128)),
            (DENOISER, transformer),
            (AUTOENCODER, vae),
        ],
        tokenizers: vec![("tokenizer", Words::T5)],
    }
}
