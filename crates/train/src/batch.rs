//! Which rows a step sees: a pure function of seed, epoch and step, so that a resumed run sees what it would have seen.
//! And rows that go through the network together, once what they need has been read.

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::buckets;
use fewstep_flow::noise::{NoiseSource, NoiseType, TorchGenerator};
use fewstep_models::sampling::Guidance;
use fewstep_models::{Condition, Model};

use crate::TrainError;
use crate::dataset::{Dataset, EMPTY_PROMPT, Group, Sample};
use crate::global_draws::GlobalDraws;
use crate::host::HostTensor;
use crate::random::{Draw, Purpose};
use crate::recipe::{RandomNumbers, Recipe};

/// The order of the data through a run.
pub(crate) struct Plan {
    seed: u64,
    shuffle: bool,
    groups: Vec<Group>,
    repeat: usize,
    batch_size: usize,
    batches_per_step: usize,
    /// Optimiser steps of one epoch; the last may hold fewer batches.
    pub(crate) steps_per_epoch: u64,
    /// Where the run draws from one generator.
    global: Option<GlobalDraws>,
    /// The epoch laid out last, with its batches.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

/// One forward pass to come.
#[derive(Clone)]
pub(crate) struct Planned {
    /// Its optimiser step, counted from 0.
    pub(crate) step: u64,
    /// Epoch of that, counted from 0.
    pub(crate) epoch: u64,
    /// Positions in the epoch: row + pass · number of rows.
    pub(crate) positions: Vec<usize>,
    /// The generators of their level and noise; `None` where each position has its own.
    pub(crate) generators: Option<Vec<TorchGenerator>>,
}

impl Plan {
    /// Lays out a recipe's batches over a data set.
    pub(crate) fn new(recipe: &Recipe, data: &Dataset) -> Self {
        Self::of_groups(recipe, data.samples.iter().map(|sample| sample.group).collect())
    }

    /// Lays out a recipe's batches over rows, of which only the groups are known.
    pub(crate) fn of_groups(recipe: &Recipe, groups: Vec<Group>) -> Self {
        let global = recipe.random_numbers == RandomNumbers::TorchGlobal;
        let mut plan = Self {
            seed: recipe.seed,
            shuffle: recipe.shuffle,
            repeat: recipe.dataset_repeat,
            batch_size: recipe.batch_size,
            batches_per_step: recipe.gradient_accumulation_steps,
            steps_per_epoch: 0,
            global: global.then(|| GlobalDraws::new(recipe, &groups)),
            groups,
            epoch: None,
        };
        // The same in every epoch: how many batches a size gives does not depend on the order.
        let batches = plan.batches(&(0..plan.positions()).collect::<Vec<_>>());
        plan.steps_per_epoch = batches.len().div_ceil(plan.batches_per_step) as u64;
        plan
    }

    /// Optimiser steps of the whole run.
    pub(crate) fn total_steps(&self, recipe: &Recipe) -> u64 {
        recipe.max_steps.unwrap_or(recipe.num_epochs as u64 * self.steps_per_epoch)
    }

    /// Epoch of an optimiser step, counted from 0.
    pub(crate) fn epoch_of(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// The batches of an optimiser step, counted from 0. Where the run draws from one generator, steps must be asked
    /// for in their order; some may be left out.
    pub(crate) fn step(&mut self, step: u64) -> Vec<Planned> {
        let epoch = self.epoch_of(step);
        if self.epoch.as_ref().is_none_or(|(laid_out, _)| *laid_out != epoch) {
            let order = self.order(epoch);
            self.epoch = Some((epoch, self.batches(&order)));
        }
        let batches = &self.epoch.as_ref().expect("laid out above").1;
        let first = (step % self.steps_per_epoch) as usize * self.batches_per_step;
        let mut item: usize = batches[..first].iter().map(Vec::len).sum();
        let due = batches[first..batches.len().min(first + self.batches_per_step)].to_vec();
        let mut planned = Vec::new();
        for positions in due {
            let items = item..item + positions.len();
            item = items.end;
            planned.push(Planned { step, epoch, generators: self.generators(items), positions });
        }
        planned
    }

    fn generators(&mut self, items: std::ops::Range<usize>) -> Option<Vec<TorchGenerator>> {
        let global = self.global.as_mut()?;
        items.map(|item| global.at_item(item)).collect()
    }

    fn positions(&self) -> usize {
        self.groups.len() * self.repeat
    }

    fn order(&mut self, epoch: u64) -> Vec<usize> {
        let positions = self.positions();
        match &mut self.global {
            Some(global) => global.order(epoch, positions).to_vec(),
            None if !self.shuffle => (0..positions).collect(),
            None => Draw { seed: self.seed, epoch, row: 0 }.generator(Purpose::Order).randperm(positions),
        }
    }

    /// Positions past the number of rows are further passes over the rows.
    fn batches(&self, order: &[usize]) -> Vec<Vec<usize>> {
        let groups: Vec<Group> = self.groups.iter().cycle().take(order.len()).copied().collect();
        buckets::batches(&groups, order, self.batch_size)
    }
}

/// Rows of one group, to go through the network together.
pub struct Batch<'a> {
    data: &'a Dataset,
    planned: Planned,
    /// Seed of the run.
    seed: u64,
    /// Latents `[C, H, W]` of each row; none with an online teacher.
    latents: Vec<HostTensor>,
    /// Text states `[S, J]` of each row and, last, of the empty prompt; none where prompts are encoded in each step.
    texts: Vec<HostTensor>,
    /// Pooled states `[P]` of the same; none where the model has none.
    pooled: Vec<HostTensor>,
}

impl<'a> Batch<'a> {
    /// A batch of what the data set's [`Dataset::reading`] of its positions has read.
    pub(crate) fn new(data: &'a Dataset, planned: Planned, seed: u64, read: Vec<HostTensor>) -> Self {
        let mut latents = read;
        let mut texts = latents.split_off(data.pictures(&planned.positions));
        let pooled = texts.split_off(texts.len().min(planned.positions.len() + 1));
        Self { data, planned, seed, latents, texts, pooled }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.planned.positions.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.planned.positions.is_empty()
    }

    /// What all samples agree in.
    pub fn group(&self) -> Group {
        self.sample(0).group
    }

    /// Stored latents, `[B, C, H, W]`.
    pub fn latents(&self) -> Tensor<4> {
        assert_eq!(self.latents.len(), self.len(), "only rows of an online teacher have no latents");
        let [channels, height, width] = self.group().latent_shape;
        let values = self.latents.iter().flat_map(|latents| &latents.values).copied().collect();
        let data = TensorData::new::<f32, _>(values, [self.len(), channels, height, width]);
        Tensor::from_data(data, self.data.device())
    }

    /// Text states of the prompts; those of samples marked in `dropped` are the empty prompt's.
    ///
    /// They are computed by `model`, with a graph if it has one, where they are not stored.
    ///
    /// # Errors
    /// If a prompt cannot be encoded.
    pub fn condition(&self, model: &Model, dropped: &[bool]) -> Result<Condition, TrainError> {
        let group = self.group();
        let told = |condition: Condition| {
            condition.with_embedded_guidance(group.embedded_guidance()).with_frames(group.extent.frames)
        };
        let rows = dropped.iter().enumerate();
        let Some(empty) = self.texts.len().checked_sub(1) else {
            let prompts =
                rows.map(|(row, dropped)| if *dropped { EMPTY_PROMPT } else { self.sample(row).prompt });
            let texts: Vec<String> = prompts.map(|prompt| self.data.prompts()[prompt].clone()).collect();
            return Ok(told(model.encode_prompts(&texts)?));
        };
        let chosen: Vec<usize> = rows.map(|(row, dropped)| if *dropped { empty } else { row }).collect();
        let texts: Vec<&HostTensor> = chosen.iter().map(|row| &self.texts[*row]).collect();
        let condition = told(padded(&texts, self.data.device()));
        if self.pooled.is_empty() {
            return Ok(condition);
        }
        let width = self.pooled[empty].values.len();
        let values = chosen.iter().flat_map(|row| &self.pooled[*row].values).copied().collect();
        let data = TensorData::new::<f32, _>(values, [chosen.len(), width]);
        Ok(condition.with_pooled(Tensor::from_data(data, self.data.device())))
    }

    /// The prompts, and where `cfg_scale` is on the empty prompt against them.
    ///
    /// # Errors
    /// If a prompt cannot be encoded.
    pub fn guidance(&self, model: &Model, cfg_scale: f32) -> Result<Guidance, TrainError> {
        let all = |dropped| self.condition(model, &vec![dropped; self.len()]);
        let unconditional = if cfg_scale == 1.0 { None } else { Some(all(true)?) };
        Ok(Guidance { condition: all(false)?, unconditional, cfg_scale })
    }

    /// The generators that each sample's level, dropout and noise are drawn from.
    pub(crate) fn generators(&self) -> Vec<TorchGenerator> {
        let own = || self.draws().into_iter().map(|draw| draw.generator(Purpose::Sample)).collect();
        self.planned.generators.clone().unwrap_or_else(own)
    }

    /// Where each sample's random numbers are drawn.
    fn draws(&self) -> Vec<Draw> {
        let draw =
            |position: &usize| Draw { seed: self.seed, epoch: self.planned.epoch, row: *position as u64 };
        self.planned.positions.iter().map(draw).collect()
    }

    /// The noise that pictures start from, `[B, C, H, W]`: the rows' own, or fresh in every epoch.
    pub fn initial_noise(&self, dtype: NoiseType) -> Tensor<4> {
        let [channels, height, width] = self.group().latent_shape;
        let shape = [1, channels, height, width];
        let draw = |(row, draw): (usize, Draw)| {
            let sample = self.sample(row);
            let seed = sample.noise_seed.unwrap_or_else(|| draw.seed(Purpose::Picture));
            let source = NoiseSource { rand_device: sample.rand_device, dtype };
            source.latent_noise(seed, shape, self.data.device())
        };
        Tensor::cat(self.draws().into_iter().enumerate().map(draw).collect(), 0)
    }

    /// The row of each sample.
    pub(crate) fn rows(&self) -> Vec<usize> {
        self.planned.positions.iter().map(|position| position % self.data.len()).collect()
    }

    fn sample(&self, row: usize) -> &Sample {
        self.data.sample_at(self.planned.positions[row])
    }
}

/// Text states `[S, J]` as one condition, with zeros after the shorter ones.
fn padded(texts: &[&HostTensor], device: &Device) -> Condition {
    let lengths: Vec<usize> = texts.iter().map(|text| text.shape[0]).collect();
    let (longest, width) = (lengths.iter().max().copied().unwrap_or(0), texts[0].shape[1]);
    let mut values = vec![0.0f32; texts.len() * longest * width];
    for (row, text) in texts.iter().enumerate() {
        values[row * longest * width..][..text.values.len()].copy_from_slice(&text.values);
    }
    let data = TensorData::new(values, [texts.len(), longest, width]);
    Condition::new(Tensor::from_data(data, device), lengths)
}
