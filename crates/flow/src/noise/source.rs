//! Where the noise that a picture starts from comes from.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::{PhiloxGenerator, TorchGenerator};
use crate::FlowError;

/// How a run draws its initial noise. The default is torch's CPU generator in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NoiseSource {
    /// The generator.
    pub rand_device: RandDevice,
    /// The type it draws in. The peers take the model's.
    pub dtype: NoiseType,
}

/// The random number generator that draws initial noise, named as torch names its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RandDevice {
    /// torch's CPU generator, a Mersenne Twister.
    #[default]
    Cpu,
    /// torch's CUDA generator, Philox.
    Cuda,
}

/// The float type of a draw. Its values are handed on as f32, which holds them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NoiseType {
    /// 24 significant bits.
    #[default]
    F32,
    /// 11 significant bits.
    F16,
    /// 8 significant bits.
    Bf16,
}

/// [`NoiseSource::latent_noise`] of the default source:
/// `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`.
pub fn latent_noise<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    NoiseSource::default().latent_noise(seed, shape, device)
}

impl NoiseSource {
    /// The noise a picture starts from: `torch.randn(shape, generator, dtype)` after `manual_seed(seed)`, as f32
    /// on `device`.
    pub fn latent_noise<const D: usize>(&self, seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
        let count = shape.iter().product();
        let values = match self.rand_device {
            RandDevice::Cpu => TorchGenerator::new(seed).randn_as(count, self.dtype),
            RandDevice::Cuda => self.dtype.round(PhiloxGenerator::new(seed).randn(count)),
        };
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

impl fmt::Display for RandDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for RandDevice {
    type Err = FlowError;

    fn from_str(text: &str) -> Result<Self, FlowError> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(FlowError::Request {
                field: "rand_device",
                found: format!("{text:?}"),
                expected: "cpu or cuda",
            }),
        }
    }
}

impl NoiseType {
    pub(super) fn round(self, mut values: Vec<f32>) -> Vec<f32> {
        match self {
            Self::F32 => {}
            Self::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
            Self::Bf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        }
        values
    }
}
