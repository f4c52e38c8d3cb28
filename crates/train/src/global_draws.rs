//! torch's global generator followed through a run, for runs that draw what a peer draws.
//!
//! The peer seeds nothing itself; a run here is what its script does when the generator is seeded just before the data
//! loader is made. Each epoch draws its order; then, in flow matching, each item draws an initial noise that nothing
//! uses (unless its row has a seed, or another process has done that part of the work), level and noise.

use fewstep_flow::noise::{NoiseType, TorchGenerator};
use fewstep_models::WeightType;

use crate::dataset::Group;
use crate::method::TRAINING_LEVELS;
use crate::recipe::{Objective, Recipe, Stage};

/// The generator and where in the run it stands.
pub(crate) struct GlobalDraws {
    generator: TorchGenerator,
    shuffle: bool,
    /// Numbers of each position's noise; empty where items draw none.
    elements: Vec<usize>,
    dtype: NoiseType,
    /// Whether items draw the initial noise of a picture too.
    initial_noise: bool,
    /// Epochs whose order is drawn.
    epochs: u64,
    /// Items of the last of them whose numbers are drawn.
    items: usize,
    order: Vec<usize>,
}

impl GlobalDraws {
    /// The generator at the start of a run over groups of rows.
    pub(crate) fn new(recipe: &Recipe, groups: &[Group]) -> Self {
        let draws_noise = recipe.task.objective() == Objective::FlowMatching;
        let positions = if draws_noise { groups.len() * recipe.dataset_repeat } else { 0 };
        let elements = groups.iter().cycle().take(positions).map(|group| group.latent_shape.iter().product());
        Self {
            // The wrapper around the peer's script that the goldens were made with seeds weights with the seed itself.
            generator: TorchGenerator::new(recipe.seed.wrapping_add(1)),
            shuffle: recipe.shuffle,
            elements: elements.collect(),
            dtype: WeightType::from(recipe.dtype).into(),
            initial_noise: recipe.task.stage() == Stage::Whole
                && !recipe.extra_inputs().any(|name| name == "seed"),
            epochs: 0,
            items: 0,
            order: Vec::new(),
        }
    }

    /// The order of an epoch, counted from 0. A later epoch follows all items of those before it.
    ///
    /// # Panics
    /// When asked for an epoch before the last one asked for.
    pub(crate) fn order(&mut self, epoch: u64, positions: usize) -> &[usize] {
        assert!(epoch + 1 >= self.epochs, "epoch {epoch} asked for after epoch {}", self.epochs);
        while self.epochs <= epoch {
            self.skip_to(self.order.len());
            self.order = match self.shuffle {
                true => self.generator.loader_order(positions),
                false => {
                    self.generator.random_int64();
                    (0..positions).collect()
                }
            };
            (self.epochs, self.items) = (self.epochs + 1, 0);
        }
        &self.order
    }

    /// The generator before the `item`-th item of the epoch draws level and noise; `None` where items draw nothing.
    pub(crate) fn at_item(&mut self, item: usize) -> Option<TorchGenerator> {
        self.skip_to(item);
        let elements = *self.elements.get(*self.order.get(item)?)?;
        let mut generator = self.generator.clone();
        if self.initial_noise {
            generator.randn_as(elements, self.dtype);
        }
        Some(generator)
    }

    fn skip_to(&mut self, item: usize) {
        assert!(self.items <= item, "item {item} asked for after item {}", self.items);
        for at in self.items..item {
            if let Some(mut generator) = self.at_item(at) {
                generator.randint(0, TRAINING_LEVELS as i64, 1);
                generator.randn_as(self.elements[self.order[at]], self.dtype);
                self.generator = generator;
            }
            self.items = at + 1;
        }
    }
}
