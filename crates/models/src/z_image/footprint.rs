//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].

use super::config::TransformerConfig;
use super::transformer::continued;
use crate::footprint::{Evaluation, Workload};
use crate::model::token_grid;
use crate::parts::autoencoder_kl::latent_factor;
use crate::parts::cost::{Batch, Held, Remembered};
use crate::parts::patches::PATCH;
use crate::parts::timestep::TIME_FEATURES;
use crate::{Flops, ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let [rows, columns] = token_grid([workload.height, workload.width], latent_factor(source)? * PATCH)?;
    // Learned tokens continue both sequences.
    let text_tokens = continued(workload.text_tokens);
    let batch = Batch::new(&Workload { text_tokens, ..*workload }, continued(rows * columns));
    Ok(Evaluation {
        image_tokens: rows * columns,
        activations: batch.activations(&transformer.held(&batch)),
        flops: transformer.flops(&batch),
    })
}

impl TransformerConfig {
    fn held(&self, batch: &Batch) -> Held {
        let (heads, tokens) = (self.heads(), batch.tokens());
        let (width, hidden) = (self.dim as u64, self.hidden() as u64);
        // The inputs of four norms and of what scales two of them (6), of the projections to query, key and value (1),
        // these before and after they are joined (3 + 3), the attention's output (1), both updates (2), and the MLP's
        // input (1), in D numbers per token; its two branches and their gated product in those of the MLP's width. A frozen projection keeps no input: with adapters on all of them each keeps its own.
        let per_rank = batch.rank.map_or(0, |rank| 7 * rank);
        let block = tokens * (17 * width + 3 * hidden + per_rank + heads.count as u64) + 4 * width;
        // Of them query, key and value (3), the attention's output (1), both updates (2), and the MLP's branches.
        let results = tokens * (6 * width + 2 * hidden + heads.count as u64) + 4 * width;
        // The refiners see one part of the tokens each.
        let blocks = (self.n_layers + self.n_refiner_layers) as u64;
        Held {
            kept: blocks * block,
            largest: block,
            passed: blocks * tokens * width,
            results: blocks * results,
            remembered: self.remembered(batch),
            scores: blocks * batch.scores(heads),
            largest_scores: batch.scores(heads),
            backward: tokens * (4 * width + 3 * hidden),
            drawing: tokens * (2 * width + (7 * width).max(3 * hidden)),
        }
    }

    fn flops(&self, batch: &Batch) -> Flops {
        let (width, hidden, time) = (self.dim as u64, self.hidden() as u64, self.time_width() as u64);
        let (layers, refiners) = (self.n_layers as u64, self.n_refiner_layers as u64);
        // Four projections and the MLP's three per token, a modulation per sample.
        let per_token = 4 * width * width + 3 * width * hidden;
        let tokens =
            (layers + refiners) * batch.tokens() * per_token + (layers + refiners) * 4 * time * width;
        let [token, joint] = [4 * self.in_channels, self.cap_feat_dim].map(|size| size as u64);
        let ends = 2 * batch.image * token * width + batch.text * joint * width;
        let apart = 2 * (batch.image * batch.image + batch.text * batch.text) * width;
        let attention = layers * batch.attention_products(self.heads()) + refiners * apart;
        batch.flops(tokens + ends + TIME_FEATURES as u64 * 4 * time, attention, self.remembered(batch))
    }

    fn remembered(&self, batch: &Batch) -> Remembered {
        let of_block = |tokens| {
            let mlp = Remembered::layer(tokens, [self.hidden(), self.dim].map(|size| size as u64));
            Remembered::attention(tokens, self.heads()) + mlp
        };
        let refiners = of_block(batch.image) + of_block(batch.text);
        self.n_layers as u64 * of_block(batch.tokens()) + self.n_refiner_layers as u64 * refiners
    }
}
