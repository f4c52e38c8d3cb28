//! Classifier-free guidance (arXiv 2207.12598).

use burn::tensor::Tensor;

/// The guided velocity: unconditional + cfg_scale·(conditional − unconditional).
///
/// At a `cfg_scale` of 1 this is `conditional`, bit for bit; callers save the unconditional network run
/// there.
///
/// # Shapes
/// All `[B, …]`, equal.
pub fn guided<const D: usize>(conditional: Tensor<D>, unconditional: Tensor<D>, cfg_scale: f32) -> Tensor<D> {
    if cfg_scale == 1.0 {
        return conditional;
    }
    unconditional.clone() + (conditional - unconditional) * cfg_scale
}

/// `combined` with every last-axis vector scaled to the norm of the one in `conditional`: guidance that changes
/// directions only (diffusers' `QwenImagePipeline`).
///
/// # Shapes
/// All `[…, W]`, equal. A zero vector stays zero.
pub fn rescaled<const D: usize>(combined: Tensor<D>, conditional: Tensor<D>) -> Tensor<D> {
    let norm = |x: Tensor<D>| x.square().sum_dim(D - 1).sqrt();
    let ratio = norm(conditional) / norm(combined.clone()).clamp_min(f32::MIN_POSITIVE);
    combined * ratio
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, values};

    fn guided_values(cfg_scale: f32) -> Vec<f32> {
        let device = Device::flex();
        let conditional = Tensor::<2>::from_floats([[2.0, -1.0, 0.1]], &device);
        let unconditional = Tensor::<2>::from_floats([[1.0, 3.0, 1e9]], &device);
        values(guided(conditional, unconditional, cfg_scale))
    }

    #[test]
    fn guidance_extrapolates_away_from_the_unconditional() {
        // 1 + 4·(2 − 1) and 3 + 4·(−1 − 3), exact in binary.
        assert_close(&guided_values(4.0)[..2], &[5.0, -13.0], 0.0);
        assert_close(&guided_values(0.0)[..2], &[1.0, 3.0], 0.0);
    }

    #[test]
    fn a_scale_of_one_is_off() {
        assert_close(&guided_values(1.0), &[2.0, -1.0, 0.1], 0.0);
    }

    #[test]
    fn rescaling_keeps_directions_and_takes_the_conditional_norm() {
        let device = Device::flex();
        let combined = Tensor::<2>::from_floats([[6.0, -8.0], [0.0, 0.0]], &device);
        let conditional = Tensor::<2>::from_floats([[0.0, 5.0], [1.0, 1.0]], &device);
        assert_close(&values(rescaled(combined, conditional)), &[3.0, -4.0, 0.0, 0.0], 1e-6);
    }
}
