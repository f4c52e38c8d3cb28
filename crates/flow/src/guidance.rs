//! Classifier-free guidance (arXiv 2207.12598).

use burn::tensor::Tensor;

/// The guided velocity: unconditional + cfg_scale·(conditional − unconditional).
///
/// At a `cfg_scale` of 1 this is `conditional`, bit for bit; callers save the unconditional network run
/// there. The peers' variant that rescales each token to the conditional norm (diffusers, Qwen-Image) is left
/// out.
///
/// # Shapes
/// All `[B, …]`, equal.
pub fn guided<const D: usize>(conditional: Tensor<D>, unconditional: Tensor<D>, cfg_scale: f32) -> Tensor<D> {
    if cfg_scale == 1.0 {
        return conditional;
    }
    unconditional.clone() + (conditional - unconditional) * cfg_scale
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
}
