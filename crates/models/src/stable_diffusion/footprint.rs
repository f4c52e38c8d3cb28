//! What one evaluation of the UNet takes, counted off the code in [`super::unet`].

use super::PUBLISHED_FACTOR;
use super::config::UnetConfig;
use crate::footprint::{Encoding, Evaluation, Flops, Workload};
use crate::model::token_grid;
use crate::parts::autoencoder_kl::AutoencoderKlConfig;
use crate::parts::clip::{self, ClipTextConfig};
use crate::parts::cost::{Held, Remembered};
use crate::parts::double_stream::Heads;
use crate::{ModelError, ModelSource};

/// What one evaluation on a batch takes.
pub(super) fn evaluation(source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
    let config = UnetConfig::read(source)?;
    let factor = match AutoencoderKlConfig::read(source) {
        Ok(vae) => vae.factor(),
        Err(ModelError::NotBeside { .. }) => PUBLISHED_FACTOR,
        Err(error) => return Err(error),
    };
    let latents = token_grid([workload.height, workload.width], factor)?;
    let mut count = Count { text: workload.text_tokens as u64, rank: workload.lora_rank, ..Count::default() };
    count.unet(&config, latents);
    let batch = workload.batch_size as u64;
    let flops = |products: u64| 2 * batch * products;
    // Each product is undone by one for its input and, where the weight learns, one for the weight; an adapter's are
    // small. Attention computes its scores again and has four more products.
    let by_weights = if workload.lora_rank.is_some() { count.weights } else { 2 * count.weights };
    let forward = flops(count.weights + count.attention);
    Ok(Evaluation {
        image_tokens: latents[0] * latents[1],
        activations: count.held().activations(batch, workload.on_cpu),
        flops: Flops {
            forward,
            recomputed: if workload.on_cpu { flops(count.recomputed) } else { forward },
            remembered: if workload.on_cpu { flops(count.remembered.products) } else { 0 },
            backward: flops(by_weights + 5 * count.attention / 2),
        },
    })
}

/// What text encoders and autoencoder hold beside their weights.
pub(super) fn encoding(source: &ModelSource, encoders: &[&'static str]) -> Result<Encoding, ModelError> {
    let vae = AutoencoderKlConfig::read(source)?;
    let texts = encoders.iter().map(|name| Ok(clip::encoding(&ClipTextConfig::read(source, name)?)));
    let text = Encoding::in_turn(texts.collect::<Result<Vec<_>, ModelError>>()?);
    let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), vae.flops_per_pixel());
    Ok(Encoding { per_pixel, flops_per_pixel, ..text })
}

/// Numbers and products of one sample, summed block by block.
#[derive(Default)]
struct Count {
    /// S.
    text: u64,
    /// Of the adapters that learn; `None` where all weights do.
    rank: Option<usize>,
    /// Multiplications with weights, each with its addition.
    weights: u64,
    /// Those of them that are computed again where blocks are.
    recomputed: u64,
    /// The same of scores and values.
    attention: u64,
    /// Numbers that a backward needs.
    kept: u64,
    /// What is passed from block to block.
    passed: u64,
    /// What the CPU keeps inside of blocks that are computed again.
    results: u64,
    /// What the CPU remembers from one evaluation to the next.
    remembered: Remembered,
    /// Scores of all attentions.
    scores: u64,
    /// Those of the largest.
    largest_scores: u64,
    /// The most that one block keeps.
    largest: u64,
    /// The most that is alive at one time in a backward beside what was kept.
    backward: u64,
    /// The most that is alive at one time in drawing, beside what the way up meets again.
    moment: u64,
    /// What the way up meets again.
    skipped: u64,
}

impl Count {
    fn held(&self) -> Held {
        let Self { kept, largest, passed, results, remembered, scores, largest_scores, backward, .. } = *self;
        let drawing = self.skipped + self.moment;
        Held { kept, largest, passed, results, remembered, scores, largest_scores, backward, drawing }
    }

    fn unet(&mut self, config: &UnetConfig, latents: [usize; 2]) {
        let pixels =
            |stage: usize| -> u64 { latents.iter().map(|side| side.div_ceil(1 << stage) as u64).product() };
        let channels: Vec<u64> = config.block_out_channels.iter().map(|count| *count as u64).collect();
        let (last, in_channels) = (config.stages() - 1, config.in_channels as u64);
        let mut skipped = vec![(channels[0], pixels(0))];
        self.resample(in_channels, channels[0], pixels(0));
        for stage in 0..=last {
            let mut input = channels[stage.saturating_sub(1)];
            for _ in 0..config.layers_per_block {
                self.resnet([input, 0], channels[stage], pixels(stage));
                self.transformer(config, stage, pixels(stage), config.attends_down(stage));
                input = channels[stage];
                skipped.push((input, pixels(stage)));
            }
            if stage < last {
                self.resample(input, input, pixels(stage + 1));
                skipped.push((input, pixels(stage + 1)));
            }
        }
        self.skipped = skipped.iter().map(|(channels, pixels)| channels * pixels).sum();
        for _ in 0..2 {
            self.resnet([channels[last], 0], channels[last], pixels(last));
        }
        self.transformer(config, last, pixels(last), true);
        let mut input = channels[last];
        for stage in (0..=last).rev() {
            for _ in 0..=config.layers_per_block {
                let (beside, _) = skipped.pop().unwrap_or((0, 0));
                self.resnet([input, beside], channels[stage], pixels(stage));
                self.transformer(config, stage, pixels(stage), config.attends_up(stage));
                input = channels[stage];
            }
            if stage > 0 {
                self.resample(input, input, pixels(stage - 1));
            }
        }
        self.resample(channels[0], in_channels, pixels(0));
    }

    /// Whether the weights of convolutions and norms learn.
    fn learns_all(&self) -> bool {
        self.rank.is_none()
    }

    /// A convolution outside of blocks, over an input of the output's size. A frozen one keeps no input.
    fn resample(&mut self, input: u64, output: u64, pixels: u64) {
        self.weights += 9 * input * output * pixels;
        self.moment = self.moment.max((input + output) * pixels);
        // The input on the way down and at the end is the output of a block as well.
        let kept = if self.learns_all() { input * pixels } else { 0 };
        self.kept += kept;
        self.passed += kept;
    }

    /// Over the channels of a state, and of one of the way down behind them.
    fn resnet(&mut self, [own, beside]: [u64; 2], output: u64, pixels: u64) {
        let input = own + beside;
        let products = (9 * (input + output) + if input == output { 0 } else { input }) * output * pixels;
        self.weights += products;
        self.recomputed += products;
        // The inputs of both norms, and of both convolutions where these learn.
        let kept = if self.learns_all() { 2 * (input + output) } else { input + output } * pixels;
        self.kept += kept;
        self.passed += output * pixels;
        self.largest = self.largest.max(kept);
        // Input, the first convolution's input and output; or input, the second's, and its output.
        self.moment = self.moment.max((2 * input + output).max(input + 2 * output) * pixels);
        // The gradients of output, of the second convolution's input and of the norm's; or of the first's.
        self.backward = self.backward.max((3 * output).max(output + 2 * input) * pixels);
    }

    /// Projections at both ends, and in each block two attentions and the gated MLP.
    fn transformer(&mut self, config: &UnetConfig, stage: usize, pixels: u64, attends: bool) {
        if !attends {
            return;
        }
        let (width, text) = (config.block_out_channels[stage] as u64, self.text);
        let (joint, depth) = (config.cross_attention_dim as u64, config.depth(stage) as u64);
        let heads = config.heads(stage) as u64;
        let tokens = (6 + 12) * width * width * pixels + 2 * joint * width * text;
        self.weights += 2 * width * width * pixels + depth * tokens;
        self.attention += depth * 2 * width * pixels * (pixels + text);
        // The stream, and the MLP's halves with their gated product; or the stream, its norm, query, key and value.
        self.moment = self.moment.max(13 * width * pixels);
        // Gradients of the stream, of the MLP's product and of its halves.
        self.backward = self.backward.max(13 * width * pixels);
        let block = self.transformer_block([width, heads], pixels);
        self.kept += depth * block;
        self.largest = self.largest.max(block);
        // The ends: the norm's input is the residual block's output; the inputs of both projections where they learn.
        let ends = if self.learns_all() { 2 * width * pixels } else { 0 };
        self.kept += ends;
        // Query, key and value (3), the query to the text (1), what both attentions give and their projections make of it
        // (4), the MLP's halves (8) and its output (1); keys and values of the text.
        let results = (17 * width + 2 * heads) * pixels + 2 * width * text;
        self.results += depth * results;
        let of_heads = Heads { count: config.heads(stage), dim: (width / heads) as usize };
        let of_text = 2 * Remembered::layer(text, [joint, width]);
        let mlp = Remembered::layer(pixels, [4 * width, width]);
        self.remembered = self.remembered + depth * (Remembered::attention(pixels, of_heads) + of_text + mlp);
        // What goes into each block, and the output.
        self.passed += ends + (depth + 1) * width * pixels;
        // Over the picture, and over the text.
        self.scores += depth * heads * pixels * (pixels + text);
        self.largest_scores = self.largest_scores.max(heads * pixels * pixels.max(text));
    }

    /// What a block of a transformer keeps.
    fn transformer_block(&self, [width, heads]: [u64; 2], pixels: u64) -> u64 {
        // The inputs of the three norms (3), their outputs (3), query, key and value (3), what both attentions give (2),
        // the query to the text (1), the MLP's two halves and their gated product (12); keys and values of the text, as
        // they are and by heads; a number for each head. Without an adapter a frozen projection keeps no input: those are the MLP's.
        let (per_token, per_rank) = match self.rank {
            None => (24, 0),
            Some(rank) => (19, 6 * rank as u64),
        };
        (per_token * width + per_rank + heads) * pixels + 4 * width * self.text
    }
}

#[cfg(test)]
mod tests {
    use fewstep_testkit::golden;

    use super::*;
    use crate::family::Kind;
    use crate::stable_diffusion::{BASE, XL};

    #[test]
    fn at_one_pixel_and_one_token_every_weight_is_multiplied_once() {
        for (family, kind) in [("sd15", &BASE), ("sdxl", &XL)] {
            let source = ModelSource::from(&golden(&format!("{family}/model")));
            let mut count = Count { text: 1, ..Count::default() };
            count.unet(&UnetConfig::read(&source).unwrap(), [1, 1]);
            // The time's layers are counted as nothing; biases and norms are vectors.
            let counts = |key: &str, shape: &[usize]| {
                shape.len() > 1 && !key.contains("time_emb") && !key.contains("embedding")
            };
            let tensors = kind.component_tensors(&source, "unet").unwrap();
            let matrices = || tensors.iter().filter(|(key, shape)| counts(key, shape));
            let numbers = |key_part: &str| -> usize {
                let of_part = matrices().filter(|(key, _)| key.contains(key_part));
                of_part.map(|(_, shape)| shape.iter().product::<usize>()).sum()
            };
            assert_eq!(count.weights, numbers("") as u64, "{family}");
            assert_eq!(
                count.recomputed,
                numbers("resnets") as u64,
                "{family}: convolutions of residual blocks"
            );
        }
    }

    #[test]
    fn drawing_holds_less_than_training_and_adapters_cost_a_shorter_backward() {
        let source = ModelSource::from(&golden("sdxl/model"));
        let of = |lora_rank| {
            let workload = Workload {
                height: 512,
                width: 512,
                frames: 1,
                batch_size: 2,
                text_tokens: 77,
                lora_rank,
                components: crate::Components::All,
                on_cpu: true,
            };
            evaluation(&source, &workload).unwrap()
        };
        let (full, adapters) = (of(None), of(Some(4)));
        assert_eq!(full.image_tokens, 64 * 64);
        assert!(full.activations.drawing < full.activations.checkpointed);
        assert!(4 * full.activations.checkpointed < 3 * full.activations.training);
        assert!(adapters.activations.training < full.activations.training);
        assert_eq!(full.flops.forward, adapters.flops.forward);
        assert!(adapters.flops.backward < full.flops.backward);
    }
}
