//! The output folder of a run: its resolved recipe, and the rule that one folder holds one run.

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_data::atomic;

use crate::TrainError;
use crate::recipe::Recipe;

/// Checks that the recipe's folder is empty, absent, or holds this very run.
///
/// # Errors
/// If it holds another run or foreign files.
pub(crate) fn check(recipe: &Recipe) -> Result<(), TrainError> {
    let folder = &recipe.output_path;
    let path = run_file(folder);
    if path.exists() {
        let differences = recipe.differences(&Recipe::read(&path)?);
        if !differences.is_empty() {
            return Err(TrainError::ForeignRun { path: folder.clone(), differences });
        }
    } else if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(TrainError::NoRun { path: folder.clone() });
    }
    Ok(())
}

/// Writes the resolved recipe into its folder, which is created where it is absent.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write(recipe: &Recipe, version: &str) -> Result<(), TrainError> {
    let path = run_file(&recipe.output_path);
    let text =
        format!("# written by {version}; `fewstep train --config` takes this file\n{}", recipe.to_toml());
    atomic::write(&path, text.as_bytes()).map_err(TrainError::io(&path))
}

fn run_file(folder: &Path) -> PathBuf {
    folder.join("run.toml")
}
