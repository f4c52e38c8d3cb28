//! What the published folders say, for weights that come without one, and how their weights are recognised.

use crate::weights::WeightFiles;

/// The list of components of Stable Diffusion 1.5.
pub(super) const INDEX: &str = r#"{
  "_class_name": "StableDiffusionPipeline",
  "feature_extractor": [null, null],
  "safety_checker": [null, null],
  "scheduler": ["diffusers", "PNDMScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}
"#;

/// Its scheduler.
pub(super) const SCHEDULER: &str = r#"{
  "_class_name": "PNDMScheduler",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": false,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "set_alpha_to_one": false,
  "skip_prk_steps": true,
  "steps_offset": 1,
  "trained_betas": null
}
"#;

/// The list of components of SDXL 1.0.
pub(super) const XL_INDEX: &str = r#"{
  "_class_name": "StableDiffusionXLPipeline",
  "force_zeros_for_empty_prompt": true,
  "scheduler": ["diffusers", "EulerDiscreteScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "tokenizer_2": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}
"#;

/// Its scheduler.
pub(super) const XL_SCHEDULER: &str = r#"{
  "_class_name": "EulerDiscreteScheduler",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "interpolation_type": "linear",
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "sample_max_value": 1.0,
  "set_alpha_to_one": false,
  "skip_prk_steps": true,
  "steps_offset": 1,
  "timestep_spacing": "leading",
  "trained_betas": null,
  "use_karras_sigmas": false
}
"#;

/// The component that weight files hold, by the keys only it has; `None` for other weights and those of the other family.
pub(super) fn component_of(files: &WeightFiles, xl: bool) -> Option<&'static str> {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    if all(&["conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.time_emb_proj.weight"])
    {
        return (files.contains("add_embedding.linear_1.weight") == xl).then_some("unet");
    }
    let any = |end: &str| files.keys().any(|key| key.ends_with(end));
    if any("embeddings.token_embedding.weight") && any("layers.0.self_attn.out_proj.weight") {
        return match (xl, files.contains("text_projection.weight")) {
            (_, false) => Some("text_encoder"),
            (true, true) => Some("text_encoder_2"),
            (false, true) => None,
        };
    }
    let is_kl = all(&["encoder.conv_in.weight", "decoder.conv_norm_out.weight", "quant_conv.weight"]);
    is_kl.then_some("vae")
}
