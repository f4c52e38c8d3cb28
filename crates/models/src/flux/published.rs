//! What the published models' folders say, for weights that come without them, and how their weights are recognised.

use serde_json::{Value, json};

use super::{DENOISER, TEXT_ENCODER, TEXT_ENCODER_2};
use crate::family::AUTOENCODER;
use crate::parts::autoencoder_kl::is_without_quantiser;
use crate::parts::t5;
use crate::weights::WeightFiles;

/// FLUX.1-dev's scheduler: μ from 0.5 at 256 to 1.15 at 4096 image tokens.
pub(super) const SCHEDULER: &str = r#"{
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "base_image_seq_len": 256,
  "base_shift": 0.5,
  "max_image_seq_len": 4096,
  "max_shift": 1.15,
  "num_train_timesteps": 1000,
  "shift": 3.0,
  "use_dynamic_shifting": true
}
"#;

/// The published list of components.
pub(super) const MODEL_INDEX: &str = r#"{
  "_class_name": "FluxPipeline",
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "text_encoder_2": ["transformers", "T5EncoderModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "tokenizer_2": ["transformers", "T5TokenizerFast"],
  "transformer": ["diffusers", "FluxTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}
"#;

/// The component that weight files hold, by the keys only it has; `None` for other weights.
pub(super) fn component_of(files: &WeightFiles) -> Option<&'static str> {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    let ends = |end: &str| files.keys().any(|key| key.ends_with(end));
    if all(&["x_embedder.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"])
    {
        return Some(DENOISER);
    }
    if t5::is_of(files) {
        return Some(TEXT_ENCODER_2);
    }
    // With a projection it is a larger CLIP, which this family does not have.
    if ends("embeddings.position_embedding.weight") && !files.contains("text_projection.weight") {
        return Some(TEXT_ENCODER);
    }
    is_without_quantiser(files).then_some(AUTOENCODER)
}

/// The published config of a component, for weights that came without one, as DiffSynth-Studio's scripts name them. A
/// transformer may have any number of blocks of the published width. `None` for other weights.
pub(super) fn config_of(component: &str, files: &WeightFiles) -> Option<Value> {
    let has = |key: &str, shape: &[usize]| files.shape(key).is_ok_and(|found| found == shape);
    match component {
        DENOISER if has("transformer_blocks.0.attn.norm_q.weight", &[128]) => {
            let layers = |blocks: &str| {
                let number = |key: &str| key.strip_prefix(blocks)?.split('.').next()?.parse::<usize>().ok();
                files.keys().filter_map(number).max().map_or(0, |last| last + 1)
            };
            let [width, joint] = *files.shape("context_embedder.weight").ok()? else { return None };
            let [_, pooled] = *files.shape("time_text_embed.text_embedder.linear_1.weight").ok()? else {
                return None;
            };
            Some(json!({
                "_class_name": "FluxTransformer2DModel",
                "num_attention_heads": width / 128,
                "attention_head_dim": 128,
                "axes_dims_rope": [16, 56, 56],
                "num_layers": layers("transformer_blocks."),
                "num_single_layers": layers("single_transformer_blocks."),
                "in_channels": files.shape("x_embedder.weight").ok()?.get(1)?,
                "joint_attention_dim": joint,
                "pooled_projection_dim": pooled,
                "guidance_embeds": files.contains("time_text_embed.guidance_embedder.linear_1.weight"),
            }))
        }
        TEXT_ENCODER if has("text_model.embeddings.token_embedding.weight", &[49_408, 768]) => Some(json!({
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": 49_408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 2,
        })),
        TEXT_ENCODER_2 if has("encoder.block.23.layer.1.DenseReluDense.wi_0.weight", &[10_240, 4096]) => {
            Some(json!({
                "architectures": ["T5EncoderModel"],
                "model_type": "t5",
                "vocab_size": 32_128,
                "d_model": 4096,
                "d_ff": 10_240,
                "d_kv": 64,
                "num_heads": 64,
                "num_layers": 24,
                "feed_forward_proj": "gated-gelu",
            }))
        }
        AUTOENCODER if has("encoder.conv_out.weight", &[32, 512, 3, 3]) => Some(json!({
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": vec!["DownEncoderBlock2D"; 4],
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
            "layers_per_block": 2,
            "latent_channels": 16,
            "norm_num_groups": 32,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": false,
            "use_post_quant_conv": false,
            "mid_block_add_attention": true,
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::config::TransformerConfig;
    use super::*;
    use crate::family::Kind as _;
    use crate::{ModelSource, WeightType, save_tensors};
    use fewstep_testkit::golden;
    use tempfile::TempDir;

    type Shapes<'a> = [(&'a str, &'a [usize])];

    /// A file of zeros in a folder of its own.
    fn weights(tensors: &Shapes<'_>) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let zeros = tensors
            .iter()
            .map(|(key, shape)| ((*key).to_owned(), shape.to_vec(), vec![0.0; shape.iter().product()]));
        save_tensors(&path, zeros, WeightType::BF16, &Default::default()).unwrap();
        (folder, path)
    }

    fn config(component: &str, tensors: &Shapes<'_>) -> Option<Value> {
        let (_folder, path) = weights(tensors);
        config_of(component, &WeightFiles::open(&path).unwrap())
    }

    #[test]
    fn a_transformer_without_a_config_has_as_many_blocks_as_its_weights() {
        let tensors: [(&str, &[usize]); 6] = [
            ("transformer_blocks.0.attn.norm_q.weight", &[128]),
            ("transformer_blocks.4.attn.norm_q.weight", &[128]),
            ("single_transformer_blocks.10.norm.linear.bias", &[3]),
            ("context_embedder.weight", &[256, 48]),
            ("time_text_embed.text_embedder.linear_1.weight", &[256, 40]),
            ("x_embedder.weight", &[256, 64]),
        ];
        let found = config(DENOISER, &tensors).unwrap();
        let expected = [
            ("num_attention_heads", 2),
            ("num_layers", 5),
            ("num_single_layers", 11),
            ("in_channels", 64),
            ("joint_attention_dim", 48),
            ("pooled_projection_dim", 40),
        ];
        assert!(expected.iter().all(|(key, value)| found[key] == *value), "{found}");
        assert_eq!(found["guidance_embeds"], false);
        let narrow = [("transformer_blocks.0.attn.norm_q.weight", &[64][..])];
        assert_eq!(config(DENOISER, &narrow), None);
    }

    #[test]
    fn a_lone_file_in_the_authors_layout_is_loaded_by_its_published_config() {
        let tensors: [(&str, &[usize]); 6] = [
            ("double_blocks.0.img_attn.qkv.weight", &[384, 128]),
            ("double_blocks.0.img_attn.norm.query_norm.scale", &[128]),
            ("single_blocks.1.modulation.lin.bias", &[384]),
            ("txt_in.weight", &[128, 48]),
            ("vector_in.in_layer.weight", &[128, 40]),
            ("img_in.weight", &[128, 64]),
        ];
        let (_folder, path) = weights(&tensors);
        let source = ModelSource::from_files(&[vec![path]]).unwrap();
        let found = TransformerConfig::read(&source).unwrap();
        assert_eq!((found.num_layers, found.num_single_layers), (1, 2));
        assert_eq!((found.num_attention_heads, found.joint_attention_dim), (1, 48));
    }

    #[test]
    fn an_autoencoder_without_a_config_is_scaled_as_the_published_one() {
        let found = config(AUTOENCODER, &[("encoder.conv_out.weight", &[32, 512, 3, 3])]).unwrap();
        let text = std::fs::read_to_string(golden("flux/model/vae/config.json")).unwrap();
        let folder: Value = serde_json::from_str(&text).unwrap();
        let of_small = ["block_out_channels", "norm_num_groups"];
        let keys = found.as_object().unwrap().keys().filter(|key| !of_small.contains(&key.as_str()));
        for key in keys {
            assert_eq!(found[key], folder[key], "{key}");
        }
    }

    #[test]
    fn the_list_of_components_is_of_this_family() {
        let index: serde_json::Value = serde_json::from_str(MODEL_INDEX).unwrap();
        assert_eq!(index["_class_name"], super::super::Kind.pipeline_class());
        assert!(super::super::Kind.components().iter().all(|name| index[*name].is_array()));
        assert!(super::super::Kind.tokenizers().iter().all(|name| index[*name].is_array()));
    }
}
