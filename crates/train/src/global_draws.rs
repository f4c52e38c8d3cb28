//! torch's global generator followed through a run, for runs that draw what a peer draws.
//!
//! The peer seeds nothing itself; a run here is what its script does when the generator is seeded just before the data
//! loader is made. Each epoch draws its order; then, in flow matching, each item draws level and noise.

use fewstep_flow::noise::TorchGenerator;

use crate::method::TRAINING_LEVELS;

/// The generator and where in the run it stands.
pub(crate) struct GlobalDraws {
    generator: TorchGenerator,
    shuffle: bool,
    /// Epochs whose order is drawn.
    epochs: u64,
    /// Items of the last of them whose numbers are drawn.
    items: usize,
    order: Vec<usize>,
}

impl GlobalDraws {
    /// The generator at the start of a run.
    pub(crate) fn new(seed: u64, shuffle: bool) -> Self {
        // The wrapper around the peer's script that the goldens were made with seeds this one higher than the weights.
        let generator = TorchGenerator::new(seed.wrapping_add(1));
        Self { generator, shuffle, epochs: 0, items: 0, order: Vec::new() }
    }

    /// The order of an epoch, counted from 0. `elements` are the latents' numbers per item that draws noise, by
    /// position; empty where items draw none. A later epoch follows all items of those before it.
    ///
    /// # Panics
    /// When asked for an epoch before the last one asked for.
    pub(crate) fn order(&mut self, epoch: u64, positions: usize, elements: &[usize]) -> &[usize] {
        assert!(epoch + 1 >= self.epochs, "epoch {epoch} asked for after epoch {}", self.epochs);
        while self.epochs <= epoch {
            self.skip_to(self.order.len(), elements);
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

    /// The generator as the `item`-th item of the epoch finds it.
    pub(crate) fn at_item(&mut self, item: usize, elements: &[usize]) -> TorchGenerator {
        self.skip_to(item, elements);
        self.generator.clone()
    }

    fn skip_to(&mut self, item: usize, elements: &[usize]) {
        assert!(self.items <= item, "item {item} asked for after item {}", self.items);
        if !elements.is_empty() {
            for position in &self.order[self.items..item] {
                self.generator.randint(0, TRAINING_LEVELS as i64, 1);
                self.generator.randn(elements[*position]);
            }
        }
        self.items = item;
    }
}
