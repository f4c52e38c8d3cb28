//! The files that DiffSynth-Studio's trainer leaves: one safetensors file per epoch, or per so many steps, with the
//! trained parameters alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fewstep_models::{Model, lora, save_tensors};

use crate::TrainError;
use crate::host::HostTensors;
use crate::recipe::{LoraFormat, Recipe};

/// Scale and place of what is written.
pub(crate) struct PeerFile<'a> {
    /// The run's recipe.
    pub(crate) recipe: &'a Recipe,
    /// Tells how parameters are called in files.
    pub(crate) model: &'a Model,
    /// Where the weights come from.
    pub(crate) info: BTreeMap<String, String>,
}

impl PeerFile<'_> {
    /// Writes the trained parameters as `name` into the output folder; returns the path.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, name: &str, trained: HostTensors) -> Result<PathBuf, TrainError> {
        let path = self.recipe.output_path.join(name);
        let scale = self.recipe.lora_scale();
        let tensors = trained.into_iter().map(|(parameter, mut tensor)| {
            // The peer's readers know no alpha.
            if parameter.ends_with(".lora.up") && scale != 1.0 {
                tensor.values.iter_mut().for_each(|value| *value *= scale);
            }
            (self.key(&parameter), tensor.shape, tensor.values)
        });
        save_tensors(&path, tensors, self.recipe.state_dtype().into(), &self.info)?;
        Ok(path)
    }

    /// `pipe.dit.` and the key of the model's own weight files, without the prefix that the recipe takes off; that of
    /// an adapter in the spelling the recipe names, which for diffusers has its own prefix.
    fn key(&self, parameter: &str) -> String {
        let (component, key) = self.model.weight_key(parameter);
        if self.recipe.lora_format == LoraFormat::Diffusers
            && let Some(key) = lora::LoraFormat::Diffusers.respelled(&key)
        {
            return key;
        }
        let (component, key) = match component == self.model.denoiser_name() {
            true => ("dit", self.model.diffsynth_key(&key)),
            false => (component, key),
        };
        let full = format!("pipe.{component}.{key}");
        full.strip_prefix(&self.recipe.remove_prefix_in_ckpt).map_or(full.clone(), str::to_owned)
    }
}

/// Name of the file due after an optimiser step, if one is.
pub(crate) fn due(recipe: &Recipe, step: u64, (steps_per_epoch, total_steps): (u64, u64)) -> Option<String> {
    match recipe.save_steps {
        Some(every) if every > 0 && step.is_multiple_of(every) => Some(by_step(step)),
        None if step.is_multiple_of(steps_per_epoch) => {
            Some(format!("epoch-{}.safetensors", step / steps_per_epoch - 1))
        }
        // What comes after the last file of a run is not lost.
        _ => (step == total_steps).then(|| by_step(step)),
    }
}

/// Name of the file of an optimiser step.
pub(crate) fn by_step(step: u64) -> String {
    format!("step-{step}.safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_due_at_epochs_or_every_so_many_steps_and_at_the_end() {
        let names = |save_steps: Option<u64>, total_steps| -> Vec<String> {
            let recipe = Recipe { save_steps, ..Recipe::default() };
            (1..=total_steps).filter_map(|step| due(&recipe, step, (6, total_steps))).collect()
        };
        let files = |names: &[&str]| -> Vec<String> {
            names.iter().map(|name| format!("{name}.safetensors")).collect()
        };
        assert_eq!(names(None, 12), files(&["epoch-0", "epoch-1"]));
        assert_eq!(names(None, 8), files(&["epoch-0", "step-8"]));
        assert_eq!(names(Some(5), 12), files(&["step-5", "step-10", "step-12"]));
        assert_eq!(names(Some(0), 12), files(&["step-12"]));
    }
}
