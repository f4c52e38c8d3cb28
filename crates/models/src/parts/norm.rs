//! Normalisations with a weight and a bias per channel.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{Modulation, norm_modulate};

use crate::weights::unfilled;

/// A layer norm over the last axis.
#[derive(Module, Debug)]
pub(crate) struct LayerNorm {
    weight: Param<Tensor<1>>,
    bias: Param<Tensor<1>>,
    #[module(skip)]
    epsilon: f32,
}

impl LayerNorm {
    pub(crate) fn unfilled(width: usize, epsilon: f32, device: &Device) -> Self {
        Self { weight: unfilled([width], device), bias: unfilled([width], device), epsilon }
    }

    /// `[B, T, D]` to `[B, T, D]`.
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let batch = x.dims()[0];
        let chunks = Tensor::cat(vec![self.bias.val(), self.weight.val().sub_scalar(1.0)], 0);
        let width = chunks.dims()[0];
        let modulation = chunks.unsqueeze_dim::<2>(0).expand([batch, width]);
        norm_modulate(x, modulation, Modulation { shift: 0, scale: 1 }, self.epsilon)
    }
}

/// A norm over groups of channels and all pixels.
#[derive(Module, Debug)]
pub(crate) struct GroupNorm {
    weight: Param<Tensor<1>>,
    bias: Param<Tensor<1>>,
    #[module(skip)]
    groups: usize,
    #[module(skip)]
    epsilon: f32,
}

impl GroupNorm {
    pub(crate) fn unfilled(groups: usize, channels: usize, epsilon: f32, device: &Device) -> Self {
        Self { weight: unfilled([channels], device), bias: unfilled([channels], device), groups, epsilon }
    }

    /// `[B, C, H, W]` to `[B, C, H, W]`.
    pub(crate) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let grouped: Tensor<3> = x.reshape([batch, self.groups, channels / self.groups * height * width]);
        let centred = grouped.clone() - grouped.mean_dim(2);
        let variance = centred.clone().square().mean_dim(2);
        let normed = centred / variance.add_scalar(self.epsilon).sqrt();
        let per_channel = |parameter: &Param<Tensor<1>>| parameter.val().reshape([1, channels, 1, 1]);
        normed.reshape([batch, channels, height, width]) * per_channel(&self.weight) + per_channel(&self.bias)
    }

    /// The same, then SiLU.
    pub(crate) fn forward_silu(&self, x: Tensor<4>) -> Tensor<4> {
        silu(self.forward(x))
    }
}

/// One number per channel, `[1, C, 1, 1]`.
pub(crate) fn per_channel(values: &[f32], device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len(), 1, 1]), device)
}
