//! What one evaluation of the UNet takes, counted off the code in [`super::unet`].

use super::PUBLISHED_FACTOR;
use super::config::UnetConfig;
use crate::footprint::{Activations, Encoding, Evaluation, Flops, Workload};
use crate::model::token_grid;
use crate::parts::autoencoder_kl::AutoencoderKlConfig;
use crate::parts::clip::ClipTextConfig;
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
    let (graph, training) = (batch * count.kept, batch * (count.kept + count.drawing));
    Ok(Evaluation {
        image_tokens: latents[0] * latents[1],
        // The UNet computes no block a second time.
        activations: Activations {
            drawing: batch * count.drawing,
            training,
            graph,
            checkpointed: training,
            checkpointed_graph: graph,
        },
        flops: Flops {
            forward: flops(count.weights + count.attention),
            backward: flops(by_weights + 5 * count.attention / 2),
        },
    })
}

/// What text encoders and autoencoder hold beside their weights.
pub(super) fn encoding(source: &ModelSource, encoders: &[&'static str]) -> Result<Encoding, ModelError> {
    let pixels = Encoding::of_pixels(AutoencoderKlConfig::read(source)?.numbers_per_pixel());
    encoders.iter().try_fold(pixels, |sum, name| Ok(sum.then(ClipTextConfig::read(source, name)?.encoding())))
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
    /// The same of scores and values.
    attention: u64,
    /// Numbers that a backward needs.
    kept: u64,
    /// The most that are alive at one time in drawing, beside what the way up meets again.
    drawing: u64,
}

impl Count {
    fn unet(&mut self, config: &UnetConfig, latents: [usize; 2]) {
        let pixels =
            |stage: usize| -> u64 { latents.iter().map(|side| side.div_ceil(1 << stage) as u64).product() };
        let channels: Vec<u64> = config.block_out_channels.iter().map(|count| *count as u64).collect();
        let (last, in_channels) = (config.stages() - 1, config.in_channels as u64);
        let mut skipped = vec![(channels[0], pixels(0))];
        self.convolution(in_channels, channels[0], pixels(0));
        for stage in 0..=last {
            let mut input = channels[stage.saturating_sub(1)];
            for _ in 0..config.layers_per_block {
                self.resnet(input, channels[stage], pixels(stage));
                self.transformer(config, stage, pixels(stage), config.attends_down(stage));
                input = channels[stage];
                skipped.push((input, pixels(stage)));
            }
            if stage < last {
                self.convolution(input, input, pixels(stage + 1));
                skipped.push((input, pixels(stage + 1)));
            }
        }
        let across: u64 = skipped.iter().map(|(channels, pixels)| channels * pixels).sum();
        for _ in 0..2 {
            self.resnet(channels[last], channels[last], pixels(last));
        }
        self.transformer(config, last, pixels(last), true);
        let mut input = channels[last];
        for stage in (0..=last).rev() {
            for _ in 0..=config.layers_per_block {
                let (beside, _) = skipped.pop().unwrap_or((0, 0));
                self.resnet(input + beside, channels[stage], pixels(stage));
                self.transformer(config, stage, pixels(stage), config.attends_up(stage));
                input = channels[stage];
            }
            if stage > 0 {
                self.convolution(input, input, pixels(stage - 1));
            }
        }
        self.convolution(channels[0], in_channels, pixels(0));
        self.drawing += across;
    }

    /// Its input by rows, which burn makes of it, is alive beside it.
    fn convolution(&mut self, input: u64, output: u64, pixels: u64) {
        self.weights += 9 * input * output * pixels;
        self.drawing = self.drawing.max((9 * input + input + output) * pixels);
        self.kept += input * pixels;
    }

    /// Inputs of both norms, their results before and after the activation, and the inputs of both convolutions.
    fn resnet(&mut self, input: u64, output: u64, pixels: u64) {
        self.convolution(input, output, pixels);
        self.convolution(output, output, pixels);
        if input != output {
            self.weights += input * output * pixels;
        }
        self.kept += 3 * (input + output) * pixels;
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
        self.drawing = self.drawing.max((10 * width + heads * text) * pixels);
        // The stream and norms (6), query, key and value as they are and packed (6), the query to the text and both
        // outputs (3), the MLP's halves, gate and product (16); keys and values of the text; its scores.
        let adapted = self.rank.map_or(0, |rank| 8 * rank as u64);
        let kept = (31 * width + adapted + heads * text) * pixels + 2 * width * text;
        self.kept += depth * kept;
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
            let matrices = tensors.iter().filter(|(key, shape)| counts(key, shape));
            let numbers: usize = matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(count.weights, numbers as u64, "{family}");
        }
    }

    #[test]
    fn drawing_holds_less_than_training_and_adapters_cost_a_shorter_backward() {
        let source = ModelSource::from(&golden("sdxl/model"));
        let of = |lora_rank| {
            let workload = Workload {
                height: 512,
                width: 512,
                batch_size: 2,
                text_tokens: 77,
                lora_rank,
                components: crate::Components::All,
            };
            evaluation(&source, &workload).unwrap()
        };
        let (full, adapters) = (of(None), of(Some(4)));
        assert_eq!(full.image_tokens, 64 * 64);
        assert!(full.activations.drawing < full.activations.training);
        assert_eq!(full.flops.forward, adapters.flops.forward);
        assert!(adapters.flops.backward < full.flops.backward);
    }
}
