//! What a run would do, found out before it does it. Weights and pictures are read as far as their headers; nothing is
//! computed with them, downloaded or written.

mod alternatives;
mod data;
mod files;
mod memory;

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use fewstep_models::lora;
use fewstep_models::{
    AUTOENCODER, Defaults, Footprint, LoadOptions, Model, ModelError, ModelSource, NamedVisitor,
    check_weights, loaded_components, visit_named,
};
use serde::Serialize;

pub use alternatives::Alternative;
pub use data::{Bucket, DataOutline};
pub use files::PlannedFile;
pub use memory::{Memory, Part, Phase};

use crate::checkpoint::Checkpoints;
use crate::learning_rate::LearningRate;
use crate::recipe::{InitialWeights, Objective, Recipe, Stage};
use crate::trainable::{Trainable, preset};
use crate::{TrainError, provenance, run_folder, samples, start_weights, trainer};

/// What a run would do. What cannot be told because of a problem is absent.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DryRun {
    /// All that keeps it from starting.
    pub problems: Vec<String>,
    /// What is trained.
    pub model: Option<ModelOutline>,
    /// What it is trained on.
    pub data: DataOutline,
    /// How it goes on.
    pub course: Option<Course>,
    /// What it holds in memory, what the process itself takes aside.
    pub memory: Option<Memory>,
    /// What it computes.
    pub work: Option<Work>,
    /// What it writes.
    pub files: Vec<PlannedFile>,
    /// Changes that would lower its memory.
    pub alternatives: Vec<Alternative>,
}

/// The model of a run.
#[derive(Clone, Debug, Serialize)]
pub struct ModelOutline {
    /// Where it is.
    pub source: String,
    /// Parameters of each loaded component.
    pub parameters: BTreeMap<&'static str, u64>,
    /// Of these or of adapters beside them, those that learn.
    pub trained_parameters: u64,
    /// What learns.
    pub trained: String,
}

/// The optimiser steps of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Course {
    /// Steps that a run in the same folder has done; it is continued after them.
    pub first_step: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The rate at some steps, counted from 1: the first, the end of the warm-up, quarters of the run and the last.
    pub learning_rates: Vec<(u64, f64)>,
}

/// Floating point operations, those of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Work {
    /// Before the first step: prompts are encoded. The autoencoder's are not counted.
    pub preparation: f64,
    /// One step, on average over an epoch.
    pub step: f64,
    /// Drawing a sheet of samples.
    pub samples: f64,
    /// Sheets of samples still to be drawn.
    pub sheets: u64,
}

/// Finds out what a run would do. `source` is absent where the model's files are still to be downloaded.
///
/// # Errors
/// If the recipe itself is at fault. Everything else that keeps the run from starting is among its problems.
pub fn dry_run(recipe: &Recipe, source: Option<&ModelSource>, device: &Device) -> Result<DryRun, TrainError> {
    recipe.validate()?;
    let mut check = Check { recipe, problems: Vec::new() };
    check.keep(run_folder::check(recipe));
    let model = source.and_then(|source| check.model(source, device));
    let data = data::check(recipe, model.as_ref(), &mut check.problems);
    let mut found = DryRun { data, ..DryRun::default() };
    if let (Some(source), Some(model)) = (source, &model) {
        check.provenance(source, model);
        if let Some((outline, trained)) = check.trained(source, model) {
            if found.data.rows > 0 {
                check.outlook(&mut found, &Subject { source, model, trained });
            }
            found.model = Some(outline);
        }
    }
    check.keep(recipe.sample_prompts());
    found.problems = check.problems.iter().map(ToString::to_string).collect();
    Ok(found)
}

/// Gathers problems.
struct Check<'a> {
    recipe: &'a Recipe,
    problems: Vec<TrainError>,
}

/// What is trained.
struct Subject<'a> {
    source: &'a ModelSource,
    /// Without weights.
    model: &'a Model,
    /// Parameters that learn.
    trained: u64,
}

impl Check<'_> {
    /// The value, or another problem.
    fn keep<T, E: Into<TrainError>>(&mut self, found: Result<T, E>) -> Option<T> {
        found.map_err(|error| self.problems.push(error.into())).ok()
    }

    /// Configs, tokenizer, and the headers of weight files against them.
    fn model(&mut self, source: &ModelSource, device: &Device) -> Option<Model> {
        let components = trainer::components(self.recipe);
        for component in self.keep(loaded_components(source, components)).unwrap_or_default() {
            // Of a model with fresh weights only the autoencoder is read.
            if self.recipe.initial_weights == InitialWeights::Pretrained || component == AUTOENCODER {
                self.keep(check_weights(source, component));
            }
        }
        let options = LoadOptions {
            device: device.clone(),
            conventions: self.recipe.conventions(),
            dtype: self.recipe.dtype.into(),
            components,
        };
        self.keep(Model::outline(source, &options))
    }

    fn provenance(&mut self, source: &ModelSource, model: &Model) {
        let generated = self.recipe.task.objective() == Objective::Distillation
            && self.recipe.task.stage() != Stage::Train
            && !self.recipe.online_teacher;
        if generated && let Some(differences) = self.keep(provenance::differences(self.recipe, source, model))
        {
            self.problems.extend(differences);
        }
    }

    /// What learns, and how many parameters it has; files of weights to start from are checked by their headers.
    fn trained(&mut self, source: &ModelSource, model: &Model) -> Option<(ModelOutline, u64)> {
        let components = trainer::components(self.recipe);
        let outline = |trained, trained_parameters| -> Result<ModelOutline, ModelError> {
            Ok(ModelOutline {
                source: source.to_string(),
                parameters: Footprint::counted(source, components)?,
                trained_parameters,
                trained,
            })
        };
        if self.recipe.task.stage() == Stage::DataProcess {
            return Some((self.keep(outline("nothing".to_owned(), 0))?, 0));
        }
        if let Some(path) = self.keep(preset(model, self.recipe)).flatten() {
            self.keep(lora::check(model, path));
        }
        let trainable = self.keep(Trainable::new(self.recipe, model))?;
        let counted = count(self.recipe, &trainable, model);
        let (trained, name) = self.keep(counted)?;
        if let (Some(path), Trainable::Full(_)) = (&self.recipe.resume_from_checkpoint, &trainable) {
            self.keep(start_weights::check(model, path, &trainable));
        }
        Some((self.keep(outline(name, trained))?, trained))
    }

    /// Everything that follows from model and data.
    fn outlook(&mut self, found: &mut DryRun, subject: &Subject<'_>) {
        let recipe = self.recipe;
        let steps = data::steps(recipe, &found.data).unwrap_or((0, 0));
        let Subject { source, model, trained } = *subject;
        let facts = memory::Facts { recipe, source, model, data: &found.data, trained };
        found.memory = self.keep(memory::estimate(&facts));
        found.alternatives = self.keep(alternatives::of(&facts)).unwrap_or_default();
        let files = files::Facts {
            recipe,
            source: subject.source,
            model: subject.model,
            data: &found.data,
            trained: subject.trained,
            steps,
        };
        found.files = self.keep(files::planned(&files)).unwrap_or_default();
        if recipe.task.stage() != Stage::DataProcess && steps.1 > 0 {
            found.course = self.keep(course(recipe, steps));
        }
        let done = found.course.as_ref().map_or(0, |course| course.first_step);
        found.work =
            self.keep(work(recipe, (subject.source, subject.model.defaults()), &found.data, (done, steps)));
    }
}

/// The number of parameters that learn, and what they are.
fn count(recipe: &Recipe, trainable: &Trainable, model: &Model) -> Result<(u64, String), TrainError> {
    match (trainable, &recipe.lora_checkpoint) {
        (Trainable::Lora(_), Some(path)) => {
            Ok((lora::check(model, path)?, format!("the adapters of {}", path.display())))
        }
        (Trainable::Lora(config), None) => {
            let layers = lora::targets(model, config)?;
            let ends: usize = layers.iter().map(|(_, [output, input])| input + output).sum();
            let name = format!("adapters of rank {} on {} layers", config.rank, layers.len());
            Ok(((config.rank * ends) as u64, name))
        }
        (Trainable::Full(names), _) => {
            Ok((numbers(model, trainable), format!("all of {}", names.join(", "))))
        }
    }
}

/// Numbers of a model's parameters that learn.
fn numbers(model: &Model, trainable: &Trainable) -> u64 {
    struct Count<'a>(&'a Trainable, u64);
    impl NamedVisitor for Count<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if self.0.includes(name) {
                self.1 += parameter.lazy_shape().num_elements() as u64;
            }
        }
    }
    let mut count = Count(trainable, 0);
    visit_named(model, &mut count);
    count.1
}

fn course(recipe: &Recipe, (steps_per_epoch, total_steps): (u64, u64)) -> Result<Course, TrainError> {
    let rate = LearningRate::new(recipe, total_steps);
    let quarters = (0..=4).map(|quarter| quarter * total_steps / 4);
    let mut steps: Vec<u64> = quarters.chain([1, recipe.warmup_steps]).collect();
    steps.retain(|step| (1..=total_steps).contains(step));
    steps.sort_unstable();
    steps.dedup();
    Ok(Course {
        first_step: Checkpoints::new(recipe).newest_step()?,
        steps_per_epoch,
        total_steps,
        learning_rates: steps.into_iter().map(|step| (step, rate.at(step - 1))).collect(),
    })
}

fn work(
    recipe: &Recipe,
    (source, usual): (&ModelSource, Defaults),
    data: &DataOutline,
    (done, (steps_per_epoch, total_steps)): (u64, (u64, u64)),
) -> Result<Work, ModelError> {
    let preparation = match recipe.task.stage() {
        Stage::Train => 0.0,
        _ => {
            let encoding = Footprint::of_encoding(source)?;
            let per = |count: u64, flops: u64| count as f64 * flops as f64;
            per(data.encoded_tokens, encoding.flops_per_token)
                + per(data.encoded_pixels, encoding.flops_per_pixel)
        }
    };
    let mut work = Work { preparation, step: 0.0, samples: 0.0, sheets: 0 };
    if recipe.task.stage() == Stage::DataProcess {
        return Ok(work);
    }
    for bucket in &data.batches {
        work.step += epoch_flops(recipe, (source, usual), data, bucket)? / steps_per_epoch as f64;
    }
    if let (Some(bucket), true) = (data.batches.first(), recipe.sample_steps > 0) {
        let prompts = recipe.sample_prompts().map_or(0, |prompts| prompts.len());
        let footprint = memory::footprint(recipe, source, data, (bucket, prompts))?;
        let (steps, cfg_scale) = samples::settings(recipe, data.groups[0], usual);
        let evaluations = steps as f64 * evaluations(cfg_scale.into());
        work.samples = evaluations * footprint.flops.forward as f64;
        work.sheets = total_steps / recipe.sample_steps - done / recipe.sample_steps;
    }
    Ok(work)
}

/// Operations of all batches of one kind in an epoch.
fn epoch_flops(
    recipe: &Recipe,
    (source, usual): (&ModelSource, Defaults),
    data: &DataOutline,
    bucket: &Bucket,
) -> Result<f64, ModelError> {
    let flops = memory::footprint(recipe, source, data, (bucket, 1))?.flops;
    let checkpointed = recipe.checkpoints_gradients();
    let sample = match recipe.task.objective() {
        Objective::FlowMatching => flops.training_evaluation(checkpointed) as f64,
        Objective::Distillation => {
            let guided = evaluations(recipe.student_guidance.scale(bucket.cfg_scale).into());
            let steps = bucket.num_inference_steps;
            guided * flops.distillation_step(steps, recipe.kept_steps(), checkpointed) as f64
        }
    };
    let teacher = match recipe.online_teacher {
        true => {
            let (steps, cfg_scale) = recipe.teacher(usual);
            steps as f64 * evaluations(cfg_scale.into()) * flops.forward as f64
        }
        false => 0.0,
    };
    Ok(bucket.rows as f64 * (sample + teacher))
}

/// Evaluations of a sampling step.
fn evaluations(cfg_scale: f64) -> f64 {
    if cfg_scale == 1.0 { 1.0 } else { 2.0 }
}
