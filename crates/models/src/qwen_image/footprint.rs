//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].
//!
//! D is the width, K the heads, E the head dim, N and S the image and text tokens, T = N + S, L the blocks, r the rank
//! of the adapters.

use std::collections::BTreeMap;

use super::config::TransformerConfig;
use super::latents::PATCH;
use super::transformer::TIME_FEATURES;
use super::vae::VaeConfig;
use crate::footprint::{Activations, Flops, Footprint, Workload};
use crate::model::token_grid;
use crate::{ModelError, ModelSource};

/// The footprint of a model.
pub(crate) fn footprint(source: &ModelSource, workload: &Workload) -> Result<Footprint, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let factor = VaeConfig::read(source)?.factor() * PATCH;
    let [rows, columns] = token_grid([workload.height, workload.width], factor)?;
    let size = Size {
        batch: workload.batch_size as u64,
        image: (rows * columns) as u64,
        text: workload.text_tokens as u64,
        rank: workload.lora_rank.map(|rank| rank as u64),
    };
    let count = |shape: &Vec<usize>| shape.iter().product::<usize>() as u64;
    let tensors = super::expected_tensors(source)?.into_iter();
    let mut parameters: BTreeMap<&str, u64> =
        tensors.map(|(component, shapes)| (component, shapes.values().map(count).sum())).collect();
    parameters.retain(|_, count| *count > 0);
    Ok(Footprint {
        image_tokens: rows * columns,
        trained: size.rank.map_or(parameters[super::DENOISER], |rank| transformer.adapters(rank)),
        parameters,
        activations: size.activations(&transformer),
        flops: size.flops(&transformer),
    })
}

/// Sizes of a batch.
struct Size {
    batch: u64,
    /// N.
    image: u64,
    /// S.
    text: u64,
    /// Rank of the adapters that learn; `None` where all weights do.
    rank: Option<u64>,
}

impl Size {
    /// What the operations of `fewstep_kernels` keep for their backward, and what is alive beside it.
    fn activations(&self, config: &TransformerConfig) -> Activations {
        let (width, blocks) = (config.width(), config.num_layers as u64);
        let tokens = self.image + self.text;
        // The inputs of both norms (2), of the projections to query, key and value (1), their output (3), the joined
        // query, key and value (3), the attention's output before and after its projection (2), the inputs of the
        // MLP's two projections (1 + 4), of its activation (4), and its output (1), in D numbers per token. A frozen
        // projection keeps no input: of those without an adapter that is the MLP's first.
        let (per_token, per_rank) = match self.rank {
            None => (21, 0),
            Some(rank) => (20, 5 * rank),
        };
        let heads = config.num_attention_heads as u64;
        // Two modulation vectors of six chunks each.
        let block = tokens * (per_token * width + per_rank + heads) + 12 * width;
        // Backward through the wider stream's activation: gradients of its output and input, and of the residual.
        let backward = 10 * self.image.max(self.text) * width;
        // Streams and the joined query, key and value beside their projections, or the MLP's hidden tokens before and
        // after the activation.
        let drawing = (7 * tokens).max(2 * tokens + 8 * self.image.max(self.text)) * width;
        Activations {
            drawing: self.batch * drawing,
            training: self.batch * (blocks * block + backward),
            checkpointed: self.batch * (blocks * tokens * width + block + backward),
        }
    }

    /// The matrix products; everything else is small against them.
    fn flops(&self, config: &TransformerConfig) -> Flops {
        let (width, blocks) = (config.width(), config.num_layers as u64);
        let tokens = self.image + self.text;
        let [input, joint] = [config.in_channels, config.joint_attention_dim].map(|size| size as u64);
        // Per token four projections and the MLP's two of four times the width; per sample two modulations.
        let block = tokens * 12 * width * width + 12 * width * width;
        let ends = 2 * self.image * input * width + self.text * joint * width;
        let time = TIME_FEATURES as u64 * width + 3 * width * width;
        // Scores, and their product with the values.
        let attention = 2 * tokens * tokens * width * blocks;
        let weights = blocks * block + ends + time;
        // Each product is undone by one for its input and, where the weight learns, one for the weight; an adapter's
        // are small. Attention computes its scores again and has four more products.
        let by_weights = if self.rank.is_some() { weights } else { 2 * weights };
        let flops = |products: u64| 2 * self.batch * products;
        Flops { forward: flops(weights + attention), backward: flops(by_weights + 5 * attention / 2) }
    }
}

impl TransformerConfig {
    /// D.
    fn width(&self) -> u64 {
        (self.num_attention_heads * self.attention_head_dim) as u64
    }

    /// Parameters of adapters on [`super::LORA_TARGETS`].
    fn adapters(&self, rank: u64) -> u64 {
        let width = self.width();
        let ends_of_layers = 8 * (width + width) + 2 * (width + 6 * width) + 2 * (4 * width + width);
        self.num_layers as u64 * rank * ends_of_layers
    }
}
