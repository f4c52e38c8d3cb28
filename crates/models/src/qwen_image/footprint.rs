//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].

use super::config::{TextEncoderConfig, TransformerConfig};
use super::vae::{Vae, VaeConfig};
use crate::footprint::{Encoding, Evaluation, Flops, Workload};
use crate::model::token_grid;
use crate::parts::cost::{Batch, Held, Remembered};
use crate::parts::patches::PATCH;
use crate::parts::timestep::TIME_FEATURES;
use crate::{ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let factor = Vae::absent(source, transformer.out_channels)?.factor() * PATCH;
    let [rows, columns] = token_grid([workload.height, workload.width], factor)?;
    let batch = Batch::new(workload, rows * columns);
    Ok(Evaluation {
        image_tokens: rows * columns,
        activations: batch.activations(&transformer.held(&batch)),
        flops: transformer.flops(&batch),
    })
}

/// Numbers of a weight that stay in memory: of a convolution over frames the last alone meets a picture, and nothing
/// resamples time.
pub(super) fn held(key: &str, shape: &[usize]) -> u64 {
    let numbers = shape.iter().product::<usize>() as u64;
    match shape {
        _ if key.contains("time_conv") => 0,
        [_, _, frames, _, _] => numbers / *frames as u64,
        _ => numbers,
    }
}

/// What text encoder and autoencoder hold, counted off [`super::text_encoder`] and [`super::vae`].
pub(super) fn encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
    let vae = VaeConfig::read(source)?;
    let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), vae.flops_per_pixel());
    Ok(Encoding { per_pixel, flops_per_pixel, ..TextEncoderConfig::read(source)?.encoding() })
}

impl TextEncoderConfig {
    /// What the text model alone holds.
    pub(crate) fn encoding(&self) -> Encoding {
        let [width, inner, layers] =
            [self.hidden_size, self.intermediate_size, self.num_hidden_layers].map(|size| size as u64);
        let joined = (self.head_dim() * self.num_attention_heads) as u64;
        let grouped = (self.head_dim() * self.num_key_value_heads) as u64;
        // The stream and its norm beside query, key and value, these rotated and packed, and their output; or beside the
        // MLP's two branches and their gated product.
        let attention = 2 * width + 2 * (joined + 2 * grouped) + 3 * joined + joined;
        let mlp = 2 * width + 3 * inner;
        // The inputs of both norms and of what follows them, the packed query, key and value, the attention's output; the
        // MLP's two branches and their gated product.
        let kept = 4 * width + 4 * joined + 3 * inner;
        let matrices = layers * (2 * width * joined + 2 * width * grouped + 3 * width * inner);
        Encoding {
            per_token: attention.max(mlp),
            per_token_training: layers * kept + attention.max(mlp),
            per_pixel: 0,
            flops_per_token: 2 * matrices,
            flops_per_pixel: 0,
        }
    }
}

impl VaeConfig {
    /// Of the pixel autoencoder the pixels and their new places.
    fn numbers_per_pixel(&self) -> u64 {
        match self {
            Self::AutoencoderKLQwenImage(config) => config.numbers_per_pixel(),
            Self::PixelUnshuffle(_) => 3 * 3,
        }
    }

    fn flops_per_pixel(&self) -> u64 {
        match self {
            Self::AutoencoderKLQwenImage(config) => config.flops_per_pixel(),
            Self::PixelUnshuffle(_) => 0,
        }
    }
}

impl TransformerConfig {
    fn held(&self, batch: &Batch) -> Held {
        let (heads, blocks) = (self.heads(), self.num_layers as u64);
        Held {
            kept: blocks * batch.block(heads),
            largest: batch.block(heads),
            passed: blocks * batch.tokens() * heads.width() as u64,
            results: blocks * batch.block_results(heads),
            remembered: self.remembered(batch),
            scores: blocks * batch.scores(heads),
            largest_scores: batch.scores(heads),
            backward: batch.backward(heads),
            drawing: batch.drawing(heads),
        }
    }

    fn flops(&self, batch: &Batch) -> Flops {
        let (heads, blocks) = (self.heads(), self.num_layers as u64);
        let width = heads.width() as u64;
        let [input, joint] = [self.in_channels, self.joint_attention_dim].map(|size| size as u64);
        let ends = 2 * batch.image * input * width + batch.text * joint * width;
        let time = TIME_FEATURES as u64 * width + 3 * width * width;
        let weights = blocks * batch.block_products(heads) + ends + time;
        batch.flops(weights, blocks * batch.attention_products(heads), self.remembered(batch))
    }

    fn remembered(&self, batch: &Batch) -> Remembered {
        self.num_layers as u64 * batch.block_remembered(self.heads())
    }
}
