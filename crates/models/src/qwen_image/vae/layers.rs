//! The layers of the autoencoder, on the one frame a picture has.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{After, AttentionOptions, ConvShape, attention, channel_norm, conv2d};

use crate::parts::conv::{Conv2d, Padding};
use crate::weights::unfilled;

/// Sees a state with its name.
pub(super) type Observer<'a> = dyn FnMut(&str, &Tensor<4>) + 'a;

/// A convolution over space and past frames.
///
/// Before the first frame there are only zeros, so of the kernel's frames the last alone meets a picture.
#[derive(Module, Debug)]
pub(super) struct CausalConv {
    /// `[out, in, frames, k, k]`
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
}

impl CausalConv {
    /// With a cubic kernel.
    pub(super) fn unfilled(input: usize, output: usize, kernel: usize, device: &Device) -> Self {
        Self {
            weight: unfilled([output, input, kernel, kernel, kernel], device),
            bias: unfilled([output], device),
        }
    }

    /// With a kernel of three frames and one pixel.
    fn unfilled_over_time(input: usize, output: usize, device: &Device) -> Self {
        Self { weight: unfilled([output, input, 3, 1, 1], device), bias: unfilled([output], device) }
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = last_frame(self.weight.val()).squeeze_dim::<4>(2); // [out, in, k, k]
        let [_, _, kernel, _] = weight.dims();
        conv2d(x, weight, Some(self.bias.val()), ConvShape::same(kernel / 2))
    }
}

/// The last entry of the third axis of a causal convolution's weight.
pub(super) fn last_frame<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    let frames = weight.dims()[2];
    weight.slice_dim(2, frames - 1..frames)
}

/// [`channel_norm`] over frames.
#[derive(Module, Debug)]
pub(super) struct Norm {
    /// `[C, 1, 1, 1]`
    gamma: Param<Tensor<4>>,
}

impl Norm {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        Self { gamma: unfilled([channels, 1, 1, 1], device) }
    }

    pub(super) fn forward(&self, x: Tensor<4>, after: After) -> Tensor<4> {
        channel_norm(x, self.gamma.val().flatten(0, 3), after)
    }
}

/// [`channel_norm`] within one frame: files give its weight another rank.
#[derive(Module, Debug)]
struct FrameNorm {
    /// `[C, 1, 1]`
    gamma: Param<Tensor<3>>,
}

/// Two convolutions beside a shortcut.
#[derive(Module, Debug)]
pub(super) struct ResidualBlock {
    norm1: Norm,
    conv1: CausalConv,
    norm2: Norm,
    conv2: CausalConv,
    /// Where the number of channels changes.
    conv_shortcut: Option<CausalConv>,
}

impl ResidualBlock {
    pub(super) fn unfilled(input: usize, output: usize, device: &Device) -> Self {
        Self {
            norm1: Norm::unfilled(input, device),
            conv1: CausalConv::unfilled(input, output, 3, device),
            norm2: Norm::unfilled(output, device),
            conv2: CausalConv::unfilled(output, output, 3, device),
            conv_shortcut: (input != output).then(|| CausalConv::unfilled(input, output, 1, device)),
        }
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let hidden = self.conv1.forward(self.norm1.forward(x.clone(), After::Silu));
        let hidden = self.conv2.forward(self.norm2.forward(hidden, After::Silu));
        match &self.conv_shortcut {
            Some(shortcut) => hidden + shortcut.forward(x),
            None => hidden + x,
        }
    }
}

/// Self-attention of all pixels with one head.
#[derive(Module, Debug)]
pub(super) struct AttentionBlock {
    norm: FrameNorm,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        Self {
            norm: FrameNorm { gamma: unfilled([channels, 1, 1], device) },
            to_qkv: Conv2d::unfilled(channels, 3 * channels, 1, device),
            proj: Conv2d::unfilled(channels, channels, 1, device),
        }
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let normed = channel_norm(x.clone(), self.norm.gamma.val().flatten(0, 2), After::Nothing);
        let qkv = self
            .to_qkv
            .forward(normed)
            .reshape([batch, 3, 1, channels, height * width])
            .permute([1, 0, 2, 4, 3]); // [3, B, 1, H · W, C]
        let attended = attention(qkv, AttentionOptions::default()); // [B, H · W, C]
        let attended = attended.swap_dims(1, 2).reshape([batch, channels, height, width]);
        self.proj.forward(attended) + x
    }
}

/// A residual block, attention, and another residual block.
#[derive(Module, Debug)]
pub(super) struct MidBlock {
    attentions: Vec<AttentionBlock>,
    resnets: Vec<ResidualBlock>,
}

impl MidBlock {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        let block = || ResidualBlock::unfilled(channels, channels, device);
        Self { attentions: vec![AttentionBlock::unfilled(channels, device)], resnets: vec![block(), block()] }
    }

    pub(super) fn forward(&self, x: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.resnets[0].forward(x);
        for (attention, block) in self.attentions.iter().zip(&self.resnets[1..]) {
            x = attention.forward(x);
            observe("mid.attn", &x);
            x = block.forward(x);
        }
        observe("mid", &x);
        x
    }
}

/// Halves or doubles the resolution.
#[derive(Module, Debug)]
pub(super) struct Resampler {
    resample: Conv2d,
    /// Resamples time: it is in the files and never applied to a picture.
    time_conv: Option<CausalConv>,
}

impl Resampler {
    /// For [`Resampler::halve`].
    pub(super) fn unfilled_down(channels: usize, over_time: bool, device: &Device) -> Self {
        Self {
            resample: Conv2d::unfilled(channels, channels, 3, device),
            time_conv: over_time.then(|| CausalConv::unfilled_over_time(channels, channels, device)),
        }
    }

    /// For [`Resampler::double`], which halves the channels.
    pub(super) fn unfilled_up(channels: usize, over_time: bool, device: &Device) -> Self {
        Self {
            resample: Conv2d::unfilled(channels, channels / 2, 3, device),
            time_conv: over_time.then(|| CausalConv::unfilled_over_time(channels, 2 * channels, device)),
        }
    }

    /// Frees what a picture does not need.
    pub(super) fn drop_time(&mut self) {
        self.time_conv = None;
    }

    /// `[B, C, H, W]` to `[B, C, H/2, W/2]`.
    pub(super) fn halve(&self, x: Tensor<4>) -> Tensor<4> {
        self.resample.halve(x, Padding::RightAndBelow)
    }

    /// `[B, C, H, W]` to `[B, C/2, 2H, 2W]`.
    pub(super) fn double(&self, x: Tensor<4>) -> Tensor<4> {
        self.resample.double(x)
    }
}
