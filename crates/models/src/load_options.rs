//! How weights are loaded.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};

use crate::{Conventions, NamedMapper, WeightType, map_named};

/// How a model is loaded, whatever its family.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the model runs; its plain side.
    pub device: Device,
    /// What the peers compute differently.
    pub conventions: Conventions,
    /// Weights are rounded to this type; arithmetic stays f32.
    pub dtype: WeightType,
}

impl Default for LoadOptions {
    /// The CPU, the published model's conventions, f32.
    fn default() -> Self {
        Self { device: Device::flex(), conventions: Conventions::default(), dtype: WeightType::F32 }
    }
}

/// Rounds every parameter to the nearest number of a type.
pub(crate) fn round_weights<M: Module>(module: M, dtype: WeightType) -> M {
    match dtype {
        WeightType::F32 => module,
        WeightType::F16 => map_named(module, &mut Round(DType::F16)),
        WeightType::BF16 => map_named(module, &mut Round(DType::BF16)),
    }
}

struct Round(DType);

impl NamedMapper for Round {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|values| values.cast(self.0).cast(DType::F32))
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
        let mut linear = Linear::zeros(2, 1, false, &device);
        linear.weight = Param::from_tensor(Tensor::from_floats([[1.003, -1.0002]], &device));
        // bf16 has 8 bits of precision (steps of 2⁻⁷ above 1), f16 has 11 (2⁻¹⁰).
        let rounded = |dtype| values(round_weights(linear.clone(), dtype).weight.val());
        assert_close(&rounded(WeightType::BF16), &[1.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F16), &[1.0 + 3.0 / 1024.0, -1.0], 0.0);
        assert_close(&rounded(WeightType::F32), &[1.003, -1.0002], 0.0);
    }
}
