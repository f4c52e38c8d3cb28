//! What the published models' folders say, and how their weights are recognised.

use serde_json::Value;

use super::{DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3};
use crate::config_file::{ConfigFile, read_json};
use crate::family::AUTOENCODER;
use crate::parts::autoencoder_kl::is_without_quantiser;
use crate::parts::t5;
use crate::weights::WeightFiles;
use crate::{ModelError, ModelSource};

/// The published scheduler.
pub(super) const SCHEDULER: &str = r#"{
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "num_train_timesteps": 1000,
  "shift": 3.0
}
"#;

/// The published list of components.
pub(super) const MODEL_INDEX: &str = r#"{
  "_class_name": "StableDiffusion3Pipeline",
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "text_encoder_3": ["transformers", "T5EncoderModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "tokenizer_2": ["transformers", "CLIPTokenizer"],
  "tokenizer_3": ["transformers", "T5TokenizerFast"],
  "transformer": ["diffusers", "SD3Transformer2DModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}
"#;

/// Whether the model has its third text encoder: its list of components names none where it was saved without.
///
/// # Errors
/// If the list is damaged, or names none of the others.
pub(super) fn has_t5(source: &ModelSource) -> Result<bool, ModelError> {
    let file = ConfigFile::shared(source, "model_index.json", MODEL_INDEX)?;
    let is_absent = |component: &&str| file.json[*component].get(1).is_none_or(Value::is_null);
    match [TEXT_ENCODER, TEXT_ENCODER_2, DENOISER, AUTOENCODER].iter().find(|name| is_absent(name)) {
        None => Ok(!is_absent(&TEXT_ENCODER_3)),
        Some(component) => Err(file.error(format!(
            "{component} is null, expected its class: {TEXT_ENCODER_3} alone may be left out"
        ))),
    }
}

/// The component that weight files hold, by the keys only it has; `None` for other weights.
pub(super) fn component_of(files: &WeightFiles) -> Option<&'static str> {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    if all(&[
        "pos_embed.proj.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ]) {
        return Some(DENOISER);
    }
    if t5::is_of(files) {
        return Some(TEXT_ENCODER_3);
    }
    if files.contains("text_projection.weight") {
        return clip_of(files);
    }
    is_without_quantiser(files).then_some(AUTOENCODER)
}

/// Which of the two CLIPs: they have the same keys. The config beside the weights names the activation, OpenAI's own or
/// OpenCLIP's; without one, only the larger is wider than 1024.
fn clip_of(files: &WeightFiles) -> Option<&'static str> {
    let end = "embeddings.position_embedding.weight";
    let positions = files.keys().find(|key| key.ends_with(end))?;
    let width = *files.shape(positions).ok()?.get(1)?;
    let beside = files.files().first().and_then(|path| Some(path.parent()?.join("config.json")));
    let config = beside.filter(|path| path.is_file()).and_then(|path| read_json::<Value>(&path).ok());
    let is_larger = match config.as_ref().and_then(|config| config["hidden_act"].as_str()) {
        Some(activation) => activation == "gelu",
        None => width > 1024,
    };
    Some(if is_larger { TEXT_ENCODER_2 } else { TEXT_ENCODER })
}
