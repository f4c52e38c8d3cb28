//! The small model of [`crate::write_trial_model`].

use serde_json::json;

use crate::family::AUTOENCODER;
use crate::trial::{Trial, Words, autoencoder_kl};

pub(super) fn trial() -> Trial {
    let transformer = json!({
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
        "cap_feat_dim": 128, "axes_dims": [16, 24, 24],
    });
    let text_encoder = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": Words::Qwen.count(), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    });
    Trial {
        configs: vec![
            (super::TEXT_ENCODER, text_encoder),
            (super::DENOISER, transformer),
            (AUTOENCODER, autoencoder_kl(16, false)),
        ],
        tokenizers: vec![("tokenizer", Words::Qwen)],
    }
}
