//! Whether a data set was made for this run: the sigma grid and the teacher must be the run's own.

use fewstep_data::provenance::{FILE_NAME, Provenance, TORCH_CPU};
use fewstep_models::{Model, ModelSource, weights_hash};

use crate::TrainError;
use crate::recipe::Recipe;

/// Compares a generated data set with the run. A data set without provenance, pictures from elsewhere, passes.
///
/// # Errors
/// Names what differs, with both values.
pub(crate) fn check(recipe: &Recipe, model: &Model) -> Result<(), TrainError> {
    let folder = &recipe.dataset_base_path;
    let Some(found) = Provenance::read(folder)? else { return Ok(()) };
    let differs = |what, found: String, expected: String, hint| {
        Err(TrainError::Provenance { path: folder.join(FILE_NAME), what, found, expected, hint })
    };
    let grid = model.sigma_grid(found.student_num_inference_steps, found.height, found.width)?;
    if grid.as_slice() != found.student_sigmas {
        let (data, run) = (format!("{:?}", found.student_sigmas), format!("{:?}", grid.as_slice()));
        return differs(
            "the student's sigma grid",
            data,
            run,
            "the model's scheduler changed since; generate the data again",
        );
    }
    if found.noise_generator != TORCH_CPU {
        let hint = "the initial noise cannot be drawn here; generate the data again";
        return differs("the noise generator", found.noise_generator, TORCH_CPU.into(), hint);
    }
    let hash = weights_hash(&ModelSource::from(&recipe.model))?;
    if hash != found.teacher_hash {
        let hint = "train the model that drew the pictures, or generate them again with this one";
        return differs("the teacher's hash", found.teacher_hash, hash, hint);
    }
    Ok(())
}
