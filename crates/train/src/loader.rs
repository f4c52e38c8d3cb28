//! The batches of a run in their order, read ahead of the step that needs them.

use std::collections::VecDeque;

use crate::TrainError;
use crate::batch::{Batch, Plan, Planned};
use crate::dataset::Dataset;
use crate::recipe::Recipe;
use crate::workers::Workers;

/// Lays out steps and has their batches read.
pub(crate) struct Loader<'a> {
    recipe: &'a Recipe,
    /// The order of the data.
    pub(crate) plan: Plan,
    /// Optimiser steps of the whole run.
    pub(crate) total_steps: u64,
    workers: Workers,
    /// The step that comes after the one begun last.
    next_step: u64,
    /// Batches of the one begun last that are not taken.
    left: usize,
    /// The next step to lay out.
    ahead: u64,
    /// Batches that are being read, oldest first.
    asked: VecDeque<Planned>,
    /// Batches laid out after them.
    planned: VecDeque<Planned>,
}

impl<'a> Loader<'a> {
    /// A loader that stands before the first step.
    pub(crate) fn new(recipe: &'a Recipe, data: &Dataset) -> Self {
        let plan = Plan::new(recipe, data);
        Self {
            recipe,
            total_steps: recipe.max_steps.unwrap_or(recipe.num_epochs as u64 * plan.steps_per_epoch),
            plan,
            workers: Workers::new(recipe.dataset_num_workers),
            next_step: 0,
            left: 0,
            ahead: 0,
            asked: VecDeque::new(),
            planned: VecDeque::new(),
        }
    }

    /// Turns to an optimiser step, counted from 0; returns how many samples each of its batches has.
    ///
    /// Any step may be begun, so a run may continue anywhere and go back; only the one after the last is read ahead.
    pub(crate) fn begin(&mut self, step: u64, data: &Dataset) -> Vec<usize> {
        if step != self.next_step || self.left > 0 {
            *self = Self { next_step: step, ahead: step, ..Self::new(self.recipe, data) };
        }
        self.read_ahead(data);
        let laid_out = self.asked.iter().chain(&self.planned);
        let sizes: Vec<usize> =
            laid_out.filter(|batch| batch.step == step).map(|batch| batch.positions.len()).collect();
        self.next_step = step + 1;
        self.left = sizes.len();
        sizes
    }

    /// The next batch of the step that was begun.
    ///
    /// # Errors
    /// If something it needs cannot be read.
    ///
    /// # Panics
    /// If all batches of the step have been taken.
    pub(crate) fn next<'d>(&mut self, data: &'d Dataset) -> Result<Batch<'d>, TrainError> {
        assert!(self.left > 0, "step {} has no more batches", self.next_step - 1);
        self.left -= 1;
        let planned = self.asked.pop_front().expect("batches laid out are asked for in their order");
        let read = self.workers.take()?;
        self.read_ahead(data);
        Ok(Batch::new(data, planned, self.recipe.seed, read))
    }

    fn read_ahead(&mut self, data: &Dataset) {
        while self.workers.has_room()
            && let Some(planned) = self.lay_out()
        {
            self.workers.ask(data.reading(&planned.positions));
            self.asked.push_back(planned);
        }
    }

    fn lay_out(&mut self) -> Option<Planned> {
        if self.planned.is_empty() && self.ahead < self.total_steps {
            self.planned.extend(self.plan.step(self.ahead));
            self.ahead += 1;
        }
        self.planned.pop_front()
    }
}
