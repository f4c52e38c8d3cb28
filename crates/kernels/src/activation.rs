//! GELU in the three forms of the supported families, and the SiLU that follows norms of pictures.

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::{parallel, plain, simd};

/// Which form of the Gaussian error linear unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x Φ(x)`, Φ the normal distribution function.
    Exact,
    /// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`
    Tanh,
    /// `x sigmoid(1.702 x)`, CLIP's "quick" variant.
    Sigmoid,
}

/// What follows a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing.
    Nothing,
    /// `x · logistic(x)`.
    Silu,
}

/// `√(2/π)`, of the tanh form.
pub(crate) const TANH_SCALE: f32 = 0.797_884_6;
/// Weight of the cube in the tanh form.
pub(crate) const TANH_CUBIC: f32 = 0.044_715;
/// Slope of the sigmoid form.
pub(crate) const SIGMOID_SLOPE: f32 = 1.702;

/// Applies the activation to every element.
pub fn gelu<const D: usize>(x: Tensor<D>, kind: Gelu) -> Tensor<D> {
    if !is_fused(&x) {
        return plain::gelu(x, kind);
    }
    let shape = x.dims();
    operation([Input::new(x)], |[x], _| {
        let output = forward(&x, kind);
        let pullback: Pullback<1> = Box::new(move |gradient| {
            let gradient = backward(&x, &gradient, kind);
            [Some(Values::from_vec(gradient, &shape))]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

fn forward(x: &[f32], kind: Gelu) -> Vec<f32> {
    let mut output = unwritten(x.len());
    parallel::for_row_blocks(
        &mut output,
        1,
        #[inline(always)]
        |first, block| {
            let elements = block.iter_mut().zip(&x[first..]);
            match kind {
                Gelu::Exact => elements.for_each(|(y, x)| *y = exact_parts(*x).0),
                Gelu::Tanh => elements.for_each(|(y, x)| *y = tanh_parts(*x).0),
                Gelu::Sigmoid => elements.for_each(|(y, x)| *y = sigmoid_parts(*x).0),
            }
        },
    );
    output
}

fn backward(x: &[f32], gradient: &[f32], kind: Gelu) -> Vec<f32> {
    let mut output = unwritten(x.len());
    parallel::for_row_blocks(
        &mut output,
        1,
        #[inline(always)]
        |first, block| {
            let elements = block.iter_mut().zip(&x[first..]).zip(&gradient[first..]);
            match kind {
                Gelu::Exact => elements.for_each(|((d, x), g)| *d = g * exact_parts(*x).1),
                Gelu::Tanh => elements.for_each(|((d, x), g)| *d = g * tanh_parts(*x).1),
                Gelu::Sigmoid => elements.for_each(|((d, x), g)| *d = g * sigmoid_parts(*x).1),
            }
        },
    );
    output
}

/// Value and derivative.
///
/// Φ(−a) is exp(−a²/2) times a smooth function, here a polynomial in 1/(1 + 0.35 a), fitted by least squares of relative
/// errors, the largest of which is 3.2e-8 for a up to 14. Far below zero the value keeps its digits.
#[inline(always)]
pub(crate) fn exact_parts(x: f32) -> (f32, f32) {
    const FALL: f32 = 0.35;
    /// `1/√(2π)`
    const PEAK: f32 = 0.398_942_3;
    let t = 1.0 / x.abs().mul_add(FALL, 1.0);
    let series = (-0.029_145_961_f32)
        .mul_add(t, 0.143_971_84)
        .mul_add(t, -0.255_714_54)
        .mul_add(t, 0.159_174_48)
        .mul_add(t, -0.023_110_04)
        .mul_add(t, 0.105_508_08)
        .mul_add(t, 0.119_832_85)
        .mul_add(t, 0.139_861_87)
        .mul_add(t, 0.139_621_4);
    let bell = simd::exp(-0.5 * x * x);
    let tail = bell * t * series;
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (x * below, (PEAK * bell).mul_add(x, below))
}

/// Value and derivative.
#[inline(always)]
pub(crate) fn tanh_parts(x: f32) -> (f32, f32) {
    let inner = TANH_SCALE * x * (TANH_CUBIC * x).mul_add(x, 1.0);
    let slope = TANH_SCALE * (3.0 * TANH_CUBIC * x).mul_add(x, 1.0);
    // (1 + tanh u) / 2 is the logistic function of 2u.
    gated(x, 2.0 * inner, 2.0 * slope)
}

/// Value and derivative.
#[inline(always)]
pub(crate) fn sigmoid_parts(x: f32) -> (f32, f32) {
    gated(x, SIGMOID_SLOPE * x, SIGMOID_SLOPE)
}

/// Value and derivative.
#[inline(always)]
pub(crate) fn silu(x: f32) -> (f32, f32) {
    gated(x, x, 1.0)
}

/// Value and derivative of `x logistic(inner(x))`.
#[inline(always)]
fn gated(x: f32, inner: f32, inner_slope: f32) -> (f32, f32) {
    let gate = 1.0 / (1.0 + simd::exp(-inner));
    (x * gate, gate * (1.0 + x * (1.0 - gate) * inner_slope))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Probe, assert_agree, assert_derivative};
    use burn::tensor::Device;

    #[test]
    fn all_forms_agree_with_their_twins() {
        for kind in [Gelu::Exact, Gelu::Tanh, Gelu::Sigmoid] {
            let run = |operation: fn(Tensor<3>, Gelu) -> Tensor<3>| {
                let mut probe = Probe::new();
                let x = probe.tracked([3, 7, 1031]);
                probe.finish(operation(x.mul_scalar(3.0), kind))
            };
            // The twin's derivative loses digits in 1 - tanh² where the tangent is near one.
            assert_agree(&run(gelu), &run(plain::gelu), 5e-6);
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        for kind in [Gelu::Exact, Gelu::Tanh, Gelu::Sigmoid] {
            assert_derivative(37, |x| gelu(x, kind));
        }
    }

    #[test]
    fn far_arguments_pass_or_vanish() {
        let x = Tensor::<1>::from_data([-200.0, -60.0, 0.0, 60.0, 200.0], &Device::flex());
        for kind in [Gelu::Exact, Gelu::Tanh, Gelu::Sigmoid] {
            // Below -87 the exponential saturates at 6e37, which leaves -200 / 6e37 rather than zero.
            let y = fewstep_testkit::values(gelu(x.clone(), kind));
            fewstep_testkit::assert_close(&y, &[0.0, 0.0, 0.0, 60.0, 200.0], 1e-35);
        }
    }
}
