//! The straight path between a picture and noise, and its three readings (rectified flow, arXiv 2209.03003).

use burn::tensor::Tensor;

/// The state at `sigma`: (1 − sigma)·clean + sigma·noise.
///
/// # Shapes
/// - `clean`, `noise` and the result: `[B, …]`, equal.
/// - `sigma`: `[B]`, one level per sample.
pub fn noisy<const D: usize>(clean: Tensor<D>, noise: Tensor<D>, sigma: Tensor<1>) -> Tensor<D> {
    let sigma = per_sample(sigma, &clean);
    clean * (1.0 - sigma.clone()) + noise * sigma
}

/// The derivative of the state by sigma: noise − clean. It points away from the picture.
///
/// # Shapes
/// All `[B, …]`, equal.
pub fn velocity<const D: usize>(clean: Tensor<D>, noise: Tensor<D>) -> Tensor<D> {
    noise - clean
}

/// The picture that a state and its velocity point to: noisy − sigma·velocity.
///
/// # Shapes
/// - `noisy`, `velocity` and the result: `[B, …]`, equal.
/// - `sigma`: `[B]`, one level per sample.
pub fn clean<const D: usize>(noisy: Tensor<D>, velocity: Tensor<D>, sigma: Tensor<1>) -> Tensor<D> {
    let sigma = per_sample(sigma, &noisy);
    noisy - velocity * sigma
}

/// The velocity of a network that predicts the clean picture: (noisy − clean) / sigma.
///
/// Sigmas below [`SIGMA_FLOOR`] are taken as the floor, as the quotient would magnify the network's error without
/// bound (arXiv 2511.13720, section 4, clips the same quotient there).
///
/// # Shapes
/// - `noisy`, `clean` and the result: `[B, …]`, equal.
/// - `sigma`: `[B]`, one level per sample.
pub fn velocity_of_clean<const D: usize>(noisy: Tensor<D>, clean: Tensor<D>, sigma: Tensor<1>) -> Tensor<D> {
    let sigma = per_sample(sigma.clamp_min(SIGMA_FLOOR), &noisy);
    (noisy - clean) / sigma
}

/// Smallest sigma [`velocity_of_clean`] divides by.
pub const SIGMA_FLOOR: f32 = 0.05;

/// One level per sample, to be broadcast.
pub(crate) fn per_sample<const D: usize>(sigma: Tensor<1>, like: &Tensor<D>) -> Tensor<D> {
    let [levels] = sigma.dims();
    let batch = like.dims()[0];
    assert_eq!(levels, batch, "{levels} sigmas for a batch of {batch}");
    let mut shape = [1; D];
    shape[0] = batch;
    sigma.reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, assert_tensors_close, random, values};

    #[test]
    fn each_sample_stands_at_its_own_sigma() {
        let device = Device::flex();
        let clean = Tensor::<2>::from_floats([[1.0, 2.0], [3.0, -4.0]], &device);
        let noise = Tensor::<2>::from_floats([[5.0, 0.0], [-1.0, 4.0]], &device);
        let sigma = Tensor::<1>::from_floats([0.25, 1.0], &device);
        // 0.75·1 + 0.25·5, 0.75·2 + 0; the second row is all noise. Exact in binary.
        assert_close(&values(noisy(clean.clone(), noise.clone(), sigma)), &[2.0, 1.5, -1.0, 4.0], 0.0);
        assert_close(&values(velocity(clean, noise)), &[4.0, -2.0, -4.0, 8.0], 0.0);
    }

    #[test]
    fn the_velocity_leads_back_to_the_clean_picture() {
        let device = Device::flex();
        let (picture, noise) = (random::<4>([3, 2, 4, 5], 1, &device), random::<4>([3, 2, 4, 5], 2, &device));
        let sigma = Tensor::<1>::from_floats([0.0, 0.3, 1.0], &device);
        let state = noisy(picture.clone(), noise.clone(), sigma.clone());
        // Three roundings of values up to 5: 3 · 5 · 6e-8.
        assert_tensors_close(clean(state, velocity(picture.clone(), noise), sigma), picture, 1e-6);
    }

    #[test]
    fn a_clean_prediction_has_the_velocity_that_leads_to_it() {
        let device = Device::flex();
        let (picture, noise) = (random::<3>([3, 4, 5], 1, &device), random::<3>([3, 4, 5], 2, &device));
        let sigma = Tensor::<1>::from_floats([0.05, 0.3, 1.0], &device);
        let state = noisy(picture.clone(), noise.clone(), sigma.clone());
        let found = velocity_of_clean(state, picture.clone(), sigma);
        // Roundings of the state, up to 5 · 6e-8, divided by 0.05.
        assert_tensors_close(found, velocity(picture, noise), 1e-5);
    }

    #[test]
    fn the_quotient_is_bounded_below_the_floor() {
        let device = Device::flex();
        let (state, clean) =
            (Tensor::<2>::from_floats([[1.0]], &device), Tensor::<2>::from_floats([[0.5]], &device));
        let found = velocity_of_clean(state, clean, Tensor::from_floats([1e-4], &device));
        assert_close(&values(found), &[10.0], 1e-5);
    }

    #[test]
    #[should_panic(expected = "2 sigmas for a batch of 3")]
    fn a_missing_sigma_is_refused() {
        let device = Device::flex();
        let x = Tensor::<2>::zeros([3, 1], &device);
        noisy(x.clone(), x, Tensor::<1>::zeros([2], &device));
    }
}
