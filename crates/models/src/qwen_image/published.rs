//! What the published model's folder says, for weights that come without one, and how its weights are recognised.

use serde_json::{Value, json};

use crate::parts::video_autoencoder;
use crate::weights::WeightFiles;

/// The published scheduler: μ from 0.5 at 256 to 0.9 at 8192 image tokens, the last sigma stretched to 0.02.
pub(super) const SCHEDULER: &str = r#"{
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "base_image_seq_len": 256,
  "base_shift": 0.5,
  "invert_sigmas": false,
  "max_image_seq_len": 8192,
  "max_shift": 0.9,
  "num_train_timesteps": 1000,
  "shift": 1.0,
  "shift_terminal": 0.02,
  "stochastic_sampling": false,
  "time_shift_type": "exponential",
  "use_beta_sigmas": false,
  "use_dynamic_shifting": true,
  "use_exponential_sigmas": false,
  "use_karras_sigmas": false
}
"#;

/// The published list of components.
pub(super) const MODEL_INDEX: &str = r#"{
  "_class_name": "QwenImagePipeline",
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
  "tokenizer": ["transformers", "Qwen2Tokenizer"],
  "transformer": ["diffusers", "QwenImageTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderKLQwenImage"]
}
"#;

/// What `transformer/config.json` means where it leaves a key out: diffusers' defaults, which are the published model's.
pub(super) fn transformer_defaults() -> Value {
    json!({
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
    })
}

/// The same of the text model: the defaults of transformers' `Qwen2_5_VLTextConfig`, which newer releases do not write.
pub(super) fn text_encoder_defaults() -> Value {
    json!({
        "vocab_size": 152_064,
        "hidden_size": 8192,
        "intermediate_size": 29_568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
    })
}

/// The component that weight files hold, by the keys only it has; `None` for other weights.
///
/// DiffSynth-Studio compares a hash of all keys and shapes instead, which knows published sizes alone.
pub(super) fn component_of(files: &WeightFiles) -> Option<&'static str> {
    let any = |end: &str| files.keys().any(|key| key.ends_with(end));
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    if all(&["img_in.weight", "txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"]) {
        return Some("transformer");
    }
    // Biases of the queries tell Qwen2 from Qwen3; some files put another prefix before these names.
    if any("embed_tokens.weight") && any("layers.0.self_attn.q_proj.bias") {
        return Some("text_encoder");
    }
    // Wan's has the same keys.
    video_autoencoder::is_of(files).then_some("vae")
}

/// The published config of a component, for weights of its size that came without one, as DiffSynth-Studio's scripts
/// name them; `None` for other weights.
pub(super) fn config_of(component: &str, files: &WeightFiles) -> Option<Value> {
    if !has_published_size(component, files) {
        return None;
    }
    match component {
        "transformer" => Some(json!({"_class_name": "QwenImageTransformer2DModel"})),
        "vae" => Some(json!({"_class_name": "AutoencoderKLQwenImage"})),
        "text_encoder" => Some(json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        })),
        _ => None,
    }
}

/// Whether a component's files have some tensors of the published model; all of them are compared when they are loaded.
fn has_published_size(component: &str, files: &WeightFiles) -> bool {
    let marks: &[(&str, &[usize])] = match component {
        "transformer" => &[
            ("transformer_blocks.59.attn.to_q.weight", &[3072, 3072]),
            ("transformer_blocks.0.attn.norm_q.weight", &[128]),
            ("txt_norm.weight", &[3584]),
        ],
        "text_encoder" => &[
            ("embed_tokens.weight", &[152_064, 3584]),
            ("layers.27.self_attn.k_proj.weight", &[512, 3584]),
            ("layers.27.mlp.up_proj.weight", &[18_944, 3584]),
        ],
        "vae" => {
            &[("encoder.conv_in.weight", &[96, 3, 3, 3, 3]), ("decoder.conv_in.weight", &[384, 16, 3, 3, 3])]
        }
        _ => &[],
    };
    let entries = files.entries();
    let there = |(key, shape): &(&str, &[usize])| {
        entries.iter().any(|entry| entry.key.ends_with(key) && entry.shape == *shape)
    };
    !marks.is_empty() && marks.iter().all(there)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Kind as _;
    use crate::model_folder::SCHEDULER_FILE;
    use fewstep_flow::schedule::{GridRequest, SchedulerConfig};
    use fewstep_testkit::golden;

    #[test]
    fn the_schedule_for_lone_weights_is_the_published_one() {
        let text = std::fs::read_to_string(golden("qwen_image/model").join(SCHEDULER_FILE)).unwrap();
        let grid =
            |json: &str| SchedulerConfig::from_json(json).unwrap().grid(&GridRequest::new(10, 1024)).unwrap();
        assert_eq!(grid(SCHEDULER).as_slice(), grid(&text).as_slice());
    }

    #[test]
    fn the_list_of_components_is_of_this_family() {
        let index: serde_json::Value = serde_json::from_str(MODEL_INDEX).unwrap();
        assert_eq!(index["_class_name"], super::super::Kind.pipeline_class());
        assert!(super::super::Kind.components().iter().all(|name| index[*name].is_array()));
    }
}
