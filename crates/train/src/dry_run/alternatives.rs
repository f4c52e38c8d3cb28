//! Changes of a recipe that lower its memory, and by how much.

use fewstep_models::ModelError;
use serde::Serialize;

use super::data::DataOutline;
use super::memory::{Facts, estimate, footprint};
use crate::recipe::{Recipe, Stage, Task};

/// A change of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alternative {
    /// What to do.
    pub change: String,
    /// What must then be there at the most, what the process itself takes aside.
    pub needed_bytes: u64,
}

/// Rank of the adapters that are proposed in place of full training.
const RANK: usize = 32;

/// The changes that there are for a recipe, from the smallest to the largest, each by itself, and all together.
pub(super) fn of(facts: &Facts<'_>) -> Result<Vec<Alternative>, ModelError> {
    let recipe = facts.recipe;
    if recipe.task.stage() == Stage::DataProcess {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut batch_size = recipe.batch_size;
    while batch_size > 1 {
        batch_size /= 2;
        let same_step = recipe.gradient_accumulation_steps * recipe.batch_size / batch_size;
        let changed = Recipe { batch_size, ..recipe.clone() };
        let change =
            format!("--batch-size {batch_size} --gradient-accumulation-steps {same_step}, the same steps");
        found.push(alternative(facts, change, &changed, facts.data)?);
    }
    let mut all = Recipe { batch_size: 1, ..recipe.clone() };
    if recipe.lora_base_model.is_none() {
        let base = facts.model.denoiser_name();
        all = Recipe { lora_base_model: Some(base.into()), lora_rank: RANK, ..all };
        let changed = Recipe { batch_size: recipe.batch_size, ..all.clone() };
        let change = format!("adapters instead of all weights: --lora-base-model {base} --lora-rank {RANK}");
        found.push(alternative(facts, change, &changed, facts.data)?);
    }
    if recipe.kept_steps().among(facts.student_steps()).recorded > 1 {
        let recorded_steps = Some(1);
        all = Recipe { recorded_steps, ..all };
        let changed = Recipe { recorded_steps, ..recipe.clone() };
        found.push(alternative(facts, "--recorded-steps 1, more time".to_owned(), &changed, facts.data)?);
    }
    if let Some((first, second)) = halves(recipe) {
        all = Recipe { task: second, ..all };
        let changed = Recipe { task: second, ..recipe.clone() };
        let change = format!("in two halves: --task {}, then --task {}", first.name(), second.name());
        found.push(alternative(facts, change, &changed, facts.data)?);
    }
    let smaller = half_the_side(facts);
    if let Some(smaller) = &smaller {
        let bucket = &smaller.batches[0];
        let change = format!("pictures of half the side, such as {}x{} px", bucket.width, bucket.height);
        found.push(alternative(facts, change, recipe, smaller)?);
    }
    let data = smaller.as_ref().unwrap_or(facts.data);
    found.push(alternative(facts, "all of these together".to_owned(), &all, data)?);
    Ok(found)
}

fn alternative(
    facts: &Facts<'_>,
    change: String,
    recipe: &Recipe,
    data: &DataOutline,
) -> Result<Alternative, ModelError> {
    // Adapters of the usual layers, as near as that is to their number.
    let lora = facts.recipe.lora_base_model.is_none() && recipe.lora_base_model.is_some();
    let trained = match data.batches.first() {
        Some(bucket) if lora => footprint(recipe, facts.source, data, (bucket, 1))?.trained,
        _ => facts.trained,
    };
    let changed = Facts { recipe, data, trained, ..*facts };
    Ok(Alternative { change, needed_bytes: estimate(&changed)?.peak().bytes() })
}

/// A whole task as its two halves.
fn halves(recipe: &Recipe) -> Option<(Task, Task)> {
    match recipe.task {
        _ if recipe.online_teacher || recipe.sample_steps > 0 => None,
        Task::Sft => Some((Task::SftDataProcess, Task::SftTrain)),
        Task::DirectDistill => Some((Task::DirectDistillDataProcess, Task::DirectDistillTrain)),
        _ => None,
    }
}

/// The data at half the side, where the model draws such pictures.
fn half_the_side(facts: &Facts<'_>) -> Option<DataOutline> {
    let mut smaller = facts.data.clone();
    for bucket in &mut smaller.batches {
        (bucket.width, bucket.height) = (bucket.width / 2, bucket.height / 2);
    }
    smaller.latents /= 4;
    smaller.encoded_latents /= 4;
    smaller.encoded_pixels /= 4;
    smaller.largest_encoded /= 4;
    let fits = |bucket| footprint(facts.recipe, facts.source, &smaller, (bucket, 1)).is_ok();
    (!smaller.batches.is_empty() && smaller.batches.iter().all(fits)).then_some(smaller)
}
