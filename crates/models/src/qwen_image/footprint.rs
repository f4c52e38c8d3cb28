//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].
//!
//! D is the width, K the heads, E the head dim, N and S the image and text tokens, T = N + S, L the blocks, r the rank
//! of the adapters.

use std::collections::BTreeMap;

use super::config::{TextEncoderConfig, TransformerConfig};
use super::latents::PATCH;
use super::transformer::TIME_FEATURES;
use super::vae::{Vae, VaeConfig};
use crate::footprint::{Activations, Encoding, Flops, Footprint, Workload};
use crate::model::token_grid;
use crate::{Components, ModelError, ModelSource};

/// The footprint of a model.
pub(crate) fn footprint(source: &ModelSource, workload: &Workload) -> Result<Footprint, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let factor = Vae::absent(source, transformer.out_channels)?.factor() * PATCH;
    let [rows, columns] = token_grid([workload.height, workload.width], factor)?;
    let size = Size {
        batch: workload.batch_size as u64,
        image: (rows * columns) as u64,
        text: workload.text_tokens as u64,
        rank: workload.lora_rank.map(|rank| rank as u64),
    };
    let parameters = counted(source, workload.components)?;
    Ok(Footprint {
        image_tokens: rows * columns,
        denoiser: super::DENOISER,
        trained: size.rank.map_or(parameters[super::DENOISER], |rank| transformer.adapters(rank)),
        parameters,
        held: held(source, workload.components)?,
        activations: size.activations(&transformer),
        flops: size.flops(&transformer),
    })
}

/// Parameters in the files of components.
pub(crate) fn counted(
    source: &ModelSource,
    components: Components,
) -> Result<BTreeMap<&'static str, u64>, ModelError> {
    sums(source, components, |_, shape| numbers(shape))
}

/// Numbers of the weights that stay in memory: of a convolution over frames the last alone meets a picture, and nothing
/// resamples time.
pub(crate) fn held(
    source: &ModelSource,
    components: Components,
) -> Result<BTreeMap<&'static str, u64>, ModelError> {
    sums(source, components, |key, shape| match shape {
        _ if key.contains("time_conv") => 0,
        [_, _, frames, _, _] => numbers(shape) / *frames as u64,
        _ => numbers(shape),
    })
}

fn sums(
    source: &ModelSource,
    components: Components,
    count: impl Fn(&str, &[usize]) -> u64,
) -> Result<BTreeMap<&'static str, u64>, ModelError> {
    let of = |component: &&'static str| {
        let shapes = super::component_tensors(source, component)?;
        Ok((*component, shapes.iter().map(|(key, shape)| count(key, shape)).sum()))
    };
    let counts: Result<BTreeMap<&str, u64>, ModelError> = super::loaded(components).iter().map(of).collect();
    Ok(counts?.into_iter().filter(|(_, count)| *count > 0).collect())
}

fn numbers(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64
}

/// What text encoder and autoencoder hold, counted off [`super::text_encoder`] and [`super::vae`].
pub(crate) fn encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
    let text = TextEncoderConfig::read(source)?;
    let [width, inner, layers] =
        [text.hidden_size, text.intermediate_size, text.num_hidden_layers].map(|size| size as u64);
    let grouped = (text.head_dim() * text.num_key_value_heads) as u64;
    // The stream and its norm beside query, key and value, these rotated and packed, and their output; or beside the
    // MLP's gate, that after its activation, the other branch and their product.
    let attention = 2 * width + 2 * (width + 2 * grouped) + 3 * width + width;
    let mlp = 2 * width + 4 * inner;
    // The inputs of both norms and of what follows them, the packed query, key and value, the attention's output; the
    // gate with its activation's factors, and both branches and their product.
    let kept = 8 * width + 6 * inner;
    let matrices = layers * (2 * width * width + 2 * width * grouped + 3 * width * inner);
    Ok(Encoding {
        per_token: attention.max(mlp),
        per_token_training: layers * kept + attention.max(mlp),
        per_pixel: VaeConfig::read(source)?.numbers_per_pixel(),
        flops_per_token: 2 * matrices,
    })
}

impl VaeConfig {
    /// At full resolution: a residual block's input, its norm's square and result, the activation, the convolution's
    /// input by rows, and its output; or the pixels and their new places.
    fn numbers_per_pixel(&self) -> u64 {
        match self {
            Self::AutoencoderKLQwenImage(config) => 6 * config.base_dim as u64,
            Self::PixelUnshuffle(_) => 3 * 3,
        }
    }
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
