//! Layer norm with adaptive modulation, and RMS norm.

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::parallel::Unit;
use crate::{parallel, plain, simd};

/// Which chunks of a modulation vector shift and scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modulation {
    /// Index of the chunk that is added.
    pub shift: usize,
    /// Index of the chunk that, plus one, multiplies.
    pub scale: usize,
}

/// `layer_norm(x) · (1 + scale) + shift`, the norm without affine parameters.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`
/// - `modulation`: `[batch, chunks · width]`
/// - returns: `[batch, tokens, width]`
pub fn norm_modulate(x: Tensor<3>, modulation: Tensor<2>, at: Modulation, epsilon: f32) -> Tensor<3> {
    if !is_fused(&x) {
        return plain::norm_modulate(x, modulation, at, epsilon);
    }
    let tokens = Tokens::new(&x, &modulation, at.shift.max(at.scale));
    operation([Input::new(x), Input::new(modulation)], |[x, modulation], tracked| {
        let output = modulate(tokens, &x, &modulation, at, epsilon);
        let pullback: Pullback<2> = Box::new(move |gradient| {
            let saved = Normalized { tokens, x: &x, modulation: &modulation, at, epsilon };
            let (x, modulation) = saved.backward(&gradient);
            [
                tracked[0].then(|| Values::from_vec(x, &tokens.shape())),
                tracked[1].then(|| Values::from_vec(modulation, &tokens.modulation_shape())),
            ]
        });
        (Values::from_vec(output, &tokens.shape()), pullback)
    })
}

/// `x / √(mean(x²) + epsilon) · weight` over the last axis.
///
/// # Shapes
/// - `x`: `[.., width]`
/// - `weight`: `[width]`
/// - returns: `[.., width]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f32) -> Tensor<D> {
    if !is_fused(&x) {
        return plain::rms_norm(x, weight, epsilon);
    }
    let shape = x.dims();
    let width = shape[D - 1];
    assert_eq!(weight.dims(), [width], "weight of the norm over rows of {width}");
    operation([Input::new(x), Input::new(weight)], |[x, weight], tracked| {
        let output = rms_forward(&x, &weight, epsilon);
        let pullback: Pullback<2> = Box::new(move |gradient| {
            let (x, weight) = rms_backward(&x, &weight, &gradient, epsilon);
            [
                tracked[0].then(|| Values::from_vec(x, &shape)),
                tracked[1].then(|| Values::from_vec(weight, &[width])),
            ]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// Sizes of a token sequence and its modulation.
#[derive(Clone, Copy)]
pub(crate) struct Tokens {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) width: usize,
    modulation: usize,
}

impl Tokens {
    /// `last_chunk` is the largest chunk index in use.
    pub(crate) fn new(x: &Tensor<3>, modulation: &Tensor<2>, last_chunk: usize) -> Self {
        let [batch, tokens, width] = x.dims();
        let [samples, modulation] = modulation.dims();
        assert_eq!(samples, batch, "samples of the modulation and of the tokens");
        assert!(
            (last_chunk + 1) * width <= modulation,
            "no chunk {last_chunk} of {width} in {modulation} elements"
        );
        Self { batch, tokens, width, modulation }
    }

    pub(crate) fn shape(&self) -> [usize; 3] {
        [self.batch, self.tokens, self.width]
    }

    pub(crate) fn modulation_shape(&self) -> [usize; 2] {
        [self.batch, self.modulation]
    }

    /// The modulation of the sample that `row` belongs to.
    #[inline(always)]
    pub(crate) fn of_row<'a>(&self, modulation: &'a [f32], row: usize) -> &'a [f32] {
        chunk(modulation, row / self.tokens, self.modulation)
    }
}

/// The `index`-th run of `width` elements.
#[inline(always)]
pub(crate) fn chunk(values: &[f32], index: usize, width: usize) -> &[f32] {
    &values[index * width..][..width]
}

/// Adds the units' partial gradients, `chunks.len() · width` elements each, into the gradient of a modulation.
pub(crate) fn scatter_chunks(tokens: Tokens, units: &[Unit], partial: &[f32], chunks: &[usize]) -> Vec<f32> {
    let width = tokens.width;
    let mut gradient = vec![0.0; tokens.batch * tokens.modulation];
    for (unit, partial) in units.iter().zip(partial.chunks_exact(chunks.len() * width)) {
        for (chunk, partial) in chunks.iter().zip(partial.chunks_exact(width)) {
            simd::add_to(&mut gradient[unit.sample * tokens.modulation + chunk * width..][..width], partial);
        }
    }
    gradient
}

fn modulate(tokens: Tokens, x: &[f32], modulation: &[f32], at: Modulation, epsilon: f32) -> Vec<f32> {
    let width = tokens.width;
    let mut output = unwritten(x.len());
    parallel::for_row_blocks(
        &mut output,
        width,
        #[inline(always)]
        |first, block| {
            for (index, output) in block.chunks_exact_mut(width).enumerate() {
                let x = chunk(x, first + index, width);
                let modulation = tokens.of_row(modulation, first + index);
                let (shift, scale) = (chunk(modulation, at.shift, width), chunk(modulation, at.scale, width));
                let (mean, inverse) = moments(x, epsilon);
                for (((output, x), shift), scale) in output.iter_mut().zip(x).zip(shift).zip(scale) {
                    *output = ((x - mean) * inverse).mul_add(1.0 + scale, *shift);
                }
            }
        },
    );
    output
}

/// Mean and inverse standard deviation.
#[inline(always)]
fn moments(row: &[f32], epsilon: f32) -> (f32, f32) {
    let width = row.len() as f32;
    let mean = simd::sum(row) / width;
    let variance = simd::squared_deviation(row, mean) / width;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

/// The inputs of [`norm_modulate`], for its backward. The moments are computed again: cheaper than keeping them.
struct Normalized<'a> {
    tokens: Tokens,
    x: &'a [f32],
    modulation: &'a [f32],
    at: Modulation,
    epsilon: f32,
}

impl Normalized<'_> {
    /// Gradients of x and of the modulation.
    fn backward(&self, gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let width = self.tokens.width;
        let units = parallel::units(self.tokens.batch, self.tokens.tokens, width);
        let mut output = unwritten(gradient.len());
        let mut partial = vec![0.0; units.len() * 2 * width];
        let pieces = parallel::pieces(&mut output, &units, width);
        let work = units.iter().zip(pieces).zip(partial.chunks_mut(2 * width));
        parallel::for_each(work, |((unit, output), partial)| {
            simd::vectorized(
                #[inline(always)]
                || self.unit_backward(unit, gradient, output, partial),
            );
        });
        (output, scatter_chunks(self.tokens, &units, &partial, &[self.at.shift, self.at.scale]))
    }

    #[inline(always)]
    fn unit_backward(&self, unit: &Unit, gradient: &[f32], output: &mut [f32], partial: &mut [f32]) {
        let width = self.tokens.width;
        let first = unit.sample * self.tokens.tokens + unit.rows.start;
        let scale = chunk(self.tokens.of_row(self.modulation, first), self.at.scale, width);
        let (shift_gradient, scale_gradient) = partial.split_at_mut(width);
        let mut normal = vec![0.0; width];
        for (index, output) in output.chunks_exact_mut(width).enumerate() {
            let (x, gradient) = (chunk(self.x, first + index, width), chunk(gradient, first + index, width));
            let (mean, inverse) = moments(x, self.epsilon);
            for (normal, x) in normal.iter_mut().zip(x) {
                *normal = (x - mean) * inverse;
            }
            simd::add_to(shift_gradient, gradient);
            for ((sum, gradient), normal) in scale_gradient.iter_mut().zip(gradient).zip(&normal) {
                *sum = gradient.mul_add(*normal, *sum);
            }
            for ((output, gradient), scale) in output.iter_mut().zip(gradient).zip(scale) {
                *output = gradient * (1.0 + scale);
            }
            let mean_gradient = simd::sum(output) / width as f32;
            let projection = simd::dot(output, &normal) / width as f32;
            for (output, normal) in output.iter_mut().zip(&normal) {
                *output = inverse * (*output - mean_gradient - normal * projection);
            }
        }
    }
}

fn rms_forward(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let width = weight.len();
    let mut output = unwritten(x.len());
    parallel::for_row_blocks(
        &mut output,
        width,
        #[inline(always)]
        |first, block| {
            for (index, output) in block.chunks_exact_mut(width).enumerate() {
                rms_row(chunk(x, first + index, width), weight, epsilon, output);
            }
        },
    );
    output
}

/// One row of [`rms_norm`].
#[inline(always)]
pub(crate) fn rms_row(x: &[f32], weight: &[f32], epsilon: f32, output: &mut [f32]) {
    let inverse = inverse_rms(x, epsilon);
    for ((output, x), weight) in output.iter_mut().zip(x).zip(weight) {
        *output = x * inverse * weight;
    }
}

/// 1 / √(mean(x²) + epsilon).
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (simd::dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// Gradients of x and of the weight.
fn rms_backward(x: &[f32], weight: &[f32], gradient: &[f32], epsilon: f32) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let units = parallel::units(1, x.len() / width, width);
    let mut output = unwritten(x.len());
    let mut partial = vec![0.0; units.len() * width];
    let work = units.iter().zip(parallel::pieces(&mut output, &units, width)).zip(partial.chunks_mut(width));
    parallel::for_each(work, |((unit, output), partial)| {
        simd::vectorized(
            #[inline(always)]
            || {
                for (row, output) in unit.rows.clone().zip(output.chunks_exact_mut(width)) {
                    output.copy_from_slice(chunk(gradient, row, width));
                    rms_row_backward(chunk(x, row, width), weight, epsilon, output, partial);
                }
            },
        );
    });
    (output, parallel::sum_rows(&partial, width))
}

/// Turns the gradient of one output row into that of its input row, and adds to the weight's gradient.
#[inline(always)]
pub(crate) fn rms_row_backward(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    gradient: &mut [f32],
    weight_gradient: &mut [f32],
) {
    let inverse = inverse_rms(x, epsilon);
    for (((gradient, sum), weight), x) in gradient.iter_mut().zip(weight_gradient).zip(weight).zip(x) {
        *sum = (*gradient * x).mul_add(inverse, *sum);
        *gradient *= weight;
    }
    let projection = simd::dot(gradient, x) / x.len() as f32 * inverse * inverse;
    for (gradient, x) in gradient.iter_mut().zip(x) {
        *gradient = inverse * (*gradient - x * projection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Outcome, Probe, assert_agree, assert_derivative};

    /// Different summation orders over rows of up to 300 elements, and over 100 rows.
    const TOLERANCE: f32 = 5e-6;
    const AT: Modulation = Modulation { shift: 2, scale: 0 };

    fn run(
        operation: fn(Tensor<3>, Tensor<2>, Modulation, f32) -> Tensor<3>,
        [batch, tokens, width]: [usize; 3],
        tracked: [bool; 2],
    ) -> Outcome {
        let mut probe = Probe::new();
        let x = probe.input([batch, tokens, width], tracked[0]);
        let modulation = probe.input([batch, 4 * width], tracked[1]);
        let output = operation(x, modulation, AT, 1e-6);
        probe.finish(output)
    }

    #[test]
    fn norm_modulate_agrees_with_its_twin() {
        for shape in [[2, 7, 24], [3, 5, 31], [1, 100, 300], [2, 1, 3]] {
            for tracked in [[true, true], [true, false], [false, true]] {
                let fused = run(norm_modulate, shape, tracked);
                assert_agree(&fused, &run(plain::norm_modulate, shape, tracked), TOLERANCE);
            }
        }
    }

    #[test]
    fn norm_modulate_gradients_are_the_slopes_of_the_values() {
        assert_derivative(2 * 3 * 10 + 2 * 20, |flat| {
            let mut cut = Cutter::new(flat);
            let (x, modulation) = (cut.next([2, 3, 10]), cut.next([2, 20]));
            norm_modulate(x, modulation, Modulation { shift: 0, scale: 1 }, 1e-5)
        });
    }

    #[test]
    fn rms_norm_agrees_with_its_twin() {
        for width in [3, 24, 33] {
            for tracked in [[true, true], [true, false], [false, true]] {
                let run = |operation: fn(Tensor<4>, Tensor<1>, f32) -> Tensor<4>| {
                    let mut probe = Probe::new();
                    let x = probe.input([2, 3, 501, width], tracked[0]);
                    let weight = probe.input([width], tracked[1]);
                    let output = operation(x, weight, 1e-6);
                    probe.finish(output)
                };
                // The weight's gradient sums 3006 rows.
                assert_agree(&run(rms_norm), &run(plain::rms_norm), 2e-5);
            }
        }
    }

    #[test]
    fn rms_norm_gradients_are_the_slopes_of_the_values() {
        assert_derivative(4 * 9 + 9, |flat| {
            let mut cut = Cutter::new(flat);
            let (x, weight) = (cut.next([4, 9]), cut.next([9]));
            rms_norm(x, weight, 1e-5)
        });
    }

    #[test]
    fn repeated_runs_give_the_same_bits() {
        let once = || run(norm_modulate, [3, 200, 256], [true, true]);
        assert_eq!(once(), once());
    }
}
