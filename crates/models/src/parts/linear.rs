//! A projection as every family uses it: dense, with or without a low-rank adapter beside it.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{HalfType, LowRank, Projection, linear};

use crate::weights::unfilled;

/// `y = x Wᵀ + b`, plus the adapter's branch where one is attached.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`, the layout of the weight files: nothing is transposed on loading or saving. f32, or where it is
    /// frozen also bf16 or f16.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// The adapter; `None` in the base model.
    pub lora: Option<LowRankAdapter>,
    /// Computes with the weight's nearest numbers of this type; gradients pass.
    #[module(skip)]
    pub(crate) rounded_to: Option<HalfType>,
}

/// A low-rank update `scale · up · down` of one [`Linear`] (LoRA, arXiv 2106.09685).
#[derive(Module, Debug)]
pub struct LowRankAdapter {
    /// `[rank, in]`, `lora_A` in weight files.
    pub down: Param<Tensor<2>>,
    /// `[out, rank]`, `lora_B` in weight files.
    pub up: Param<Tensor<2>>,
    /// alpha / rank.
    pub scale: f32,
}

impl Linear {
    /// A projection to be filled by the loader or the initialiser.
    pub(crate) fn unfilled(input: usize, output: usize, bias: bool, device: &Device) -> Self {
        Self {
            weight: unfilled([output, input], device),
            bias: bias.then(|| unfilled([output], device)),
            lora: None,
            rounded_to: None,
        }
    }

    /// The tensors the kernels take.
    pub(crate) fn projection(&self) -> Projection {
        Projection {
            weight: self.weight.val(),
            rounded_to: self.rounded_to,
            bias: self.bias.as_ref().map(Param::val),
            low_rank: self.lora.as_ref().map(|lora| LowRank {
                down: lora.down.val(),
                up: lora.up.val(),
                scale: lora.scale,
            }),
        }
    }

    /// Applies the projection to the last axis.
    ///
    /// # Shapes
    /// - `x`: `[.., in]`; output `[.., out]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        linear(x, self.projection())
    }
}
