//! Writes a model as a folder in the official layout.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config_file::ConfigFile;
use crate::family::Kind;
use crate::weights::{carry_ignored, collect_component, copy_tree, is_weights, write};
use crate::{Model, ModelError, ModelSource, WeightType};

/// Place of the scheduler's config in a model folder.
pub(crate) const SCHEDULER_FILE: &str = "scheduler/scheduler_config.json";

/// Writes everything but the weights that may have changed: those of the `unchanged` components are the source's.
///
/// # Errors
/// If a file cannot be read or written.
pub(crate) fn write_all_but_weights(
    kind: &dyn Kind,
    source: &ModelSource,
    folder: &Path,
    unchanged: &[&str],
) -> Result<(), ModelError> {
    match source.folder() {
        Some(source) => {
            let kept = |path: &Path| unchanged.iter().any(|name| path.parent() == Some(&source.join(name)));
            copy_tree(source, folder, &|path| !is_weights(path) || kept(path))
        }
        None => write_around_files(kind, source, folder, unchanged),
    }
}

/// The same for a model that was loaded from given files. What was not given is left out.
fn write_around_files(
    kind: &dyn Kind,
    source: &ModelSource,
    folder: &Path,
    unchanged: &[&str],
) -> Result<(), ModelError> {
    for component in kind.components() {
        let target = folder.join(component);
        let files = source.component_files(component);
        match source.config(component) {
            Ok(config) => copy(&config, &target.join("config.json"))?,
            Err(ModelError::NotBeside { .. }) if files.is_empty() => continue,
            Err(_) => {
                let config = ConfigFile::of_component(source, component)?;
                write_text(&target.join("config.json"), &config.text())?;
            }
        }
        if unchanged.contains(component) && !files.is_empty() {
            source.weights(component)?.copy_officially(&target)?;
        }
    }
    for (relative, published) in kind.published_files() {
        write_text(&folder.join(relative), &source.text_or(relative, published)?.1)?;
    }
    for name in kind.tokenizers() {
        match source.tokenizer(name) {
            Ok(tokenizer) => copy_tree(&tokenizer, &folder.join(name), &|_| true)?,
            Err(ModelError::NotBeside { .. }) => {} // a denoiser alone needs none
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes the weights of one component. What its files in `source` hold beside what the model uses is written along, so
/// that the peers can load the folder.
///
/// # Errors
/// If a file cannot be read or written.
pub(crate) fn write_component(
    model: &Model,
    source: &ModelSource,
    folder: &Path,
    component: &'static str,
    (dtype, info): (WeightType, &BTreeMap<String, String>),
) -> Result<(), ModelError> {
    let mut tensors = collect_component(model, component, dtype);
    if tensors.is_empty() {
        return Ok(()); // a component that this model does without
    }
    let keys = model.keys(component);
    match source.weights(component) {
        Ok(files) => carry_ignored(&mut tensors, &files, keys, dtype)?,
        // A model that began with fresh weights.
        Err(ModelError::NoModelFolder { .. } | ModelError::MissingComponent { .. }) => {}
        Err(error) => return Err(error),
    }
    let is_text_encoder = model.text_encoder_names().contains(&component);
    let name = if is_text_encoder { "model" } else { "diffusion_pytorch_model" };
    write(&folder.join(component).join(format!("{name}.safetensors")), &tensors, info)
}

fn copy(source: &Path, target: &Path) -> Result<(), ModelError> {
    fewstep_data::atomic::copy(source, target).map_err(ModelError::io(source))
}

fn write_text(path: &Path, text: &str) -> Result<(), ModelError> {
    fewstep_data::atomic::write(path, text.as_bytes()).map_err(ModelError::io(path))
}
