//! Activations by the names that configs give them.

use burn::tensor::Tensor;
use fewstep_kernels::{Gelu, gelu};
use serde::Deserialize;

/// An activation of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Activation {
    /// x · Φ(x), Φ the normal distribution function.
    #[serde(rename = "gelu")]
    Gelu,
    /// Its tanh approximation.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// x · sigmoid(1.702 x).
    #[serde(rename = "quick_gelu")]
    QuickGelu,
}

impl Activation {
    /// Applies it to every element.
    pub(crate) fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Gelu => gelu(x, Gelu::Exact),
            Self::GeluTanh => gelu(x, Gelu::Tanh),
            Self::QuickGelu => gelu(x, Gelu::Sigmoid),
        }
    }
}
