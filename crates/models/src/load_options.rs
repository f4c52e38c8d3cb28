//! How weights are loaded.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use fewstep_flow::noise::NoiseType;

use crate::{Conventions, ModelError, NamedMapper, WeightType, map_named};

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
    /// latents, pixels), are rounded to this type; the arithmetic inside a part stays f32. Matrices are stored in it.
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

impl LoadOptions {
    /// A text encoder, or the autoencoder, where they are asked for.
    pub(crate) fn encoder<T>(
        &self,
        load: impl FnOnce() -> Result<T, ModelError>,
    ) -> Result<Option<T>, ModelError> {
        (self.components != Components::Denoiser).then(load).transpose()
    }

    /// The denoiser, where it is asked for.
    pub(crate) fn denoiser<T>(
        &self,
        load: impl FnOnce() -> Result<T, ModelError>,
    ) -> Result<Option<T>, ModelError> {
        (self.components != Components::Encoders).then(load).transpose()
    }
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
        half => values.cast(half.dtype()).cast(DType::F32),
    }
}

/// The type that a parameter of a rank is stored in. Matrices are nearly all there is of a model, and linear layers and
/// tables read any type; the rest takes part in f32 arithmetic, and is only rounded.
pub(crate) fn storage(rank: usize, dtype: WeightType) -> WeightType {
    if rank == 2 { dtype } else { WeightType::F32 }
}

/// Rounds every parameter to the nearest number of a type, and stores matrices in it.
pub(crate) fn store_weights<M: Module>(module: M, dtype: WeightType) -> M {
    if dtype == WeightType::F32 { module } else { map_named(module, &mut Store(dtype)) }
}

struct Store(WeightType);

impl NamedMapper for Store {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|values| match storage(D, self.0) {
            WeightType::F32 => rounded(values, self.0),
            half => values.cast(half.dtype()),
        })
    }
}

/// Values as f32.
pub(crate) fn widened<const D: usize>(values: Tensor<D>) -> Tensor<D> {
    if values.dtype() == DType::F32 { values } else { values.cast(DType::F32) }
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
        let rounded = |dtype| values(store_weights(linear.clone(), dtype).weight.val());
        assert_close(&rounded(WeightType::BF16), &[1.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F16), &[1.0 + 3.0 / 1024.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F32), &[1.003, -1.0002], 0.0);
    }

    #[test]
    fn matrices_are_stored_in_the_type_and_the_rest_is_rounded_in_f32() {
        let device = Device::flex();
        let mut linear = Linear::unfilled(1, 1, true, &device);
        linear.weight = Param::from_tensor(Tensor::from_floats([[1.003]], &device));
        linear.bias = Some(Param::from_tensor(Tensor::from_floats([1.003], &device)));
        let stored = store_weights(linear, WeightType::BF16);
        let bias = stored.bias.expect("it had one").val();
        assert_eq!((stored.weight.val().dtype(), bias.dtype()), (DType::BF16, DType::F32));
        assert_close(&values(bias), &[1.0], 0.0);
    }

    #[test]
    fn gradients_pass_a_rounding() {
        let device = Device::flex().autodiff();
        let x = Tensor::<1>::from_floats([1.003, -2.5], &device).require_grad();
        let gradients = (rounded(x.clone(), WeightType::BF16) * 3.0).sum().backward();
        assert_close(&values(x.grad(&gradients).expect("x has a gradient")), &[3.0, 3.0], 0.0);
    }
}
