//! Whether a data set was made for this run: what the noise and the sigma grid depend on, and
//! the teacher, must be the run's own.

use std::path::PathBuf;

use fewstep_data::emoji::CONCEPTS_FILE;
use fewstep_data::provenance::{FILE_NAME, Provenance, TORCH_CPU, TORCH_CUDA};
use fewstep_models::conventions::name_of;
use fewstep_models::{Conventions, DTYPES, Extent, Model, ModelSource, weights_hash};
use sha2::{Digest, Sha256};

use crate::recipe::{Recipe, Stage};
use crate::{TrainError, processed, source};

/// The file that tells a data set apart from others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DataFile {
    /// Its name.
    pub(crate) name: String,
    /// SHA-256 of its bytes.
    pub(crate) hash: String,
}

impl DataFile {
    /// The provenance of data that was generated, otherwise the file of the rows.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn of(recipe: &Recipe) -> Result<Option<Self>, TrainError> {
        let base = &recipe.dataset_base_path;
        let candidates = match recipe.task.stage() {
            Stage::Train => vec![base.join(processed::ROWS)],
            _ => [Some(base.join(FILE_NAME)), source::metadata_path(recipe), Some(base.join(CONCEPTS_FILE))]
                .into_iter()
                .flatten()
                .collect(),
        };
        candidates.into_iter().find(|path| path.is_file()).map(Self::read).transpose()
    }

    fn read(path: PathBuf) -> Result<Self, TrainError> {
        let bytes = std::fs::read(&path).map_err(TrainError::io(&path))?;
        let hash = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(), hash })
    }
}

/// Compares a generated data set with the run. A data set without provenance, pictures from elsewhere, passes.
///
/// # Errors
/// Names the first thing that differs, with both values.
pub(crate) fn check(recipe: &Recipe, source: &ModelSource, model: &Model) -> Result<(), TrainError> {
    let found = differences(recipe, source, model)?;
    found.into_iter().next().map_or(Ok(()), Err)
}

/// All that differs between a generated data set and the run.
///
/// # Errors
/// If a file cannot be read or the run has no such grid.
pub(crate) fn differences(
    recipe: &Recipe,
    source: &ModelSource,
    model: &Model,
) -> Result<Vec<TrainError>, TrainError> {
    let folder = &recipe.dataset_base_path;
    let Some(data) = Provenance::read(folder)? else { return Ok(Vec::new()) };
    let mut differences = Vec::new();
    let mut compare = |what, found: String, expected: String, hint| {
        if found != expected {
            let path = folder.join(FILE_NAME);
            differences.push(TrainError::Provenance { path, what, found, expected, hint });
        }
    };
    let extent = Extent { frames: data.num_frames.unwrap_or(1), height: data.height, width: data.width };
    let grid = recipe.training_grid.sigmas(model, data.student_num_inference_steps, extent)?;
    if !grid.agrees_with(&data.student_sigmas) {
        compare(
            "the student's sigma grid",
            format!("{:?}", data.student_sigmas),
            format!("{:?}", grid.as_slice()),
            "the model's scheduler changed since; generate the data again",
        );
    }
    if ![TORCH_CPU, TORCH_CUDA].contains(&data.noise_generator.as_str()) {
        let hint = "the initial noise cannot be drawn here; generate the data again";
        compare("the noise generator", data.noise_generator, TORCH_CPU.into(), hint);
    }
    let hint =
        "initial noise depends on it: train with --dtype as the data set's, or generate the data again";
    compare("the number type", data.dtype, name_of(&DTYPES, recipe.dtype.into()).into(), hint);
    // Data sets older than the choice follow the published model.
    let (key, published) = ("activation", Conventions::default().record());
    let [then, now] = [&data.conventions, &model.conventions().record()]
        .map(|choices| choices.get(key).unwrap_or(&published[key]).clone());
    let hint = "the teacher and the student must be the same function: give --activation or --compat as then";
    compare("the activation", then, now, hint);
    if let Some(picture) = data.input_image {
        let strength = format!("a picture, of which {} was drawn anew", picture.denoising_strength);
        let hint = "a student is trained from noise to picture; generate the data without --input-image";
        compare("the start of sampling", strength, "noise".into(), hint);
    }
    // Without all components there is no hash of the whole model to compare.
    if source.is_whole() {
        let hint = "train the model that drew the pictures, or generate them again with this one";
        compare("the teacher's hash", data.teacher_hash, weights_hash(source)?, hint);
    }
    Ok(differences)
}
