//! Sinusoidal features of the time, as the transformers' time embedders take them.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{Gelu, gelu};

use crate::parts::linear::Linear;

/// Width of the sinusoidal time features.
pub(crate) const TIME_FEATURES: usize = 256;

/// Two linear layers with an activation between them.
#[derive(Module, Debug)]
pub(crate) struct TwoLayers {
    pub(crate) linear_1: Linear,
    pub(crate) linear_2: Linear,
}

impl TwoLayers {
    pub(crate) fn unfilled(input: usize, width: usize, device: &Device) -> Self {
        Self {
            linear_1: Linear::unfilled(input, width, true, device),
            linear_2: Linear::unfilled(width, width, true, device),
        }
    }

    /// Linear, SiLU, linear: `[B, input]` to `[B, D]`.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(silu(self.linear_1.forward(x)))
    }

    /// Linear, GELU, linear: `[B, S, input]` to `[B, S, D]`.
    pub(crate) fn forward_gelu(&self, x: Tensor<3>) -> Tensor<3> {
        self.linear_2.forward(gelu(self.linear_1.forward(x), Gelu::Tanh))
    }
}

/// Sinusoids of `scale · value`, cosines first, frequencies `max_period^(−i/half)`.
///
/// The order of the multiplications is that of diffusers' `get_timestep_embedding`, so that f32
/// rounding agrees with it: (value · frequency) · scale.
///
/// # Shapes
/// - `value`: `[B]`; output `[B, width]` with an even `width`
pub(crate) fn sinusoidal(value: Tensor<1>, width: usize, scale: f32) -> Tensor<2> {
    const MAX_PERIOD: f32 = 10_000.0;
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| (-MAX_PERIOD.ln() * i as f32 / half as f32).exp()).collect();
    let device: Device = value.device();
    let frequencies = Tensor::<1>::from_data(TensorData::new(frequencies, [half]), &device);
    let angle = value.unsqueeze_dim::<2>(1).mul(frequencies.unsqueeze_dim::<2>(0)).mul_scalar(scale);
    Tensor::cat(vec![angle.clone().cos(), angle.sin()], 1)
}
