//! What the published models' folders say, for weights that come without them, and how their weights are recognised.

use crate::parts::autoencoder_kl::is_without_quantiser;
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
        return Some(super::DENOISER);
    }
    // Positions in a second layer are UMT5's.
    let positions = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight";
    if all(&["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"])
        && !files.contains(positions)
    {
        return Some(super::TEXT_ENCODER_2);
    }
    // With a projection it is a larger CLIP, which this family does not have.
    if ends("embeddings.position_embedding.weight") && !files.contains("text_projection.weight") {
        return Some(super::TEXT_ENCODER);
    }
    is_without_quantiser(files).then_some(crate::AUTOENCODER)
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
        assert!(super::super::Kind.tokenizers().iter().all(|name| index[*name].is_array()));
    }
}
