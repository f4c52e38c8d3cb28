//! Models that were trained to denoise variance-preserving states z = a·x₀ + s·e with a² + s² = 1 (DDPM, arXiv
//! 2006.11239), seen as flow matching.
//!
//! Divided by a + s, such a state stands on the straight path at σ = s/(a + s): z/(a + s) = (1 − σ)·x₀ + σ·e. The same
//! network then has a velocity e − x₀, DDIM's step (arXiv 2010.02502, equation 12 without noise) is Euler's, and so is
//! that of k-diffusion's Euler, whose noise level is s/a = σ/(1 − σ).
//!
//! | here | there |
//! |---|---|
//! | σ ([`crate::SigmaGrid`]) | s/(a + s) |
//! | [`scale`] | 1/(a + s) |
//! | timestep, 0 … T − 1 ([`NoiseTable`]) | t of the betas |

mod config;
mod table;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use config::DiffusionConfig;
pub use table::NoiseTable;

use crate::path::per_sample;

/// What a network was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prediction {
    /// The noise e.
    #[serde(rename = "epsilon")]
    Noise,
    /// a·e − s·x₀ (arXiv 2202.00512, appendix D).
    #[serde(rename = "v_prediction")]
    Angular,
    /// The clean picture x₀.
    #[serde(rename = "sample")]
    Clean,
}

impl Prediction {
    /// The velocity noise − clean of what a network has predicted.
    ///
    /// # Shapes
    /// - `predicted`, `noisy` (the state on the straight path) and the result: `[B, …]`, equal.
    /// - `sigma`: `[B]`, one level per sample; less than 1 where noise is predicted, more than 0 where the picture is.
    pub fn velocity<const D: usize>(
        self,
        predicted: Tensor<D>,
        noisy: Tensor<D>,
        sigma: Tensor<1>,
    ) -> Tensor<D> {
        let sigma = per_sample(sigma, &noisy);
        match self {
            Self::Noise => (predicted - noisy) / (1.0 - sigma),
            Self::Angular => {
                let scale = scales(sigma.clone());
                (noisy * (sigma * 2.0 - 1.0) / scale.clone() + predicted) / scale
            }
            Self::Clean => (noisy - predicted) / sigma,
        }
    }

    /// What a network has predicted where a state of one level for all has this velocity: the inverse of
    /// [`Self::velocity`].
    ///
    /// # Shapes
    /// `velocity`, `noisy` and the result: `[B, …]`, equal.
    pub fn of_velocity<const D: usize>(
        self,
        velocity: Tensor<D>,
        noisy: &Tensor<D>,
        sigma: f32,
    ) -> Tensor<D> {
        match self {
            Self::Noise => noisy.clone() + velocity * (1.0 - sigma),
            Self::Angular => {
                let scale = scale(sigma);
                velocity * scale + noisy.clone() * ((1.0 - 2.0 * sigma) / scale)
            }
            Self::Clean => noisy.clone() - velocity * sigma,
        }
    }

    /// The weight of a velocity's squared error at which all levels count alike in what the network predicts.
    pub fn loss_weight(self, sigma: f32) -> f32 {
        match self {
            Self::Noise => (1.0 - sigma).powi(2),
            Self::Angular => scale(sigma).powi(2),
            Self::Clean => sigma.powi(2),
        }
    }
}

/// What a variance-preserving state is multiplied by to stand on the straight path: √((1 − σ)² + σ²).
pub fn scale(sigma: f32) -> f32 {
    (1.0 - sigma).hypot(sigma)
}

/// The variance-preserving state that a network is shown.
///
/// # Shapes
/// - `noisy` and the result: `[B, …]`, equal.
/// - `sigma`: `[B]`, one level per sample.
pub fn preserving<const D: usize>(noisy: Tensor<D>, sigma: Tensor<1>) -> Tensor<D> {
    let sigma = per_sample(sigma, &noisy);
    noisy / scales(sigma)
}

/// [`scale`] of every element.
fn scales<const D: usize>(sigma: Tensor<D>) -> Tensor<D> {
    (sigma.clone().neg().add_scalar(1.0).square() + sigma.square()).sqrt()
}

#[cfg(test)]
mod tests;
