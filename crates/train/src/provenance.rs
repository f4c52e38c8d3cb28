//! Whether a data set was made for this run: what the noise and the sigma grid depend on, and
//! the teacher, must be the run's own.

use fewstep_data::image::Size;
use fewstep_data::provenance::{FILE_NAME, Provenance, TORCH_CPU, TORCH_CUDA};
use fewstep_models::conventions::name_of;
use fewstep_models::{Conventions, DTYPES, Model, ModelSource, weights_hash};

use crate::TrainError;
use crate::recipe::Recipe;

/// Compares a generated data set with the run. A data set without provenance, pictures from elsewhere, passes.
///
/// # Errors
/// Names what differs, with both values.
pub(crate) fn check(recipe: &Recipe, source: &ModelSource, model: &Model) -> Result<(), TrainError> {
    let folder = &recipe.dataset_base_path;
    let Some(found) = Provenance::read(folder)? else { return Ok(()) };
    let differs = |what, found: String, expected: String, hint| {
        Err(TrainError::Provenance { path: folder.join(FILE_NAME), what, found, expected, hint })
    };
    let size = Size { height: found.height, width: found.width };
    let grid = recipe.training_grid.sigmas(model, found.student_num_inference_steps, size)?;
    if !grid.agrees_with(&found.student_sigmas) {
        let (data, run) = (format!("{:?}", found.student_sigmas), format!("{:?}", grid.as_slice()));
        return differs(
            "the student's sigma grid",
            data,
            run,
            "the model's scheduler changed since; generate the data again",
        );
    }
    if ![TORCH_CPU, TORCH_CUDA].contains(&found.noise_generator.as_str()) {
        let hint = "the initial noise cannot be drawn here; generate the data again";
        return differs("the noise generator", found.noise_generator, TORCH_CPU.into(), hint);
    }
    let dtype = name_of(&DTYPES, recipe.dtype.into());
    if found.dtype != dtype {
        let hint =
            "initial noise depends on it: train with --dtype as the data set's, or generate the data again";
        return differs("the number type", found.dtype, dtype.into(), hint);
    }
    // Data sets older than the choice follow the published model.
    let (key, published) = ("activation", Conventions::default().record());
    let [data, run] = [&found.conventions, &model.conventions().record()]
        .map(|choices| choices.get(key).unwrap_or(&published[key]).clone());
    if data != run {
        let hint =
            "the teacher and the student must be the same function: give --activation or --compat as then";
        return differs("the activation", data, run, hint);
    }
    if let Some(picture) = found.input_image {
        let strength = format!("a picture, of which {} was drawn anew", picture.denoising_strength);
        let hint = "a student is trained from noise to picture; generate the data without --input-image";
        return differs("the start of sampling", strength, "noise".into(), hint);
    }
    if !source.is_whole() {
        return Ok(()); // no hash of the whole model to compare
    }
    let hash = weights_hash(source)?;
    if hash != found.teacher_hash {
        let hint = "train the model that drew the pictures, or generate them again with this one";
        return differs("the teacher's hash", found.teacher_hash, hash, hint);
    }
    Ok(())
}
