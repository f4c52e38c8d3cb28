//! Normalisations with a weight and a bias per channel.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{After, Modulation, group_norm, norm_modulate};

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
        self.followed_by(After::Nothing, x)
    }

    /// The same, then SiLU.
    pub(crate) fn forward_silu(&self, x: Tensor<4>) -> Tensor<4> {
        self.followed_by(After::Silu, x)
    }

    fn followed_by(&self, after: After, x: Tensor<4>) -> Tensor<4> {
        let norm = fewstep_kernels::GroupNorm { groups: self.groups, epsilon: self.epsilon, after };
        group_norm(x, self.weight.val(), self.bias.val(), norm)
    }
}

/// One number per channel, `[1, C, 1, 1]`.
pub(crate) fn per_channel(values: &[f32], device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len(), 1, 1]), device)
}
