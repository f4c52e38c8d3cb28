//! Fixed random inputs. Not torch's numbers: those are `fewstep_flow::noise`.

use std::f64::consts::TAU;

use burn::tensor::{Device, Tensor, TensorData};

/// A tensor of standard normal values that depends on shape and seed only.
pub fn random<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(random_values(shape.iter().product(), seed), shape), device)
}

/// Standard normal values that depend on the seed only; a longer request begins with the shorter one.
pub fn random_values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || (split_mix(&mut state) >> 11) as f64 / (1u64 << 53) as f64;
    let mut normal = || {
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        (radius * (TAU * uniform()).cos()) as f32
    };
    (0..count).map(|_| normal()).collect()
}

/// SplitMix64 (Steele, Lea and Flood 2014): good bits from any seed, zero included.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_standard_normal_and_repeat() {
        let x = random_values(20_000, 3);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let variance = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        // Four standard errors: 4/√20000 for the mean, 4·√(2/20000) for the variance.
        assert!(mean.abs() < 0.029 && (variance - 1.0).abs() < 0.04, "mean {mean}, variance {variance}");
        assert_eq!(x[..10], random_values(10, 3));
        assert_ne!(x[..10], random_values(10, 4));
    }
}
