//! A flow with a known answer: Gaussian data. Samplers and the application's self-test are measured against
//! it.

use burn::tensor::Tensor;

/// The exact flow of data drawn from N(mean, deviation²·I).
///
/// The state at sigma s is Gaussian too, with mean (1 − s)·μ and variance V(s) = (1 − s)²·d² + s², d the
/// deviation.
#[derive(Debug, Clone, Copy)]
pub struct GaussianFlow {
    /// Mean of every element.
    pub mean: f32,
    /// Standard deviation of every element; positive.
    pub deviation: f32,
}

impl GaussianFlow {
    /// The velocity that a perfect network gives: the mean of noise − clean over all pairs that pass through
    /// `noisy`.
    ///
    /// It is (s − (1 − s)·d²)/V(s) · (noisy − (1 − s)·μ) − μ, from the conditional mean of jointly Gaussian
    /// variables.
    pub fn velocity<const D: usize>(&self, noisy: Tensor<D>, sigma: f32) -> Tensor<D> {
        let clean_share = 1.0 - sigma;
        let slope = (sigma - clean_share * self.deviation.powi(2)) / self.variance(sigma);
        (noisy - clean_share * self.mean) * slope - self.mean
    }

    /// The exact solution of dx/ds = velocity(x, s) from sigma `from` to sigma `to`.
    ///
    /// A state keeps its number of standard deviations from the mean.
    pub fn transport<const D: usize>(&self, state: Tensor<D>, from: f32, to: f32) -> Tensor<D> {
        let stretch = (self.variance(to) / self.variance(from)).sqrt();
        (state - (1.0 - from) * self.mean) * stretch + (1.0 - to) * self.mean
    }

    fn variance(&self, sigma: f32) -> f32 {
        ((1.0 - sigma) * self.deviation).powi(2) + sigma.powi(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path;
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, random, values};

    const FLOW: GaussianFlow = GaussianFlow { mean: -0.3, deviation: 0.6 };

    #[test]
    fn noise_becomes_the_data_distribution() {
        let noise = Tensor::<1>::from_floats([-1.0, 0.0, 2.0], &Device::flex());
        assert_close(&values(FLOW.transport(noise, 1.0, 0.0)), &[-0.9, -0.3, 0.9], 1e-6);
    }

    #[test]
    fn the_velocity_is_the_derivative_of_the_solution() {
        let state = random::<1>([16], 2, &Device::flex());
        let step = 1e-2;
        for sigma in [0.05, 0.3, 0.8] {
            let ahead = FLOW.transport(state.clone(), sigma, sigma + step);
            let behind = FLOW.transport(state.clone(), sigma, sigma - step);
            let slope = (ahead - behind) / (2.0 * step);
            // The central difference errs by h²/6 times a third derivative of order 10.
            assert_close(&values(FLOW.velocity(state.clone(), sigma)), &values(slope), 1e-3);
        }
    }

    #[test]
    fn the_velocity_is_the_least_squares_fit_to_sampled_pairs() {
        let device = Device::flex();
        let (sigma, count) = (0.4, 200_000);
        let noise = random::<2>([count, 1], 3, &device);
        let clean = random::<2>([count, 1], 4, &device) * FLOW.deviation + FLOW.mean;
        let state = path::noisy(clean.clone(), noise.clone(), Tensor::full([count], sigma, &device));
        let residual = path::velocity(clean, noise) - FLOW.velocity(state.clone(), sigma);
        // A conditional mean leaves a residual that averages to 0 and is uncorrelated with the state;
        // four standard errors of a unit-scale product over `count` samples.
        let tolerance = 4.0 / (count as f32).sqrt();
        assert_close(&values(residual.clone().mean()), &[0.0], tolerance);
        assert_close(&values((residual * state).mean()), &[0.0], tolerance);
    }
}
