//! The trained weights as files that tell their origin.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fewstep_data::atomic::NewFolder;
use fewstep_data::provenance::TORCH_CPU;
use fewstep_models::{Model, ModelSource, lora, weights_hash};

use crate::TrainError;
use crate::dataset::Group;
use crate::recipe::{Objective, Recipe};

/// Where trained weights come from.
pub(crate) struct Origin<'a> {
    /// The run's recipe.
    pub(crate) recipe: &'a Recipe,
    /// The model that was trained.
    pub(crate) source: &'a ModelSource,
    /// The kinds of batches trained on.
    pub(crate) groups: Vec<Group>,
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
        if self.recipe.task.objective() == Objective::Distillation {
            info.insert("fewstep.noise_generator".to_owned(), TORCH_CPU.to_owned());
            info.insert("fewstep.sigma_grids".to_owned(), self.sigma_grids(model)?);
        }
        Ok(info)
    }

    /// The grids the student was trained on, as JSON: a list of objects.
    fn sigma_grids(&self, model: &Model) -> Result<String, TrainError> {
        let mut grids = Vec::new();
        for group in &self.groups {
            let (steps, height, width) = (group.num_inference_steps, group.size.height, group.size.width);
            let grid = self.recipe.training_grid.sigmas(model, steps, group.size)?;
            let entry = serde_json::json!({
                "num_inference_steps": steps,
                "cfg_scale": group.cfg_scale(),
                "height": height,
                "width": width,
                "sigmas": grid.as_slice(),
            });
            grids.push(entry);
        }
        Ok(serde_json::Value::Array(grids).to_string())
    }
}
