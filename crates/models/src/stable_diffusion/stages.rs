//! The stages of the UNet: residual blocks, each with attention after it where the stage attends, and a change of
//! resolution at the end.
//!
//! Where blocks are recomputed, each residual block and each block of a transformer is one node of the graph.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::recomputed;

use super::config::UnetConfig;
use super::spatial_transformer::SpatialTransformer;
use crate::parts::conv::{Padding, Resample};
use crate::parts::linear::Linear;
use crate::parts::resnet::{Groups, ResnetBlock};

#[derive(Module, Debug)]
pub(super) struct DownBlock {
    resnets: Vec<ResnetBlock>,
    /// One after each residual block, or none.
    attentions: Vec<SpatialTransformer>,
    /// One, but in the last block.
    downsamplers: Vec<Resample>,
}

#[derive(Module, Debug)]
pub(super) struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<SpatialTransformer>,
}

#[derive(Module, Debug)]
pub(super) struct UpBlock {
    resnets: Vec<ResnetBlock>,
    /// One after each residual block, or none.
    attentions: Vec<SpatialTransformer>,
    /// One, but in the last block.
    upsamplers: Vec<Resample>,
}

/// What every block of one evaluation shares.
pub(super) struct Shared {
    /// SiLU of the time embedding, `[B, 4 · width]`.
    pub(super) time: Tensor<2>,
    pub(super) text: Tensor<3>,
    /// Backward passes compute the inside of each block again instead of keeping it.
    pub(super) recomputes: bool,
}

impl UnetConfig {
    fn groups(&self) -> Groups {
        Groups { groups: self.norm_num_groups, epsilon: self.norm_eps }
    }

    fn resnet(&self, ends: [usize; 2], device: &Device) -> ResnetBlock {
        ResnetBlock::unfilled(ends, Some(self.time_width()), self.groups(), device)
    }

    fn attentions(
        &self,
        wanted: bool,
        count: usize,
        stage: usize,
        device: &Device,
    ) -> Vec<SpatialTransformer> {
        let count = if wanted { count } else { 0 };
        (0..count).map(|_| SpatialTransformer::unfilled(self, stage, device)).collect()
    }
}

impl DownBlock {
    pub(super) fn unfilled(config: &UnetConfig, stage: usize, device: &Device) -> Self {
        let channels = &config.block_out_channels;
        let (count, output) = (config.layers_per_block, channels[stage]);
        let input = |index| if index == 0 { channels[stage.saturating_sub(1)] } else { output };
        let last = stage + 1 == config.stages();
        Self {
            resnets: (0..count).map(|index| config.resnet([input(index), output], device)).collect(),
            attentions: config.attentions(config.attends_down(stage), count, stage, device),
            downsamplers: (!last).then(|| Resample::unfilled(output, device)).into_iter().collect(),
        }
    }

    /// Appends every state that the way up meets again.
    pub(super) fn forward(
        &self,
        mut x: Tensor<4>,
        shared: &Shared,
        skipped: &mut Vec<Tensor<4>>,
    ) -> Tensor<4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            x = residual(resnet, x, None, shared);
            x = attend(&self.attentions, index, x, shared);
            skipped.push(x.clone());
        }
        for downsampler in &self.downsamplers {
            x = downsampler.conv.halve(x, Padding::Around);
            skipped.push(x.clone());
        }
        x
    }

    /// Its linear projections by their names in a module that is called `block`.
    pub(super) fn linears(&mut self, block: &str) -> Vec<(String, &mut Linear)> {
        named(block, &mut self.attentions, &mut self.resnets)
    }
}

impl MidBlock {
    pub(super) fn unfilled(config: &UnetConfig, device: &Device) -> Self {
        let last = config.stages() - 1;
        let resnet = || config.resnet([config.block_out_channels[last]; 2], device);
        Self { resnets: vec![resnet(), resnet()], attentions: config.attentions(true, 1, last, device) }
    }

    pub(super) fn forward(&self, x: Tensor<4>, shared: &Shared) -> Tensor<4> {
        let x = attend(&self.attentions, 0, residual(&self.resnets[0], x, None, shared), shared);
        residual(&self.resnets[1], x, None, shared)
    }

    /// As [`DownBlock::linears`].
    pub(super) fn linears(&mut self, block: &str) -> Vec<(String, &mut Linear)> {
        named(block, &mut self.attentions, &mut self.resnets)
    }
}

impl UpBlock {
    pub(super) fn unfilled(config: &UnetConfig, stage: usize, device: &Device) -> Self {
        let channels = &config.block_out_channels;
        let (last, count, output) = (config.stages() - 1, config.layers_per_block + 1, channels[stage]);
        let before = channels[(stage + 1).min(last)];
        let below = channels[stage.saturating_sub(1)];
        let ends = |index| {
            let input = if index == 0 { before } else { output };
            let skipped = if index + 1 == count { below } else { output };
            [input + skipped, output]
        };
        Self {
            resnets: (0..count).map(|index| config.resnet(ends(index), device)).collect(),
            attentions: config.attentions(config.attends_up(stage), count, stage, device),
            upsamplers: (stage > 0).then(|| Resample::unfilled(output, device)).into_iter().collect(),
        }
    }

    /// Takes its states of the way down off the end.
    pub(super) fn forward(
        &self,
        mut x: Tensor<4>,
        shared: &Shared,
        skipped: &mut Vec<Tensor<4>>,
    ) -> Tensor<4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            let beside = skipped.pop().expect("as many states as the way down has left");
            x = residual(resnet, x, Some(beside), shared);
            x = attend(&self.attentions, index, x, shared);
        }
        for upsampler in &self.upsamplers {
            // Halving odd sides has rounded up.
            let [_, _, height, width] = skipped.last().expect("states of the next block").dims();
            x = upsampler.conv.enlarge(x, [height, width]);
        }
        x
    }

    /// As [`DownBlock::linears`].
    pub(super) fn linears(&mut self, block: &str) -> Vec<(String, &mut Linear)> {
        named(block, &mut self.attentions, &mut self.resnets)
    }
}

fn named<'a>(
    block: &str,
    attentions: &'a mut [SpatialTransformer],
    resnets: &'a mut [ResnetBlock],
) -> Vec<(String, &'a mut Linear)> {
    let mut linears = Vec::new();
    for (index, attention) in attentions.iter_mut().enumerate() {
        let inside = attention.linears().into_iter();
        linears.extend(inside.map(|(name, linear)| (format!("{block}.attentions.{index}.{name}"), linear)));
    }
    for (index, resnet) in resnets.iter_mut().enumerate() {
        let time = resnet.time_emb_proj.iter_mut();
        linears.extend(time.map(|linear| (format!("{block}.resnets.{index}.time_emb_proj"), linear)));
    }
    linears
}

/// A residual block over a state, on the way up with the channels of one of the way down behind its own.
fn residual(resnet: &ResnetBlock, x: Tensor<4>, beside: Option<Tensor<4>>, shared: &Shared) -> Tensor<4> {
    if !shared.recomputes {
        return resnet.forward(joined(x, beside), Some(&shared.time));
    }
    let [batch, _, height, width] = x.dims();
    let time = shared.time.clone().unsqueeze_dim(1);
    let forward = move |resnet: &ResnetBlock, x: Tensor<3>, time: Tensor<3>| {
        let channels = x.dims()[1];
        let x = x.reshape([batch, channels, height, width]);
        flat(resnet.forward(x, Some(&time.squeeze_dim(1))))
    };
    let output = match beside {
        None => recomputed(resnet, [flat(x), time], move |resnet, [x, time]| forward(resnet, x, time)),
        // Joined inside: both are kept already, where they came from.
        Some(beside) => {
            recomputed(resnet, [flat(x), flat(beside), time], move |resnet, [x, beside, time]| {
                forward(resnet, joined(x, Some(beside)), time)
            })
        }
    };
    let channels = output.dims()[1];
    output.reshape([batch, channels, height, width])
}

/// The channels of both, if there are two.
fn joined<const D: usize>(x: Tensor<D>, beside: Option<Tensor<D>>) -> Tensor<D> {
    match beside {
        Some(beside) => Tensor::cat(vec![x, beside], 1),
        None => x,
    }
}

/// `[B, C, H, W]` to `[B, C, H · W]`.
fn flat(x: Tensor<4>) -> Tensor<3> {
    x.flatten(2, 3)
}

/// The attention after a block's residual block, where there is one.
fn attend(attentions: &[SpatialTransformer], index: usize, x: Tensor<4>, shared: &Shared) -> Tensor<4> {
    match attentions.get(index) {
        Some(attention) => attention.forward(x, &shared.text, shared.recomputes),
        None => x,
    }
}
