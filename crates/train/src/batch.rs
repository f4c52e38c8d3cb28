//! Which rows a step sees: a pure function of seed, epoch and step, so that a resumed run sees what it would have seen.

use burn::tensor::Tensor;
use fewstep_data::buckets;
use fewstep_models::{Condition, Model};

use crate::TrainError;
use crate::dataset::{Dataset, EMPTY_PROMPT, Group};
use crate::random::{Draw, Purpose};
use crate::recipe::Recipe;

/// The order of the data through a run.
pub(crate) struct Plan {
    seed: u64,
    groups: Vec<Group>,
    repeat: usize,
    batch_size: usize,
    batches_per_step: usize,
    /// Optimiser steps of one epoch; the last may hold fewer batches.
    pub(crate) steps_per_epoch: u64,
    /// The epoch laid out last, with its batches.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl Plan {
    /// Lays out a recipe's batches over a data set.
    pub(crate) fn new(recipe: &Recipe, data: &Dataset) -> Self {
        let mut plan = Self {
            seed: recipe.seed,
            groups: data.samples.iter().map(|sample| sample.group).collect(),
            repeat: recipe.dataset_repeat,
            batch_size: recipe.batch_size,
            batches_per_step: recipe.gradient_accumulation_steps,
            steps_per_epoch: 0,
            epoch: None,
        };
        // The same in every epoch: how many batches a size gives does not depend on the order.
        plan.steps_per_epoch = plan.lay_out(0).len().div_ceil(plan.batches_per_step) as u64;
        plan
    }

    /// Epoch of an optimiser step, counted from 0.
    pub(crate) fn epoch_of(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// The batches of an optimiser step, counted from 0.
    pub(crate) fn step(&mut self, step: u64) -> Vec<Vec<usize>> {
        let epoch = self.epoch_of(step);
        if self.epoch.as_ref().is_none_or(|(laid_out, _)| *laid_out != epoch) {
            self.epoch = Some((epoch, self.lay_out(epoch)));
        }
        let batches = &self.epoch.as_ref().expect("laid out above").1;
        let first = (step % self.steps_per_epoch) as usize * self.batches_per_step;
        batches[first..batches.len().min(first + self.batches_per_step)].to_vec()
    }

    /// Shuffles an epoch. Positions past the number of rows are further passes over the rows.
    fn lay_out(&self, epoch: u64) -> Vec<Vec<usize>> {
        let positions = self.groups.len() * self.repeat;
        let order = Draw { seed: self.seed, epoch, row: 0 }.generator(Purpose::Order).randperm(positions);
        let groups: Vec<Group> = self.groups.iter().cycle().take(positions).copied().collect();
        buckets::batches(&groups, &order, self.batch_size)
    }
}

/// Rows of one group, to go through the network together.
pub struct Batch<'a> {
    /// The data set.
    pub(crate) data: &'a Dataset,
    /// Positions in the epoch: row + pass · number of rows.
    pub(crate) positions: &'a [usize],
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Epoch, counted from 0.
    pub(crate) epoch: u64,
}

impl Batch<'_> {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// What all samples agree in.
    pub fn group(&self) -> Group {
        self.data.samples[self.rows()[0]].group
    }

    /// Stored latents, `[B, C, H, W]`.
    pub fn latents(&self) -> Tensor<4> {
        self.data.latents(&self.rows())
    }

    /// Text states of the prompts; those of samples marked in `dropped` are the empty prompt's.
    ///
    /// # Errors
    /// If a prompt cannot be encoded.
    pub fn condition(&self, model: &Model, dropped: &[bool]) -> Result<Condition, TrainError> {
        let prompt = |(row, dropped): (&usize, &bool)| match dropped {
            true => EMPTY_PROMPT,
            false => self.data.samples[*row].prompt,
        };
        let prompts: Vec<usize> = self.rows().iter().zip(dropped).map(prompt).collect();
        self.data.condition(model, &prompts)
    }

    /// Where each sample's random numbers are drawn.
    pub(crate) fn draws(&self) -> Vec<Draw> {
        self.positions
            .iter()
            .map(|row| Draw { seed: self.seed, epoch: self.epoch, row: *row as u64 })
            .collect()
    }

    /// Seeds of the initial noise: the rows' own, or fresh ones in every epoch.
    pub fn noise_seeds(&self) -> Vec<u64> {
        let fresh = |draw: Draw| draw.seed(Purpose::Picture);
        let own = self.rows().into_iter().map(|row| self.data.samples[row].noise_seed);
        own.zip(self.draws()).map(|(own, draw)| own.unwrap_or_else(|| fresh(draw))).collect()
    }

    fn rows(&self) -> Vec<usize> {
        self.positions.iter().map(|position| position % self.data.len()).collect()
    }
}
