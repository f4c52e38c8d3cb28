//! The gated residual connection of adaptive-norm transformers.

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::norm::{Tokens, chunk, scatter_chunks};
use crate::{parallel, plain, simd};

/// `x + gate · update`, the gate being one vector a sample.
///
/// # Shapes
/// - `x`, `update`: `[batch, tokens, width]`
/// - `modulation`: `[batch, chunks · width]`; `gate` is the index of the gate's chunk
/// - returns: `[batch, tokens, width]`
pub fn gated_residual(x: Tensor<3>, update: Tensor<3>, modulation: Tensor<2>, gate: usize) -> Tensor<3> {
    if !is_fused(&x) {
        return plain::gated_residual(x, update, modulation, gate);
    }
    let tokens = Tokens::new(&x, &modulation, gate);
    assert_eq!(x.dims(), update.dims(), "residual and update");
    operation(
        [Input::new(x), Input::new(update), Input::new(modulation)],
        |[x, update, modulation], tracked| {
            let output = forward(tokens, &x, &update, &modulation, gate);
            let pullback: Pullback<3> = Box::new(move |gradient| {
                let through = tracked[1] || tracked[2];
                let (update, modulation) = if through {
                    backward(tokens, &gradient, &update, &modulation, gate)
                } else {
                    Default::default()
                };
                [
                    tracked[0].then_some(gradient),
                    tracked[1].then(|| Values::from_vec(update, &tokens.shape())),
                    tracked[2].then(|| Values::from_vec(modulation, &tokens.modulation_shape())),
                ]
            });
            (Values::from_vec(output, &tokens.shape()), pullback)
        },
    )
}

fn forward(tokens: Tokens, x: &[f32], update: &[f32], modulation: &[f32], gate: usize) -> Vec<f32> {
    let width = tokens.width;
    let mut output = unwritten(x.len());
    parallel::for_row_blocks(
        &mut output,
        width,
        #[inline(always)]
        |first, block| {
            for (index, output) in block.chunks_exact_mut(width).enumerate() {
                let row = first + index;
                let gate = chunk(tokens.of_row(modulation, row), gate, width);
                let (x, update) = (chunk(x, row, width), chunk(update, row, width));
                for (((output, gate), update), x) in output.iter_mut().zip(gate).zip(update).zip(x) {
                    *output = gate.mul_add(*update, *x);
                }
            }
        },
    );
    output
}

/// Gradients of the update and of the modulation.
fn backward(
    tokens: Tokens,
    gradient: &[f32],
    update: &[f32],
    modulation: &[f32],
    gate: usize,
) -> (Vec<f32>, Vec<f32>) {
    let width = tokens.width;
    let units = parallel::units(tokens.batch, tokens.tokens, width);
    let mut output = unwritten(gradient.len());
    let mut partial = vec![0.0; units.len() * width];
    let work = units.iter().zip(parallel::pieces(&mut output, &units, width)).zip(partial.chunks_mut(width));
    parallel::for_each(work, |((unit, output), gate_gradient)| {
        simd::vectorized(
            #[inline(always)]
            || {
                let first = unit.sample * tokens.tokens + unit.rows.start;
                let gate = chunk(tokens.of_row(modulation, first), gate, width);
                for (index, output) in output.chunks_exact_mut(width).enumerate() {
                    let row = first + index;
                    let (gradient, update) = (chunk(gradient, row, width), chunk(update, row, width));
                    for ((output, gradient), gate) in output.iter_mut().zip(gradient).zip(gate) {
                        *output = gradient * gate;
                    }
                    for ((sum, gradient), update) in gate_gradient.iter_mut().zip(gradient).zip(update) {
                        *sum = gradient.mul_add(*update, *sum);
                    }
                }
            },
        );
    });
    (output, scatter_chunks(tokens, &units, &partial, &[gate]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Probe, assert_agree};

    #[test]
    fn gated_residual_agrees_with_its_twin() {
        for [batch, tokens, width] in [[2, 7, 24], [3, 5, 31], [1, 100, 300]] {
            for bits in 1..8 {
                let run = |operation: fn(Tensor<3>, Tensor<3>, Tensor<2>, usize) -> Tensor<3>| {
                    let mut probe = Probe::new();
                    let x = probe.input([batch, tokens, width], bits & 1 != 0);
                    let update = probe.input([batch, tokens, width], bits & 2 != 0);
                    let modulation = probe.input([batch, 3 * width], bits & 4 != 0);
                    let output = operation(x, update, modulation, 1);
                    probe.finish(output)
                };
                // The gate's gradient sums up to 100 rows.
                assert_agree(&run(gated_residual), &run(plain::gated_residual), 3e-6);
            }
        }
    }
}
