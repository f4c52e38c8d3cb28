//! What the published models' folders say, for weights that come without them, and how their weights are recognised.

use serde_json::{Value, json};

use super::{AUTOENCODER, DENOISER, TEXT_ENCODER, transformer};
use crate::parts::{t5, video_autoencoder};
use crate::weights::{KeyMap, WeightFiles};

/// The scheduler of the published models, with the shift for 480 rows.
pub(super) const SCHEDULER: &str = r#"{
  "_class_name": "UniPCMultistepScheduler",
  "final_sigmas_type": "zero",
  "flow_shift": 3.0,
  "lower_order_final": true,
  "num_train_timesteps": 1000,
  "predict_x0": true,
  "prediction_type": "flow_prediction",
  "solver_order": 2,
  "solver_type": "bh2",
  "use_flow_sigmas": true
}
"#;

/// The published list of components.
pub(super) const MODEL_INDEX: &str = r#"{
  "_class_name": "WanPipeline",
  "scheduler": ["diffusers", "UniPCMultistepScheduler"],
  "text_encoder": ["transformers", "UMT5EncoderModel"],
  "tokenizer": ["transformers", "T5TokenizerFast"],
  "transformer": ["diffusers", "WanTransformer3DModel"],
  "vae": ["diffusers", "AutoencoderKLWan"]
}
"#;

/// The component that weight files hold, by the keys only it has, in whichever spelling; `None` for other weights.
pub(super) fn component_of(files: &WeightFiles) -> Option<&'static str> {
    let all = |map: &KeyMap, keys: &[&str]| {
        keys.iter().all(|key| files.keys().any(|found| map.canonical(found) == *key))
    };
    if all(&transformer::KEYS, &["patch_embedding.weight", "blocks.0.attn2.norm_k.weight", "proj_out.weight"])
    {
        return Some(DENOISER);
    }
    // Every layer has positions of its own.
    let positions = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight";
    if all(&t5::KEYS, &[positions, "encoder.final_layer_norm.weight"]) {
        return Some(TEXT_ENCODER);
    }
    video_autoencoder::is_of(files).then_some(AUTOENCODER)
}

/// The published config of a component, for weights of its size that came without one; `None` for other weights.
pub(super) fn config_of(component: &str, files: &WeightFiles) -> Option<Value> {
    match component {
        DENOISER => transformer_of(files),
        TEXT_ENCODER => text_encoder_of(files),
        AUTOENCODER => autoencoder_of(files),
        _ => None,
    }
}

/// The size that tells the two published transformers apart; all tensors are compared when they are loaded.
fn transformer_of(files: &WeightFiles) -> Option<Value> {
    let layers = |number: usize| files.keys().any(|key| key.starts_with(&format!("blocks.{number}.")));
    let (heads, ffn_dim, num_layers) = match *files.shape("patch_embedding.weight").ok()?.first()? {
        1536 => (12, 8960, 30),
        5120 => (40, 13_824, 40),
        _ => return None,
    };
    (layers(num_layers - 1) && !layers(num_layers)).then(|| {
        json!({
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": heads,
            "ffn_dim": ffn_dim,
            "num_layers": num_layers,
        })
    })
}

/// UMT5-XXL.
fn text_encoder_of(files: &WeightFiles) -> Option<Value> {
    let shape = ["shared.weight", "token_embedding.weight"].iter().find_map(|key| files.shape(key).ok())?;
    (*shape == [256_384, 4096]).then(|| {
        json!({
            "architectures": ["UMT5EncoderModel"],
            "vocab_size": 256_384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10_240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        })
    })
}

fn autoencoder_of(files: &WeightFiles) -> Option<Value> {
    let keys = ["encoder.conv_in.weight", "encoder.conv1.weight"];
    let shape = keys.iter().find_map(|key| files.shape(key).ok())?;
    (*shape == [96, 3, 3, 3, 3]).then(|| json!({"_class_name": "AutoencoderKLWan"}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Kind as _;

    #[test]
    fn the_list_of_components_is_of_this_family() {
        let index: serde_json::Value = serde_json::from_str(MODEL_INDEX).unwrap();
        assert_eq!(index["_class_name"], super::super::Kind.pipeline_class());
        assert!(super::super::Kind.components().iter().all(|name| index[*name].is_array()));
    }
}
