//! Data sets that `generate` made, and training runs.

use std::path::Path;

use anyhow::{Context, Result};
use fewstep_data::metadata::Metadata;
use fewstep_data::provenance::Provenance;
use fewstep_train::Recipe;
use serde_json::{Value, json};

/// A data set: a generation that is not finished has no rows yet.
pub(super) fn data_set(path: &Path) -> Result<Value> {
    let metadata = path.join("metadata.csv");
    let rows = metadata.exists().then(|| Metadata::read(&metadata)).transpose()?;
    Ok(json!({
        "kind": "data set",
        "rows": rows.map(|metadata| metadata.rows.len()),
        "images": names(&path.join("images"), ".png").len(),
        "videos": names(&path.join("videos"), ".webp").len(),
        "latents": names(&path.join("latents"), ".safetensors").len(),
        "provenance": Provenance::read(path)?,
    }))
}

/// A run: its recipe, how far it is, and what it wrote.
pub(super) fn run(path: &Path) -> Result<Value> {
    let recipe = Recipe::read(&path.join("run.toml"))?;
    let log = path.join("loss.csv");
    let lines = match log.exists() {
        true => std::fs::read_to_string(&log).with_context(|| log.display().to_string())?,
        false => String::new(),
    };
    let rows: Vec<(u64, f64)> = lines.lines().skip(1).filter_map(step_and_loss).collect();
    Ok(json!({
        "kind": "run",
        "task": recipe.task.name(),
        "model": model(&recipe),
        "step": rows.last().map(|(step, _)| step),
        "first_loss": rows.first().map(|(_, loss)| loss),
        "last_loss": rows.last().map(|(_, loss)| loss),
        "checkpoints": names(&path.join("checkpoints"), ""),
        "results": results(path),
        "recipe": recipe,
    }))
}

/// What a recipe says of its model: weight files, or a folder.
fn model(recipe: &Recipe) -> String {
    let files = [&recipe.model_paths, &recipe.model_id_with_origin_paths].into_iter().flatten();
    let files: Vec<&str> = files.map(String::as_str).collect();
    if files.is_empty() { recipe.model.display().to_string() } else { files.join(", ") }
}

/// Weight files and the model folder of a run.
fn results(path: &Path) -> Vec<String> {
    let mut results = names(path, ".safetensors");
    results.extend(path.join("model").exists().then(|| "model".to_owned()));
    results
}

/// The first and the third column of the loss log.
fn step_and_loss(line: &str) -> Option<(u64, f64)> {
    let mut columns = line.split(',');
    Some((columns.next()?.parse().ok()?, columns.nth(1)?.parse().ok()?))
}

/// Names in a folder that end so and are not hidden, sorted; none where there is no folder.
fn names(folder: &Path, end: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.retain(|name| name.ends_with(end) && !name.starts_with('.'));
    names.sort();
    names
}
