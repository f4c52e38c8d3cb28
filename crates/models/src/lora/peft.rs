//! The alpha in the metadata of files that diffusers writes.
//!
//! Under `lora_adapter_metadata` stands PEFT's `LoraConfig` as JSON: `save_lora_weights` puts the component's name and
//! a dot before each field, `save_lora_adapter` does not (diffusers 0.42, `loaders/lora_base.py` and `peft.py`).

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::matches;
use crate::ModelError;

/// The metadata entry.
pub(super) const ENTRY: &str = "lora_adapter_metadata";

/// The fields that change numbers.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PeftConfig {
    lora_alpha: Option<f32>,
    /// Layer, or its end → alpha.
    alpha_pattern: Option<BTreeMap<String, f32>>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
}

impl PeftConfig {
    /// Reads a file's entry; a file without one gives the default.
    pub(super) fn read(path: &Path, info: &BTreeMap<String, String>) -> Result<Self, ModelError> {
        let Some(text) = info.get(ENTRY) else { return Ok(Self::default()) };
        let config = |reason: String| ModelError::Config {
            path: path.to_owned(),
            reason: format!("metadata {ENTRY}: {reason}"),
        };
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|error| config(error.to_string()))?;
        let own = |(name, value): (String, serde_json::Value)| {
            let name = name.strip_prefix("transformer.").unwrap_or(&name);
            (!name.contains('.')).then(|| (name.to_owned(), value))
        };
        let fields = serde_json::Value::Object(fields.into_iter().filter_map(own).collect());
        let parsed: Self = serde_json::from_value(fields).map_err(|error| config(error.to_string()))?;
        match parsed.use_dora {
            Some(true) => Err(config("use_dora is true, expected false: DoRA is not supported".into())),
            _ => Ok(parsed),
        }
    }

    /// What the update of a layer is multiplied by.
    pub(super) fn scale(&self, layer: &str, rank: usize) -> f32 {
        let mut patterns = self.alpha_pattern.iter().flatten();
        let own = patterns.find(|(pattern, _)| matches(layer, pattern)).map(|(_, alpha)| *alpha);
        let Some(alpha) = own.or(self.lora_alpha) else { return 1.0 };
        match self.use_rslora {
            Some(true) => alpha / (rank as f32).sqrt(),
            _ => alpha / rank as f32,
        }
    }

    /// Checks that every pattern names a layer: PEFT allows regular expressions, which are not understood here.
    pub(super) fn check_patterns<'a>(
        &self,
        path: &Path,
        layers: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), ModelError> {
        let unmatched = |pattern: &&String| !layers.clone().any(|layer| matches(layer, pattern));
        match self.alpha_pattern.iter().flat_map(BTreeMap::keys).find(unmatched) {
            None => Ok(()),
            Some(pattern) => {
                let reason =
                    format!("metadata {ENTRY}: alpha_pattern {pattern:?}, expected the name of a layer");
                Err(ModelError::Config { path: path.to_owned(), reason })
            }
        }
    }
}
