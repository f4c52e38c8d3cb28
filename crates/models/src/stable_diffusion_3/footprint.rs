//! What one evaluation of the transformer takes, counted off the code in [`super::transformer`].

use super::config::{Configs, TextConfigs, TransformerConfig};
use super::max_side_px;
use crate::footprint::{Encoding, Evaluation, Workload};
use crate::model::{check_sides, token_grid};
use crate::parts::autoencoder_kl::{AutoencoderKlConfig, latent_factor};
use crate::parts::clip;
use crate::parts::cost::{Batch, Held, Remembered};
use crate::parts::double_stream::ImageAttention;
use crate::parts::patches::PATCH;
use crate::parts::t5;
use crate::parts::timestep::TIME_FEATURES;
use crate::{Flops, ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let transformer = TransformerConfig::read(source)?;
    let factor = latent_factor(source)? * PATCH;
    let sides = [workload.height, workload.width];
    check_sides(sides, max_side_px(&transformer, factor))?;
    let [rows, columns] = token_grid(sides, factor)?;
    let batch = Batch::new(workload, rows * columns);
    Ok(Evaluation {
        image_tokens: rows * columns,
        activations: batch.activations(&transformer.held(&batch)),
        flops: transformer.flops(&batch),
    })
}

impl TransformerConfig {
    /// Blocks whose image attends to itself once more.
    fn dual_blocks(&self) -> u64 {
        let is_dual = |block: &usize| self.layout(*block).image == ImageAttention::JointAndOwn;
        (0..self.num_layers).filter(is_dual).count() as u64
    }

    /// The last block counts as the others: that its text ends there makes it smaller.
    fn held(&self, batch: &Batch) -> Held {
        let heads = self.heads();
        let (width, blocks) = (heads.width() as u64, self.num_layers as u64);
        // Of the second attention: the input of its projections (1), their output (3), these by heads (3), and the
        // attention's output before and after its projection (2), in D numbers per image token; and its modulation.
        let own = batch.image * (9 * width + heads.count as u64) + 3 * width;
        // All of these but the two inputs.
        let own_results = batch.image * (5 * width + heads.count as u64) + 3 * width;
        let dual = self.dual_blocks();
        Held {
            kept: blocks * batch.block(heads) + dual * own,
            largest: batch.block(heads) + dual.min(1) * own,
            passed: blocks * batch.tokens() * width,
            results: blocks * batch.block_results(heads) + dual * own_results,
            remembered: self.remembered(batch),
            scores: (blocks + dual) * batch.scores(heads),
            largest_scores: batch.scores(heads),
            backward: batch.backward(heads),
            drawing: batch.drawing(heads),
        }
    }

    fn flops(&self, batch: &Batch) -> Flops {
        let (heads, blocks, dual) = (self.heads(), self.num_layers as u64, self.dual_blocks());
        let attention = blocks * batch.attention_products(heads)
            + dual * 2 * batch.image * batch.image * heads.width() as u64;
        batch.flops(self.products(batch), attention, self.remembered(batch))
    }

    fn remembered(&self, batch: &Batch) -> Remembered {
        let heads = self.heads();
        let own = Remembered::attention(batch.image, heads);
        self.num_layers as u64 * batch.block_remembered(heads) + self.dual_blocks() * own
    }

    /// Products of all weights.
    fn products(&self, batch: &Batch) -> u64 {
        let (heads, blocks) = (self.heads(), self.num_layers as u64);
        let width = heads.width() as u64;
        let [patch, joint, pooled] =
            [PATCH * PATCH * self.in_channels, self.joint_attention_dim, self.pooled_projection_dim]
                .map(|size| size as u64);
        // Four projections per image token, three chunks of the modulation.
        let own = (4 * batch.image + 3) * width * width;
        // Of the text's last block: its projection out of the attention, its MLP, four chunks of its modulation.
        let left_out = (9 * batch.text + 4) * width * width;
        let ends = 2 * batch.image * patch * width + batch.text * joint * width;
        let time = (TIME_FEATURES as u64 + pooled + 4 * width) * width;
        blocks * batch.block_products(heads) + self.dual_blocks() * own + ends + time - left_out
    }
}

/// What text encoders and autoencoder hold, prompts having the usual length: CLIP's states and T5's are side by side.
pub(super) fn encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
    let TextConfigs { clips, t5 } = Configs::read(source)?.text;
    let (row, tokens) = (clips[0].max_position_embeddings, super::TEXT_TOKENS);
    let clips = clips.iter().map(|config| clip::encoding(config).of_part(row, row + tokens));
    let t5 = t5.iter().map(|config| t5::encoding(config, tokens).of_part(tokens, row + tokens));
    let text = Encoding::in_turn(clips.chain(t5));
    let vae = AutoencoderKlConfig::read(source)?;
    let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), vae.flops_per_pixel());
    Ok(Encoding { per_pixel, flops_per_pixel, ..text })
}

#[cfg(test)]
mod tests {
    use fewstep_testkit::golden;

    use super::*;
    use crate::Components;
    use crate::family::Kind;

    const WORKLOAD: Workload = Workload {
        height: 16,
        width: 16,
        frames: 1,
        batch_size: 1,
        text_tokens: 1,
        lora_rank: None,
        components: Components::All,
        on_cpu: true,
    };

    #[test]
    fn at_one_token_of_each_stream_every_matrix_is_multiplied_once() {
        for folder in ["sd3/model", "sd3/sd35"] {
            let source = ModelSource::from(&golden(folder));
            let tensors = super::super::Kind.component_tensors(&source, "transformer").unwrap();
            let matrices =
                tensors.iter().filter(|(key, shape)| shape.len() > 1 && *key != "pos_embed.pos_embed");
            let numbers: usize = matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let products = TransformerConfig::read(&source).unwrap().products(&Batch::new(&WORKLOAD, 1));
            assert_eq!(products, numbers as u64, "{folder}");
        }
    }

    #[test]
    fn a_second_attention_takes_more_and_adapters_a_shorter_backward() {
        let config = TransformerConfig::read(&ModelSource::from(&golden("sd3/sd35"))).unwrap();
        let mut single = config.clone();
        single.dual_attention_layers.clear();
        let of = |config: &TransformerConfig, lora_rank| {
            let batch = Batch::new(&Workload { text_tokens: 77, lora_rank, ..WORKLOAD }, 64);
            (config.flops(&batch), batch.activations(&config.held(&batch)))
        };
        let ((dual, held), (without, held_without)) = (of(&config, None), of(&single, None));
        assert!(dual.forward > without.forward && held.training > held_without.training);
        assert!(of(&config, Some(4)).0.backward < dual.backward);
    }

    #[test]
    fn each_text_encoder_counts_for_the_tokens_that_it_reads() {
        let source = ModelSource::from(&golden("sd3/model"));
        let TextConfigs { clips, t5 } = Configs::read(&source).unwrap().text;
        let clips: u64 = clips.iter().map(|config| 77 * clip::encoding(config).flops_per_token).sum();
        let t5 = 256 * t5::encoding(&t5.unwrap(), 256).flops_per_token;
        let found = encoding(&source).unwrap();
        // Of three encoders each is rounded up.
        assert!((clips + t5..=clips + t5 + 3 * 333).contains(&(333 * found.flops_per_token)), "{found:?}");
        assert!(found.per_pixel > 0 && found.flops_per_pixel > 0, "{found:?}");
    }

    #[test]
    fn a_picture_beyond_the_table_of_places_is_refused() {
        let source = ModelSource::from(&golden("sd3/model"));
        let evaluated = evaluation(&source, &Workload { width: 66 * 16, ..WORKLOAD });
        let error = evaluated.map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "width 1056 px, expected at most 1040");
    }
}
