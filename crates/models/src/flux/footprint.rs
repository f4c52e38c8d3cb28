//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].

use super::config::{Configs, TransformerConfig};
use crate::footprint::{Encoding, Evaluation, Workload};
use crate::model::token_grid;
use crate::parts::autoencoder_kl::{AutoencoderKlConfig, latent_factor};
use crate::parts::cost::{Batch, Held, Remembered};
use crate::parts::patches::PATCH;
use crate::parts::t5;
use crate::parts::timestep::TIME_FEATURES;
use crate::{Flops, ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let [rows, columns] = token_grid([workload.height, workload.width], latent_factor(source)? * PATCH)?;
    let batch = Batch::new(workload, rows * columns);
    Ok(Evaluation {
        image_tokens: rows * columns,
        activations: batch.activations(&transformer.held(&batch)),
        flops: transformer.flops(&batch),
    })
}

impl TransformerConfig {
    fn held(&self, batch: &Batch) -> Held {
        let (heads, tokens) = (self.heads(), batch.tokens());
        let width = heads.width() as u64;
        let (blocks, singles) = (self.num_layers as u64, self.num_single_layers as u64);
        // Of a single-stream block: the norm's input (1), the projections' (1), query, key and value before and after they
        // are joined (3 + 3), the attention's output (1), the activation's input (4), what the last projection reads (5)
        // and its output (1), in D numbers per token. A frozen projection keeps no input: that is the last one's.
        let (per_token, per_rank) = match batch.rank {
            None => (19, 0),
            Some(rank) => (14, 3 * rank),
        };
        let single = tokens * (per_token * width + per_rank + heads.count as u64) + 3 * width;
        // Of them query, key and value (3), the attention's output (1), the activation's input (4) and the last projection's
        // output (1).
        let results = tokens * (9 * width + heads.count as u64) + 3 * width;
        Held {
            kept: blocks * batch.block(heads) + singles * single,
            largest: batch.block(heads).max(single),
            passed: (blocks + singles) * tokens * width,
            results: blocks * batch.block_results(heads) + singles * results,
            remembered: self.remembered(batch),
            scores: (blocks + singles) * batch.scores(heads),
            largest_scores: batch.scores(heads),
            // Gradients of what the last projection reads, of the activation's output and input, and of the residual.
            backward: batch.backward(heads).max(14 * tokens * width),
            // The residual, the norm's output, the attention's, the MLP's hidden tokens before and after the activation,
            // and what the last projection reads.
            drawing: batch.drawing(heads).max(12 * tokens * width),
        }
    }

    fn flops(&self, batch: &Batch) -> Flops {
        let heads = self.heads();
        let width = heads.width() as u64;
        let (blocks, singles) = (self.num_layers as u64, self.num_single_layers as u64);
        // Per token three projections, the MLP's first and the last of five times the width; per sample a modulation.
        let single = (12 * batch.tokens() + 3) * width * width;
        let [input, joint, pooled] =
            [self.in_channels, self.joint_attention_dim, self.pooled_projection_dim].map(|size| size as u64);
        let ends = 2 * batch.image * input * width + batch.text * joint * width;
        let embedders = if self.guidance_embeds { 2 } else { 1 };
        let time = (embedders * TIME_FEATURES as u64 + pooled + (embedders + 3) * width) * width;
        let weights = blocks * batch.block_products(heads) + singles * single + ends + time;
        batch.flops(weights, (blocks + singles) * batch.attention_products(heads), self.remembered(batch))
    }

    fn remembered(&self, batch: &Batch) -> Remembered {
        let (heads, tokens) = (self.heads(), batch.tokens());
        let width = heads.width() as u64;
        let single = Remembered::attention(tokens, heads) + Remembered::layer(tokens, [5 * width, width]);
        self.num_layers as u64 * batch.block_remembered(heads) + self.num_single_layers as u64 * single
    }
}

/// What text encoders and autoencoder hold. CLIP is small beside T5.
pub(super) fn encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
    let text = t5::encoding(&Configs::read(source)?.text_encoder_2, super::TEXT_TOKENS);
    let vae = AutoencoderKlConfig::read(source)?;
    let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), vae.flops_per_pixel());
    Ok(Encoding { per_pixel, flops_per_pixel, ..text })
}
