//! Encoder and decoder.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{AttentionOptions, attention, linear_concat};

use super::config::AutoencoderKlConfig;
use crate::parts::attention::by_heads;
use crate::parts::conv::{Conv2d, Padding, Resample};
use crate::parts::linear::Linear;
use crate::parts::norm::GroupNorm;
use crate::parts::resnet::{Groups, ResnetBlock};

/// Sees a state with its name.
pub(super) type Observer<'a> = dyn FnMut(&str, &Tensor<4>) + 'a;

/// Of every norm; no config says another.
const EPSILON: f32 = 1e-6;

#[derive(Module, Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Module, Debug)]
struct DownBlock {
    resnets: Vec<ResnetBlock>,
    /// One, but in the last block.
    downsamplers: Vec<Resample>,
}

#[derive(Module, Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Module, Debug)]
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    /// One, but in the last block.
    upsamplers: Vec<Resample>,
}

/// A residual block, attention, and another residual block.
#[derive(Module, Debug)]
struct MidBlock {
    attentions: Vec<Attention>,
    resnets: Vec<ResnetBlock>,
}

/// Self-attention of all pixels with one head.
#[derive(Module, Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl AutoencoderKlConfig {
    fn group_norm(&self, channels: usize, device: &Device) -> GroupNorm {
        GroupNorm::unfilled(self.norm_num_groups, channels, EPSILON, device)
    }

    fn resnet(&self, ends: [usize; 2], device: &Device) -> ResnetBlock {
        ResnetBlock::unfilled(ends, None, Groups { groups: self.norm_num_groups, epsilon: EPSILON }, device)
    }

    /// Blocks in a row, the first of which changes the channels.
    fn resnets(&self, count: usize, [input, output]: [usize; 2], device: &Device) -> Vec<ResnetBlock> {
        (0..count)
            .map(|index| self.resnet([if index == 0 { input } else { output }, output], device))
            .collect()
    }
}

impl Encoder {
    pub(super) fn unfilled(config: &AutoencoderKlConfig, device: &Device) -> Self {
        let stages = &config.block_out_channels;
        let last = stages.len() - 1;
        let block = |(stage, output): (usize, &usize)| DownBlock {
            resnets: config.resnets(
                config.layers_per_block,
                [stages[stage.saturating_sub(1)], *output],
                device,
            ),
            downsamplers: (stage < last).then(|| Resample::unfilled(*output, device)).into_iter().collect(),
        };
        Self {
            conv_in: Conv2d::unfilled(3, stages[0], 3, device),
            down_blocks: stages.iter().enumerate().map(block).collect(),
            mid_block: MidBlock::unfilled(config, device),
            conv_norm_out: config.group_norm(stages[last], device),
            conv_out: Conv2d::unfilled(stages[last], 2 * config.latent_channels, 3, device),
        }
    }

    /// `[B, 3, height, width]` to `[B, 2C, H, W]`.
    pub(super) fn forward(&self, pixels: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.conv_in.forward(pixels);
        observe("conv_in", &x);
        for (index, block) in self.down_blocks.iter().enumerate() {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            x = block.downsamplers.iter().fold(x, |x, down| down.conv.halve(x, Padding::RightAndBelow));
            observe(&format!("down{index}"), &x);
        }
        let x = self.mid_block.forward(x, observe);
        self.conv_out.forward(self.conv_norm_out.forward_silu(x))
    }
}

impl Decoder {
    pub(super) fn unfilled(config: &AutoencoderKlConfig, device: &Device) -> Self {
        let stages: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let last = stages.len() - 1;
        let block = |(stage, output): (usize, &usize)| UpBlock {
            resnets: config.resnets(
                config.layers_per_block + 1,
                [stages[stage.saturating_sub(1)], *output],
                device,
            ),
            upsamplers: (stage < last).then(|| Resample::unfilled(*output, device)).into_iter().collect(),
        };
        Self {
            conv_in: Conv2d::unfilled(config.latent_channels, stages[0], 3, device),
            mid_block: MidBlock::unfilled(config, device),
            up_blocks: stages.iter().enumerate().map(block).collect(),
            conv_norm_out: config.group_norm(stages[last], device),
            conv_out: Conv2d::unfilled(stages[last], 3, 3, device),
        }
    }

    /// `[B, C, H, W]` to `[B, 3, height, width]`.
    pub(super) fn forward(&self, latents: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let x = self.conv_in.forward(latents);
        observe("conv_in", &x);
        let mut x = self.mid_block.forward(x, observe);
        for (index, block) in self.up_blocks.iter().enumerate() {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
            x = block.upsamplers.iter().fold(x, |x, up| up.conv.double(x));
            observe(&format!("up{index}"), &x);
        }
        self.conv_out.forward(self.conv_norm_out.forward_silu(x))
    }
}

impl MidBlock {
    fn unfilled(config: &AutoencoderKlConfig, device: &Device) -> Self {
        let channels = config.block_out_channels[config.block_out_channels.len() - 1];
        let attention = || Attention::unfilled(config, channels, device);
        Self {
            attentions: config.mid_block_add_attention.then(attention).into_iter().collect(),
            resnets: config.resnets(2, [channels; 2], device),
        }
    }

    fn forward(&self, x: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.resnets[0].forward(x, None);
        for attention in &self.attentions {
            x = attention.forward(x);
            observe("mid.attn", &x);
        }
        let x = self.resnets[1].forward(x, None);
        observe("mid", &x);
        x
    }
}

impl Attention {
    fn unfilled(config: &AutoencoderKlConfig, channels: usize, device: &Device) -> Self {
        let square = || Linear::unfilled(channels, channels, true, device);
        Self {
            group_norm: config.group_norm(channels, device),
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let tokens = height * width;
        let normed = self.group_norm.forward(x.clone()).reshape([batch, channels, tokens]).swap_dims(1, 2);
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let qkv = by_heads(linear_concat(normed, projections), 1); // [3, B, 1, H · W, C]
        let attended = self.to_out.forward(attention(qkv, AttentionOptions::default())); // [B, H · W, C]
        attended.swap_dims(1, 2).reshape([batch, channels, height, width]) + x
    }
}
