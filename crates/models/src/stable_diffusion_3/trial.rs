//! The small model of [`crate::write_trial_model`].

use serde_json::json;

use crate::family::AUTOENCODER;
use crate::trial::{Trial, Words, autoencoder_kl, clip, t5};

/// With the norms and the second attention of 3.5.
pub(super) fn trial() -> Trial {
    let transformer = json!({
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 256,
        "caption_projection_dim": 256, "pooled_projection_dim": 256, "pos_embed_max_size": 32,
        "dual_attention_layers": [0], "qk_norm": "rms_norm",
    });
    let class = "CLIPTextModelWithProjection";
    Trial {
        configs: vec![
            (super::TEXT_ENCODER, clip(class, "quick_gelu")),
            (super::TEXT_ENCODER_2, clip(class, "gelu")),
            (super::TEXT_ENCODER_3, t5("T5EncoderModel", 256)),
            (super::DENOISER, transformer),
            (AUTOENCODER, autoencoder_kl(16, false)),
        ],
        tokenizers: super::TOKENIZERS.into_iter().zip([Words::Clip, Words::Clip, Words::T5]).collect(),
    }
}
