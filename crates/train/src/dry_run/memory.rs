//! The memory of a run as a sum of named parts, from formulas: nothing is loaded for it.

use std::collections::BTreeMap;

use fewstep_device::DeviceName;
use fewstep_models::{Encoding, Footprint, KeptSteps, Model, ModelError, ModelSource, WeightType, Workload};
use serde::Serialize;

use super::data::{Bucket, DataOutline};
use crate::recipe::{Objective, OptimizerName, Recipe, Stage, StudentGuidance};
use crate::{samples, tables, trainable, trainer};

/// Bytes of an f32, in which everything is computed.
const F32: u64 = 4;

/// Something held in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What.
    pub name: String,
    /// How much.
    pub bytes: u64,
}

/// A time in a run, with what is held then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// What is being done.
    pub name: &'static str,
    /// Everything held.
    pub parts: Vec<Part>,
}

/// The times of a run at which much is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// In their order.
    pub phases: Vec<Phase>,
}

impl Phase {
    fn new(name: &'static str, held: &[Part], more: Vec<Part>) -> Self {
        let parts = held.iter().cloned().chain(more).filter(|part| part.bytes > 0).collect();
        Self { name, parts }
    }

    /// All parts together.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

impl Memory {
    /// The time at which most is held.
    pub fn peak(&self) -> &Phase {
        self.phases.iter().max_by_key(|phase| phase.bytes()).expect("a run has phases")
    }

    /// The same with a part that is held all the time, such as what the process itself takes.
    pub fn beside(mut self, name: &str, bytes: u64) -> Self {
        for phase in &mut self.phases {
            phase.parts.insert(0, part(name, bytes));
        }
        self
    }
}

/// What the estimate is made from.
pub(super) struct Facts<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) source: &'a ModelSource,
    /// Without weights.
    pub(super) model: &'a Model,
    pub(super) data: &'a DataOutline,
    /// Parameters that learn.
    pub(super) trained: u64,
}

/// The memory of a run, what the process itself takes aside.
pub(super) fn estimate(facts: &Facts<'_>) -> Result<Memory, ModelError> {
    let held = Footprint::held_by(facts.source, trainer::components(facts.recipe))?;
    let weights = |(name, numbers): (&&str, &u64)| {
        part(&format!("weights of the {name}"), facts.bytes_per_weight(name) * numbers)
    };
    let weights: Vec<Part> = held.iter().map(weights).collect();
    let mut phases = vec![Phase::new("preparing the data", &weights, facts.preparation()?)];
    if facts.recipe.task.stage() == Stage::DataProcess {
        return Ok(Memory { phases });
    }
    let ahead = part("batches read ahead", facts.ahead_bytes());
    let state = weights.into_iter().chain(facts.data()).chain([ahead]).chain(facts.state());
    let state: Vec<Part> = state.collect();
    let step = vec![
        part("gradients", F32 * facts.gradients()),
        part("activations", F32 * facts.activations()?),
        part("frozen weights as f32", facts.widened_bytes(&held)),
    ];
    phases.push(Phase::new("a training step", &state, step));
    let copy = part("a copy of weights, optimiser and averages", facts.checkpoint_bytes());
    phases.push(Phase::new("saving a checkpoint", &state, vec![copy]));
    if facts.recipe.sample_steps > 0 {
        phases.push(Phase::new("drawing samples", &state, facts.sampling()?));
    }
    let result = facts.result(&held);
    phases.push(Phase::new("writing the result", &state, result));
    Ok(Memory { phases })
}

impl Facts<'_> {
    fn is_lora(&self) -> bool {
        self.recipe.lora_base_model.is_some()
    }

    fn averages(&self) -> bool {
        self.recipe.ema_decay > 0.0
    }

    fn trains_text_encoder(&self) -> bool {
        self.model.text_encoder_names().iter().any(|encoder| self.learns(encoder))
    }

    /// Whether all of a component learns.
    fn learns(&self, component: &str) -> bool {
        let mut named =
            self.recipe.trainable_models.iter().map(|name| trainable::component(name, self.model));
        !self.is_lora() && named.any(|name| name == component)
    }

    /// What training adds to the model and keeps from step to step.
    fn state(&self) -> Vec<Part> {
        let of_trained = |name: &str, times: u64| part(name, F32 * times * self.trained);
        let mut parts = vec![
            of_trained("adapters", u64::from(self.is_lora())),
            part("the optimiser's state", self.optimizer_bytes()),
            of_trained("averaged weights", u64::from(self.averages())),
        ];
        // A full student moves away from the weights that its teacher keeps.
        let copied = self.recipe.online_teacher && !self.is_lora();
        parts.push(of_trained("the online teacher's own weights", u64::from(copied)));
        parts
    }

    /// The sum over evaluations, where there are several, and those that are being added to it: on the CPU each is when it
    /// is made.
    fn gradients(&self) -> u64 {
        if self.recipe.device == DeviceName::Cpu {
            return self.trained;
        }
        let several = self.student_steps() > 1 || self.recipe.gradient_accumulation_steps > 1;
        if several { 2 * self.trained } else { self.trained }
    }

    /// The most student steps of a batch; 1 where nothing is distilled.
    pub(super) fn student_steps(&self) -> usize {
        match self.recipe.task.objective() {
            Objective::FlowMatching => 1,
            Objective::Distillation => {
                self.data.batches.iter().map(|bucket| bucket.num_inference_steps).max().unwrap_or(1)
            }
        }
    }

    /// Devices other than the CPU multiply with copies of frozen weights of two bytes, and keep them for the backward where
    /// blocks are not computed again.
    fn widened_bytes(&self, held: &BTreeMap<&str, u64>) -> u64 {
        let denoiser = self.model.denoiser_name();
        let is_widened = self.recipe.device != DeviceName::Cpu && self.bytes_per_weight(denoiser) < F32;
        match is_widened && !self.recipe.checkpoints_gradients() {
            true => F32 * held.get(denoiser).copied().unwrap_or(0),
            false => 0,
        }
    }

    fn optimizer_bytes(&self) -> u64 {
        optimizer_bytes(self.recipe, self.trained)
    }

    fn checkpoint_bytes(&self) -> u64 {
        F32 * self.trained * (1 + u64::from(self.averages())) + self.optimizer_bytes()
    }

    fn bytes_per_weight(&self, component: &str) -> u64 {
        Footprint::bytes_per_weight(component, self.recipe.dtype.into(), self.learns(component))
    }

    /// Numbers of the largest evaluation with its graph, and of the graphs that are kept beside it.
    fn activations(&self) -> Result<u64, ModelError> {
        let mut largest = 0;
        for bucket in &self.data.batches {
            largest = largest.max(self.activations_of(bucket)?);
        }
        Ok(largest)
    }

    fn activations_of(&self, bucket: &Bucket) -> Result<u64, ModelError> {
        let footprint = self.footprint(bucket, bucket.largest_batch)?;
        let guided = bucket.cfg_scale != 1.0 && self.recipe.student_guidance == StudentGuidance::Apply;
        let evaluations = if guided { 2 } else { 1 };
        let text = match self.trains_text_encoder() {
            true => self
                .text_numbers(bucket.largest_batch, Footprint::of_encoding(self.source)?.per_token_training),
            false => 0,
        };
        let kept = match self.recipe.task.objective() {
            Objective::FlowMatching => KeptSteps { recorded: 1, remembered: 0 },
            Objective::Distillation => self.recipe.kept_steps().among(bucket.num_inference_steps),
        };
        let checkpointed = self.recipe.checkpoints_gradients();
        Ok(footprint.activations.of_training(checkpointed, kept, evaluations) + text)
    }

    fn footprint(&self, bucket: &Bucket, batch_size: usize) -> Result<Footprint, ModelError> {
        footprint(self.recipe, self.source, self.data, (bucket, batch_size))
    }

    /// Numbers held for prompts that are encoded together, by those for one token.
    fn text_numbers(&self, prompts: usize, per_token: u64) -> u64 {
        (prompts * (self.data.longest_prompt_tokens + self.data.dropped_tokens)) as u64 * per_token
    }

    /// What is encoded and small enough to stay in memory; the rest is read from files when a batch needs it.
    fn data(&self) -> Vec<Part> {
        let text = if self.trains_text_encoder() { 0 } else { self.data.encoded_text_states };
        let most = (self.recipe.dataset_memory_mib as u64) << 20;
        let kept = |numbers: u64| Some(F32 * numbers).filter(|bytes| *bytes <= most).unwrap_or(0);
        vec![
            part("latents of the data", kept(self.data.encoded_latents)),
            part("text states of the data", kept(text)),
        ]
    }

    /// Readings at once: two per worker, and the one in use.
    fn readings(&self) -> u64 {
        2 * self.recipe.dataset_num_workers as u64 + 1
    }

    /// Batches of average rows that wait for their step.
    fn ahead_bytes(&self) -> u64 {
        let [pictures, prompts] = [self.data.pictures, self.data.prompts].map(|count| count.max(1) as u64);
        let row = self.data.latents / pictures + self.data.text_states / prompts;
        let largest = self.data.batches.iter().map(|bucket| bucket.largest_batch).max().unwrap_or(0);
        let batches: u64 = self.data.batches.iter().map(|bucket| bucket.batches as u64).sum();
        F32 * row * largest as u64 * self.readings().min(batches)
    }

    /// The data, and what its encoding holds beside it.
    fn preparation(&self) -> Result<Vec<Part>, ModelError> {
        let mut parts = self.data();
        if self.recipe.task.stage() == Stage::Train {
            return Ok(parts);
        }
        let Encoding { per_token, per_pixel, .. } = Footprint::of_encoding(self.source)?;
        let prompts = self.data.encoded_prompts.min(tables::PROMPTS_PER_BATCH);
        let pictures = (self.data.pictures - self.data.stored_latents) as u64;
        let pixels = self.data.largest_encoded;
        let encoding =
            self.text_numbers(prompts, per_token).max(pictures.min(1) * self.data.largest_chunk * per_pixel);
        let waiting = pictures.min(self.readings()) * 3 * pixels;
        parts.push(part("pictures waiting to be encoded", F32 * waiting));
        parts.push(part("activations of text encoder or autoencoder", F32 * encoding));
        Ok(parts)
    }

    /// A batch of samples with guidance, drawn by averaged weights where there are any.
    fn sampling(&self) -> Result<Vec<Part>, ModelError> {
        let mut drawing = 0;
        if let Some(bucket) = self.data.batches.first() {
            drawing = self.footprint(bucket, samples::BATCH)?.activations.drawing;
        }
        let averaged = if self.averages() { self.trained } else { 0 };
        Ok(vec![
            part("a model of averaged weights", F32 * averaged),
            part("activations of drawing", F32 * drawing),
        ])
    }

    /// The largest file in the making.
    fn result(&self, held: &BTreeMap<&'static str, u64>) -> Vec<Part> {
        let averaged = if self.averages() { self.trained } else { 0 };
        let largest = match self.is_lora() {
            true => F32 * self.trained,
            false => {
                WeightType::from(self.recipe.output_dtype).bytes() as u64
                    * held.values().copied().max().unwrap_or(0)
            }
        };
        vec![part("a model of averaged weights", F32 * averaged), part("a file in the making", largest)]
    }
}

/// The footprint of a batch of a recipe's.
pub(super) fn footprint(
    recipe: &Recipe,
    source: &ModelSource,
    data: &DataOutline,
    (bucket, batch_size): (&Bucket, usize),
) -> Result<Footprint, ModelError> {
    let workload = Workload {
        height: bucket.height,
        width: bucket.width,
        frames: bucket.num_frames,
        batch_size,
        text_tokens: data.longest_prompt_tokens,
        lora_rank: recipe.lora_base_model.as_ref().map(|_| recipe.lora_rank),
        components: trainer::components(recipe),
        on_cpu: recipe.device == DeviceName::Cpu,
    };
    Footprint::of(source, &workload)
}

fn part(name: &str, bytes: u64) -> Part {
    Part { name: name.to_owned(), bytes }
}

/// Bytes of an optimiser's state for so many trained numbers; docs/training.md has them per number.
pub(super) fn optimizer_bytes(recipe: &Recipe, trained: u64) -> u64 {
    match recipe.optimizer {
        OptimizerName::Adamw => 8 * trained,
        // A code for each moment, and a scale for each block of them.
        OptimizerName::Adamw8bit => 2 * trained + 2 * F32 * trained / BLOCK,
        // A sum for each row and column.
        OptimizerName::Adafactor => 0,
        OptimizerName::Prodigy => 16 * trained,
        OptimizerName::Muon => F32 * trained,
    }
}

/// Numbers that share a scale in 8-bit state.
const BLOCK: u64 = 256;
