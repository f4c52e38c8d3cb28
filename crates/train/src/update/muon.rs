//! Muon: momentum whose matrix is made nearly orthogonal, so that every direction of it moves alike
//! (<https://kellerjordan.github.io/posts/muon/>).
//!
//! The numbers of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` computed in f32, where torch rounds the
//! Newton-Schulz steps to bf16. That adjustment gives an update the length of AdamW's (arXiv 2502.16982), so that one
//! learning rate and decay serve for both; it is for matrices alone.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use super::{PIECE, Step};

/// Coefficients of the quintic step X ← a·X + b·(XXᵀ)X + c·(XXᵀ)²X.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const NEWTON_SCHULZ_STEPS: usize = 5;
/// Smallest norm that is divided by.
const EPSILON: f32 = 1e-7;
/// Root mean square of an update of AdamW.
const ADAMW_LENGTH: f64 = 0.2;

/// Moves a matrix and its momentum by one step; `decay` is that of the momentum.
pub(crate) fn step(
    parameter: Tensor<2>,
    gradient: &[f32],
    momentum: &mut [f32],
    decay: f64,
    at: &Step,
) -> Tensor<2> {
    let ([rows, columns], device) = (parameter.dims(), parameter.device());
    let ahead = look_ahead(gradient, momentum, decay as f32, at.gradient_scale);
    let update = orthogonal(Tensor::from_data(TensorData::new(ahead, [rows, columns]), &device));
    let rate = at.learning_rate * ADAMW_LENGTH * (rows.max(columns) as f64).sqrt();
    parameter.mul_scalar((1.0 - at.learning_rate * at.weight_decay) as f32) - update.mul_scalar(rate as f32)
}

/// Takes the gradient into the momentum and returns Nesterov's mean of both.
fn look_ahead(gradient: &[f32], momentum: &mut [f32], decay: f32, gradient_scale: f32) -> Vec<f32> {
    let mut ahead = vec![0.0; gradient.len()];
    let pieces = gradient.par_chunks(PIECE).zip(momentum.par_chunks_mut(PIECE));
    ahead.par_chunks_mut(PIECE).zip(pieces).for_each(|(ahead, (gradient, momentum))| {
        for ((ahead, gradient), momentum) in ahead.iter_mut().zip(gradient).zip(momentum) {
            let gradient = gradient * gradient_scale;
            *momentum += (1.0 - decay) * (gradient - *momentum);
            *ahead = gradient + decay * (*momentum - gradient);
        }
    });
    ahead
}

/// A matrix with the singular vectors of `x` and singular values near 1.
fn orthogonal(x: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = x.dims();
    if rows > columns {
        return orthogonal(x.transpose()).transpose();
    }
    let [a, b, c] = COEFFICIENTS;
    let norm = x.clone().powf_scalar(2.0).sum().sqrt().clamp_min(EPSILON);
    let mut x = x / norm.unsqueeze();
    for _ in 0..NEWTON_SCHULZ_STEPS {
        let gram = x.clone().matmul(x.clone().transpose());
        let square = gram.clone().matmul(gram.clone());
        x = x.clone().mul_scalar(a) + (gram.mul_scalar(b) + square.mul_scalar(c)).matmul(x);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fewstep_testkit::{random, values};

    /// The polynomial's aim: it does not converge to 1 but stays between about 0.7 and 1.2.
    #[test]
    fn the_update_of_either_shape_has_singular_values_near_one() {
        for shape in [[6, 20], [20, 6]] {
            let x = orthogonal(random(shape, 5, &Device::flex()));
            let gram = match shape[0] < shape[1] {
                true => x.clone().matmul(x.transpose()),
                false => x.clone().transpose().matmul(x),
            };
            // The trace and the squared norm of XXᵀ are the sums of σ² and σ⁴.
            let gram = values(gram);
            let squares: f32 = (0..6).map(|index| gram[index * 7]).sum::<f32>() / 6.0;
            let fourth: f32 = gram.iter().map(|value| value * value).sum::<f32>() / 6.0;
            assert!((0.6..1.5).contains(&squares), "mean σ² {squares}");
            assert!(fourth - squares * squares < 0.15, "variance of σ² {}", fourth - squares * squares);
        }
    }

    #[test]
    fn the_momentum_is_a_running_mean_and_the_update_looks_ahead() {
        let mut momentum = [1.0];
        let ahead = look_ahead(&[4.0], &mut momentum, 0.75, 0.5);
        // m ← 0.75 · 1 + 0.25 · 2, and 0.25 · 2 + 0.75 · m.
        assert_eq!((momentum[0], ahead[0]), (1.25, 1.4375));
    }
}
