//! A model small enough to train inside a test: the bundled teacher's folder with smaller configs.

#![allow(clippy::unwrap_used)] // For tests only: a failure ends the test.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::copy_folder;

/// Writes configs and tokenizer of a two-block, 32-wide model into `folder`. Weights are left to the test.
///
/// # Panics
/// If the bundled teacher's configs cannot be read or `folder` cannot be written.
pub fn write_tiny_configs(folder: &Path) {
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher");
    copy_folder(&teacher, folder, &|path| path.extension().is_none_or(|kind| kind != "safetensors"));
    let transformer = json!({
        "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "joint_attention_dim": 32,
        "num_attention_heads": 2, "num_layers": 2,
    });
    let text_encoder = json!({
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 1, "rope_scaling": { "mrope_section": [2, 3, 3], "rope_type": "default" },
    });
    for (part, changes) in [("transformer", transformer), ("text_encoder", text_encoder)] {
        write_changed(&teacher.join(part).join("config.json"), &folder.join(part), &changes);
    }
}

/// Writes a config with some of its values changed.
fn write_changed(config: &Path, folder: &Path, changes: &Value) {
    let mut values: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    values.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fs::write(folder.join("config.json"), values.to_string()).unwrap();
}
