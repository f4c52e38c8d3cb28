//! What double-stream blocks and their like take, counted off [`super::double_stream`].
//!
//! D is the width, K the heads, N and S the image and text tokens, T = N + S, r the rank of the adapters.

use std::ops::{Add, Mul};

use fewstep_kernels::makes_few_of_many;

use super::double_stream::Heads;
use crate::footprint::{Activations, Flops, Workload};

/// Floating point operations for each pixel of an encoder's 3×3 convolutions: two in each of the residual blocks of a
/// stage, one to half the size between stages of so many channels, and four in the middle.
pub(crate) fn encoder_flops_per_pixel(channels: &[usize], blocks: usize) -> u64 {
    let (mut products, mut inside, mut area) = (0.0, channels[0] as f64, 1.0);
    products += 3.0 * inside;
    for (stage, channels) in channels.iter().map(|channels| *channels as f64).enumerate() {
        if stage > 0 {
            area /= 4.0;
            products += area * inside * inside;
        }
        products += area * (inside + (2 * blocks - 1) as f64 * channels) * channels;
        inside = channels;
    }
    products += area * 4.0 * inside * inside;
    (2.0 * 9.0 * products) as u64
}

/// Sizes of a batch.
pub(crate) struct Batch {
    pub(crate) samples: u64,
    /// N.
    pub(crate) image: u64,
    /// S.
    pub(crate) text: u64,
    /// r; `None` where all weights learn.
    pub(crate) rank: Option<u64>,
    pub(crate) on_cpu: bool,
}

/// Numbers of one sample at the worst moment of an evaluation.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    /// Everything that all blocks keep for their backward.
    pub(crate) kept: u64,
    /// What the largest block keeps.
    pub(crate) largest: u64,
    /// What is passed from block to block.
    pub(crate) passed: u64,
    /// The results inside of all blocks that the CPU keeps where they are computed again: the outputs of attention and of
    /// projections.
    pub(crate) results: u64,
    /// What the CPU remembers from one evaluation to the next.
    pub(crate) remembered: Remembered,
    /// Scores of all attentions.
    pub(crate) scores: u64,
    /// Those of the largest.
    pub(crate) largest_scores: u64,
    /// Beside it in the backward.
    pub(crate) backward: u64,
    /// Without a graph.
    pub(crate) drawing: u64,
}

/// Results of one sample that `fewstep_kernels::Remembered` has, and what they spare.
#[derive(Clone, Copy, Default)]
pub(crate) struct Remembered {
    pub(crate) numbers: u64,
    pub(crate) products: u64,
}

impl Remembered {
    /// Attention of tokens among themselves.
    pub(crate) fn attention(tokens: u64, heads: Heads) -> Self {
        let width = heads.width() as u64;
        Self { numbers: tokens * (width + heads.count as u64), products: 2 * tokens * tokens * width }
    }

    /// A layer; nothing but where it makes few numbers of many.
    pub(crate) fn layer(tokens: u64, [input, output]: [u64; 2]) -> Self {
        match makes_few_of_many([input, output].map(|size| size as usize)) {
            true => Self { numbers: tokens * output, products: tokens * input * output },
            false => Self::default(),
        }
    }
}

impl Add for Remembered {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { numbers: self.numbers + other.numbers, products: self.products + other.products }
    }
}

impl Mul<Remembered> for u64 {
    type Output = Remembered;

    fn mul(self, of_one: Remembered) -> Remembered {
        Remembered { numbers: self * of_one.numbers, products: self * of_one.products }
    }
}

impl Batch {
    /// The batch of a workload whose pictures have so many tokens.
    pub(crate) fn new(workload: &Workload, image_tokens: usize) -> Self {
        Self {
            samples: workload.batch_size as u64,
            image: image_tokens as u64,
            text: workload.text_tokens as u64,
            rank: workload.lora_rank.map(|rank| rank as u64),
            on_cpu: workload.on_cpu,
        }
    }

    /// T.
    pub(crate) fn tokens(&self) -> u64 {
        self.image + self.text
    }

    /// What the operations of `fewstep_kernels` keep of a double-stream block for its backward.
    pub(crate) fn block(&self, heads: Heads) -> u64 {
        let width = heads.width() as u64;
        // The inputs of both norms (2), of the projections to query, key and value (1), their output (3), the joined
        // query, key and value (3), the attention's output before and after its projection (2), the inputs of the
        // MLP's two projections (1 + 4), of its activation (4), and its output (1), in D numbers per token. A frozen
        // projection keeps no input: of those without an adapter that is the MLP's first.
        let (per_token, per_rank) = match self.rank {
            None => (21, 0),
            Some(rank) => (20, 5 * rank),
        };
        // Two modulation vectors of six chunks each.
        self.tokens() * (per_token * width + per_rank + heads.count as u64) + 12 * width
    }

    /// Of [`Batch::block`], what is kept where the block is computed again: query, key and value (3), the attention's output
    /// before and after its projection (2), and what the MLP's projections give (4 + 1), in D numbers per token; the modulations.
    pub(crate) fn block_results(&self, heads: Heads) -> u64 {
        self.tokens() * (10 * heads.width() + heads.count) as u64 + 12 * heads.width() as u64
    }

    /// Of [`Batch::block`], what is remembered: the attention's output, and the MLP's.
    pub(crate) fn block_remembered(&self, heads: Heads) -> Remembered {
        let (tokens, width) = (self.tokens(), heads.width() as u64);
        Remembered::attention(tokens, heads) + Remembered::layer(tokens, [4 * width, width])
    }

    /// The backward through the wider stream's activation: gradients of its output and input, and of the residual.
    pub(crate) fn backward(&self, heads: Heads) -> u64 {
        10 * self.image.max(self.text) * heads.width() as u64
    }

    /// Without a graph: streams and the joined query, key and value beside their projections, or the MLP's hidden tokens
    /// before and after the activation.
    pub(crate) fn drawing(&self, heads: Heads) -> u64 {
        (7 * self.tokens()).max(2 * self.tokens() + 8 * self.image.max(self.text)) * heads.width() as u64
    }

    /// Products of a double-stream block's weights: per token four projections and the MLP's two of four times the width;
    /// per sample two modulations.
    pub(crate) fn block_products(&self, heads: Heads) -> u64 {
        let square = (heads.width() * heads.width()) as u64;
        (self.tokens() + 1) * 12 * square
    }

    /// Products of one attention over all tokens: scores, and their product with the values.
    pub(crate) fn attention_products(&self, heads: Heads) -> u64 {
        2 * self.tokens() * self.tokens() * heads.width() as u64
    }

    /// Scores of one attention over all tokens.
    pub(crate) fn scores(&self, heads: Heads) -> u64 {
        heads.count as u64 * self.tokens() * self.tokens()
    }

    /// Activations of the whole batch.
    pub(crate) fn activations(&self, held: &Held) -> Activations {
        held.activations(self.samples, self.on_cpu)
    }

    /// Operations of the whole batch, by products of weights and of attentions for one sample; everything else is small
    /// against them, what recomputed blocks compute again included.
    pub(crate) fn flops(&self, weights: u64, attention: u64, remembered: Remembered) -> Flops {
        // Each product is undone by one for its input and, where the weight learns, one for the weight; an adapter's
        // are small. Attention computes its scores again and has four more products.
        let by_weights = if self.rank.is_some() { weights } else { 2 * weights };
        let flops = |products: u64| 2 * self.samples * products;
        let forward = flops(weights + attention);
        Flops {
            forward,
            recomputed: if self.on_cpu { 0 } else { forward },
            remembered: if self.on_cpu { flops(remembered.products) } else { 0 },
            backward: flops(by_weights + 5 * attention / 2),
        }
    }
}

/// Matrices as large as an attention's scores that operations of other devices than the CPU keep for its backward, or hold
/// in it. Measured (LOG.md, "What other devices hold"); the CPU's keep none.
const KEPT_SCORES: u64 = 5;

/// The same without a graph: scores, their exponentials and weights.
const DRAWN_SCORES: u64 = 3;

impl Held {
    /// Activations of so many samples.
    pub(crate) fn activations(&self, samples: u64, on_cpu: bool) -> Activations {
        let mut held = *self;
        if !on_cpu {
            held.kept += KEPT_SCORES * held.scores;
            held.largest += KEPT_SCORES * held.largest_scores;
            held.drawing += DRAWN_SCORES * held.largest_scores;
            (held.results, held.remembered) = (0, Remembered::default());
        }
        Activations {
            drawing: samples * held.drawing,
            training: samples * (held.kept + held.backward),
            graph: samples * held.kept,
            checkpointed: samples * (held.passed + held.results + held.largest + held.backward),
            checkpointed_graph: samples * (held.passed + held.results),
            remembered: samples * held.remembered.numbers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoders_convolutions_are_counted_off() {
        // The first convolution, then the stages with what halves the picture before each, then the middle.
        let stages = [65_536, 4096 + 57_344, 4096 + 57_344, 4096 + 16_384];
        let products = 384 + stages.iter().sum::<u64>() + 16_384;
        assert_eq!(encoder_flops_per_pixel(&[128, 256, 512, 512], 2), 18 * products);
    }
}
