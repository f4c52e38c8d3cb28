//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`], and what the encoders
//! hold.

use super::config::{self, TransformerConfig};
use crate::footprint::{Encoding, Evaluation, Flops, Workload};
use crate::model::token_grid;
use crate::parts::cost::{Batch, Held, Remembered};
use crate::parts::patches::PATCH;
use crate::parts::t5;
use crate::{ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let factor = super::latent_factor(source)? * PATCH;
    let [rows, columns] = token_grid([workload.height, workload.width], factor)?;
    let image_tokens = super::latent_frames(workload.frames)? * rows * columns;
    let batch = Batch::new(workload, image_tokens);
    Ok(Evaluation {
        image_tokens,
        activations: batch.activations(&transformer.held(&batch)),
        flops: transformer.flops(&batch),
    })
}

/// What text encoder and autoencoder hold. Of a video no more frames are in the autoencoder at once than a chunk has.
pub(super) fn encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
    let text = t5::encoding(&config::text_encoder(source)?, super::TEXT_TOKENS);
    let vae = config::autoencoder(source)?;
    // The convolutions of a video's frames see two frames before theirs.
    let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), 3 * vae.flops_per_pixel());
    Ok(Encoding { per_pixel, flops_per_pixel, ..text })
}

impl TransformerConfig {
    fn held(&self, batch: &Batch) -> Held {
        let (heads, hidden) = (self.heads(), self.ffn_dim as u64);
        let (width, blocks) = (heads.width() as u64, self.num_layers as u64);
        let (image, text) = (batch.image, batch.text);
        // The inputs of three norms (3) and of what follows them (3), query, key and value before and after they are joined
        // (3 + 3), the attention's output (1), the query of the text before its norm and by heads (2), what it attends to (1),
        // and three updates (3), in D numbers per token of the picture; the MLP's before and after the activation. Keys and
        // values of the text, the keys before their norm too (3). A frozen projection keeps no input: with adapters on all of
        // them each keeps its own.
        let ranks = batch.rank.unwrap_or(0);
        let block = image * (19 * width + 2 * hidden + 10 * ranks + 2 * heads.count as u64)
            + text * (3 * width + 2 * ranks)
            + 6 * width;
        // Of them query, key and value (3), the query of the text (1), what both attentions give (2), three updates (3), and
        // the MLP's before the activation; keys and values of the text (2).
        let results = image * (9 * width + hidden + 2 * heads.count as u64) + 2 * text * width;
        Held {
            kept: blocks * block,
            largest: block,
            passed: blocks * image * width,
            results: blocks * results,
            remembered: self.remembered(batch),
            scores: blocks * heads.count as u64 * image * (image + text),
            largest_scores: heads.count as u64 * image * image.max(text),
            backward: image * (4 * width + 2 * hidden),
            drawing: image * (2 * width + (7 * width).max(2 * hidden)) + 4 * text * width,
        }
    }

    fn flops(&self, batch: &Batch) -> Flops {
        let width = self.heads().width() as u64;
        let (hidden, blocks) = (self.ffn_dim as u64, self.num_layers as u64);
        // Per token of the picture four projections, the text's query and output, and the MLP's two; per token of the text
        // its key and value.
        let per_image = 6 * width * width + 2 * width * hidden;
        let per_text = 2 * width * width;
        let [channels, joint, frequencies] =
            [self.in_channels, self.text_dim, self.freq_dim].map(|size| size as u64);
        let ends = 8 * batch.image * channels * width + batch.text * (joint + width) * width;
        let time = (frequencies + 7 * width) * width;
        let weights = blocks * (batch.image * per_image + batch.text * per_text) + ends + time;
        let attention = 2 * batch.image * (batch.image + batch.text) * width;
        batch.flops(weights, blocks * attention, self.remembered(batch))
    }

    fn remembered(&self, batch: &Batch) -> Remembered {
        let (heads, hidden) = (self.heads(), self.ffn_dim as u64);
        let mlp = Remembered::layer(batch.image, [hidden, heads.width() as u64]);
        self.num_layers as u64 * (Remembered::attention(batch.image, heads) + mlp)
    }
}
