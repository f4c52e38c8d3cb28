//! The trained weights as files that tell their origin.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fewstep_data::atomic::NewFolder;
use fewstep_flow::noise::RandDevice;
use fewstep_models::student::{TrainedGrid, noise_generator};
use fewstep_models::{Model, ModelSource, Student, lora, weights_hash};

use crate::TrainError;
use crate::dataset::Group;
use crate::provenance::DataFile;
use crate::recipe::{Objective, Recipe};

/// Where trained weights come from.
pub(crate) struct Origin<'a> {
    /// The run's recipe.
    pub(crate) recipe: &'a Recipe,
    /// The model that was trained.
    pub(crate) source: &'a ModelSource,
    /// The kinds of batches trained on.
    pub(crate) groups: Vec<Group>,
    /// The generators of the rows' noise.
    pub(crate) rand_devices: Vec<RandDevice>,
    /// What the data was when the run began.
    pub(crate) data: Option<&'a DataFile>,
    /// Program, version and commit.
    pub(crate) version: &'a str,
}

/// Writes `lora.safetensors` or the model folder `model/` into the run's folder; returns its path.
///
/// # Errors
/// If a file cannot be read or written.
pub(crate) fn write(origin: &Origin<'_>, model: Model, steps: u64) -> Result<PathBuf, TrainError> {
    let recipe = origin.recipe;
    let info = origin.info(&model, steps)?;
    if recipe.lora_base_model.is_some() {
        let path = recipe.output_path.join("lora.safetensors");
        lora::save(&model, &path, &info, recipe.lora_format.into())?;
        return Ok(path);
    }
    let path = recipe.output_path.join("model");
    let made = NewFolder::begin(&path).map_err(TrainError::io(&path))?;
    model.save_pretrained(origin.source, made.part(), recipe.output_dtype.into(), &info)?;
    made.replace().map_err(TrainError::io(&path))?;
    Ok(path)
}

impl Origin<'_> {
    /// The metadata of the weight files.
    pub(crate) fn info(&self, model: &Model, steps: u64) -> Result<BTreeMap<String, String>, TrainError> {
        let mut info = BTreeMap::from([
            ("fewstep.version".to_owned(), self.version.to_owned()),
            ("fewstep.task".to_owned(), self.recipe.task.name().to_owned()),
            ("fewstep.training_steps".to_owned(), steps.to_string()),
            ("fewstep.recipe".to_owned(), self.recipe.without_place().to_toml()),
        ]);
        if self.source.is_whole() {
            info.insert(lora::BASE_HASH.to_owned(), weights_hash(self.source)?);
        }
        if let Some(data) = self.data {
            info.insert("fewstep.data_file".to_owned(), data.name.clone());
            info.insert("fewstep.data_hash".to_owned(), data.hash.clone());
        }
        if self.recipe.task.objective() == Objective::Distillation {
            info.extend(self.student(model)?.to_info());
        }
        Ok(info)
    }

    /// What the student was trained to run.
    fn student(&self, model: &Model) -> Result<Student, TrainError> {
        let grid = |group: &Group| -> Result<TrainedGrid, TrainError> {
            let (steps, extent) = (group.num_inference_steps, group.extent);
            Ok(TrainedGrid {
                num_inference_steps: steps,
                cfg_scale: self.recipe.student_guidance.scale(group.cfg_scale()),
                embedded_guidance: model
                    .defaults()
                    .embedded_guidance
                    .map(|usual| group.embedded_guidance().unwrap_or(usual)),
                height: extent.height,
                width: extent.width,
                num_frames: extent.num_frames(),
                sigmas: self.recipe.training_grid.sigmas(model, steps, extent)?,
            })
        };
        Ok(Student {
            grids: self.groups.iter().map(grid).collect::<Result<_, _>>()?,
            rule: Some(self.recipe.training_grid.rule(model)),
            noise_generators: self.rand_devices.iter().map(|at| noise_generator(*at).to_owned()).collect(),
        })
    }
}
