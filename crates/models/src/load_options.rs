//! How weights are loaded.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use fewstep_flow::noise::NoiseType;

use crate::{Conventions, NamedMapper, WeightType, map_named};

/// Names of [`LoadOptions::dtype`].
pub const DTYPES: [(&str, WeightType); 3] =
    [("f32", WeightType::F32), ("f16", WeightType::F16), ("bf16", WeightType::BF16)];

/// How a model is loaded, whatever its family.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the model runs; its plain side.
    pub device: Device,
    /// What the peers compute differently.
    pub conventions: Conventions,
    /// Weights, and what the peers hand from one part to the next (noise, text states, timesteps, velocities,
    /// latents, pixels), are rounded to this type; the arithmetic inside a part stays f32.
    pub dtype: WeightType,
    /// Which parts are loaded.
    pub components: Components,
}

/// The parts of a model that are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Components {
    /// All.
    All,
    /// The denoiser alone, for data whose text states and latents are stored: the weights of text encoder and
    /// autoencoder need not be there.
    Denoiser,
    /// Text encoder and autoencoder, which turn prompts and pictures into data: the denoiser's weights need not be
    /// there.
    Encoders,
}

impl Default for LoadOptions {
    /// The CPU, the published model's conventions, f32.
    fn default() -> Self {
        Self {
            device: Device::flex(),
            conventions: Conventions::default(),
            dtype: WeightType::F32,
            components: Components::All,
        }
    }
}

impl From<WeightType> for NoiseType {
    fn from(dtype: WeightType) -> Self {
        match dtype {
            WeightType::F32 => Self::F32,
            WeightType::F16 => Self::F16,
            WeightType::BF16 => Self::Bf16,
        }
    }
}

/// Every value as the nearest number of a type, stored as f32. Gradients pass.
pub(crate) fn rounded<const D: usize>(values: Tensor<D>, dtype: WeightType) -> Tensor<D> {
    match dtype {
        WeightType::F32 => values,
        WeightType::F16 => values.cast(DType::F16).cast(DType::F32),
        WeightType::BF16 => values.cast(DType::BF16).cast(DType::F32),
    }
}

/// Rounds every parameter to the nearest number of a type.
pub(crate) fn round_weights<M: Module>(module: M, dtype: WeightType) -> M {
    if dtype == WeightType::F32 { module } else { map_named(module, &mut Round(dtype)) }
}

struct Round(WeightType);

impl NamedMapper for Round {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|values| rounded(values, self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Linear;
    use fewstep_testkit::{assert_close, values};

    #[test]
    fn rounding_goes_to_the_nearest_number_of_the_type() {
        let device = Device::flex();
        let mut linear = Linear::unfilled(2, 1, false, &device);
        linear.weight = Param::from_tensor(Tensor::from_floats([[1.003, -1.0002]], &device));
        // bf16 has 8 bits of precision (steps of 2⁻⁷ above 1), f16 has 11 (2⁻¹⁰).
        let rounded = |dtype| values(round_weights(linear.clone(), dtype).weight.val());
        assert_close(&rounded(WeightType::BF16), &[1.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F16), &[1.0 + 3.0 / 1024.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F32), &[1.003, -1.0002], 0.0);
    }

    #[test]
    fn gradients_pass_a_rounding() {
        let device = Device::flex().autodiff();
        let x = Tensor::<1>::from_floats([1.003, -2.5], &device).require_grad();
        let gradients = (rounded(x.clone(), WeightType::BF16) * 3.0).sum().backward();
        assert_close(&values(x.grad(&gradients).expect("x has a gradient")), &[3.0, 3.0], 0.0);
    }
}
