//! The small model of [`crate::write_trial_model`].

use serde_json::json;

use crate::family::AUTOENCODER;
use crate::trial::{Trial, Words, autoencoder_kl, clip, t5};

/// Told a guidance scale, as FLUX.1-dev is.
pub(super) fn trial() -> Trial {
    let transformer = json!({
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": 4, "joint_attention_dim": 128, "pooled_projection_dim": 128,
        "axes_dims_rope": [16, 24, 24], "guidance_embeds": true, "patch_size": 1,
    });
    Trial {
        configs: vec![
            (super::TEXT_ENCODER, clip("CLIPTextModel", "quick_gelu")),
            (super::TEXT_ENCODER_2, t5("T5EncoderModel", 128)),
            (super::DENOISER, transformer),
            (AUTOENCODER, autoencoder_kl(16, false)),
        ],
        tokenizers: vec![(super::TOKENIZERS[0], Words::Clip), (super::TOKENIZERS[1], Words::T5)],
    }
}
