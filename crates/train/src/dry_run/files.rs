//! Which files a run leaves, and about how large they become.

use std::path::{Path, PathBuf};

use fewstep_models::{Model, ModelSource};
use serde::Serialize;

use super::data::DataOutline;
use super::memory;
use crate::recipe::{OutputLayout, Recipe, Stage};
use crate::{TrainError, peer_output};

/// Bytes of a number in checkpoints.
const F32: u64 = 4;
/// A line of loss.csv, and the scalars of one in the TensorBoard file.
const BYTES_PER_LOG_LINE: [u64; 2] = [70, 260];

/// A file, or several of a kind, that a run writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedFile {
    /// Where; a name that depends on the step is written with that of the last one.
    pub path: PathBuf,
    /// How many of the kind are there at the same time.
    pub count: u64,
    /// About how large all of them together become.
    pub bytes: u64,
}

/// What the sizes depend on.
pub(super) struct Facts<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) source: &'a ModelSource,
    /// Without weights.
    pub(super) model: &'a Model,
    pub(super) data: &'a DataOutline,
    pub(super) trained: u64,
    /// Optimiser steps of an epoch and of the run.
    pub(super) steps: (u64, u64),
}

/// The files of a run in its folder.
pub(super) fn planned(facts: &Facts<'_>) -> Result<Vec<PlannedFile>, TrainError> {
    let Facts { recipe, data, .. } = facts;
    let at = |name: &str| recipe.output_path.join(name);
    let recipe_bytes = recipe.to_toml().len() as u64;
    let mut files = vec![one(at("run.toml"), recipe_bytes)];
    if recipe.task.stage() == Stage::DataProcess {
        let prompts: u64 = data.rows as u64 * BYTES_PER_ROW;
        files.push(one(at("latents.safetensors"), F32 * data.latents));
        files.push(one(at("text.safetensors"), F32 * data.text_states));
        files.push(one(at("processed.json"), recipe_bytes + prompts));
        return Ok(files);
    }
    let lines = facts.steps.1.div_ceil(recipe.log_steps);
    let [csv, events] = BYTES_PER_LOG_LINE.map(|bytes| bytes * lines);
    files.push(one(at("loss.csv"), csv));
    files.push(one(at("tensorboard/events.out.tfevents.0.fewstep"), events));
    files.extend(facts.checkpoints());
    files.extend(facts.samples()?);
    files.extend(facts.result()?);
    Ok(files)
}

/// A row and its prompt in processed.json.
const BYTES_PER_ROW: u64 = 250;

impl Facts<'_> {
    /// While one is being written, one more than are kept.
    fn checkpoints(&self) -> Option<PlannedFile> {
        let (every, total) = (self.recipe.checkpoint_steps(), self.steps.1);
        let written = if every == 0 { 1 } else { total.div_ceil(every) };
        let count = written.min(self.recipe.keep as u64 + 1);
        let copies = 1 + u64::from(self.recipe.ema_decay > 0.0);
        let state = memory::optimizer_bytes(self.recipe, self.trained);
        let path = self.recipe.output_path.join(format!("checkpoints/step-{total:08}"));
        (total > 0).then(|| PlannedFile { path, count, bytes: count * (copies * F32 * self.trained + state) })
    }

    /// Sheets of all prompts; a png is smaller than its pixels.
    fn samples(&self) -> Result<Option<PlannedFile>, TrainError> {
        let (every, total) = (self.recipe.sample_steps, self.steps.1);
        let prompts = self.recipe.sample_prompts()?.len() as u64;
        let Some(bucket) = self.data.batches.first().filter(|_| every > 0 && prompts > 0) else {
            return Ok(None);
        };
        let count = total / every;
        let path = self.recipe.output_path.join(format!("samples/step-{:08}.png", count * every));
        let bytes = count * prompts * 3 * (bucket.width * bucket.height) as u64;
        Ok((count > 0).then_some(PlannedFile { path, count, bytes }))
    }

    fn result(&self) -> Result<Vec<PlannedFile>, TrainError> {
        let at = |name: &Path| self.recipe.output_path.join(name);
        if self.recipe.output_layout == OutputLayout::Diffsynth {
            return Ok(self.peer_files().into_iter().collect());
        }
        Ok(match self.recipe.lora_base_model {
            Some(_) => vec![one(at("lora.safetensors".as_ref()), F32 * self.trained)],
            None => {
                let bytes = self.model.saved_bytes(self.source, self.recipe.output_dtype.into())?;
                vec![one(at("model".as_ref()), bytes)]
            }
        })
    }

    fn peer_files(&self) -> Option<PlannedFile> {
        let names = (1..=self.steps.1).filter_map(|step| peer_output::due(self.recipe, step, self.steps));
        let (count, last) = names.fold((0, None), |(count, _), name| (count + 1, Some(name)));
        let bytes = fewstep_models::WeightType::from(self.recipe.state_dtype()).bytes() as u64 * self.trained;
        Some(PlannedFile { path: self.recipe.output_path.join(last?), count, bytes: count * bytes })
    }
}

fn one(path: PathBuf, bytes: u64) -> PlannedFile {
    PlannedFile { path, count: 1, bytes }
}
