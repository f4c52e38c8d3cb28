//! The small model of [`crate::write_trial_model`].

use serde_json::json;

use crate::family::AUTOENCODER;
use crate::trial::{Trial, Words};

pub(super) fn trial() -> Trial {
    let transformer = json!({
        "_class_name": "QwenImageTransformer2DModel",
        "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 128,
        "axes_dims_rope": [16, 24, 24],
    });
    let text_encoder = json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vocab_size": Words::Qwen.count(), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": { "mrope_section": [4, 6, 6] },
    });
    let vae = json!({
        "_class_name": "AutoencoderKLQwenImage", "base_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    });
    Trial {
        configs: vec![
            (super::TEXT_ENCODER, text_encoder),
            (super::DENOISER, transformer),
            (AUTOENCODER, vae),
        ],
        tokenizers: vec![("tokenizer", Words::Qwen)],
    }
}
