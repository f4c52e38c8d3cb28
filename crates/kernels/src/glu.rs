//! The gate of an MLP (arXiv 2002.05202): one of its two branches times the activation of the other.

use burn::tensor::Tensor;

use crate::activation::{Gelu, exact_parts, sigmoid_parts, silu, tanh_parts};
use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::{parallel, plain, simd};

/// The activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// SwiGLU: `x · logistic(x)`.
    Silu,
    /// GEGLU.
    Gelu(Gelu),
}

/// `value · activation(gate)`, element by element.
///
/// # Shapes
/// - `value`, `gate`: the same
/// - returns: as they are
pub fn glu<const D: usize>(value: Tensor<D>, gate: Tensor<D>, kind: Gate) -> Tensor<D> {
    assert_eq!(value.dims(), gate.dims(), "value and gate");
    if !is_fused(&value) {
        return plain::glu(value, gate, kind);
    }
    let shape = value.dims();
    let rows = Rows { width: shape[D - 1], stride: shape[D - 1], kind };
    operation([Input::new(value), Input::new(gate)], |[value, gate], tracked| {
        let output = rows.forward(&value, &gate);
        let pullback: Pullback<2> = Box::new(move |gradient| {
            let (mut by_value, mut by_gate) = (unwritten(gradient.len()), unwritten(gradient.len()));
            let pieces = by_value.chunks_mut(rows.piece()).zip(by_gate.chunks_mut(rows.piece()));
            parallel::for_each(pieces.enumerate(), |(index, (by_value, by_gate))| {
                let into = by_value.chunks_exact_mut(rows.width).zip(by_gate.chunks_exact_mut(rows.width));
                rows.backward(index, &value, &gate, &gradient, into);
            });
            [
                tracked[0].then(|| Values::from_vec(by_value, &shape)),
                tracked[1].then(|| Values::from_vec(by_gate, &shape)),
            ]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// The same of the two halves of one tensor, the value before the gate.
///
/// # Shapes
/// - `x`: `[.., 2 · width]`
/// - returns: `[.., width]`
pub fn glu_halves<const D: usize>(x: Tensor<D>, kind: Gate) -> Tensor<D> {
    let shape = x.dims();
    assert_eq!(shape[D - 1] % 2, 0, "halves of {} numbers", shape[D - 1]);
    if !is_fused(&x) {
        return plain::glu_halves(x, kind);
    }
    let mut half = shape;
    half[D - 1] /= 2;
    let rows = Rows { width: half[D - 1], stride: shape[D - 1], kind };
    operation([Input::new(x)], |[x], _| {
        let output = rows.forward(&x, &x[rows.width..]);
        let pullback: Pullback<1> = Box::new(move |gradient| {
            let mut by = unwritten(x.len());
            parallel::for_each(by.chunks_mut(2 * rows.piece()).enumerate(), |(index, by)| {
                let into = by.chunks_exact_mut(rows.stride).map(|row| row.split_at_mut(rows.width));
                rows.backward(index, &x, &x[rows.width..], &gradient, into);
            });
            [Some(Values::from_vec(by, &shape))]
        });
        (Values::from_vec(output, &half), pullback)
    })
}

/// Rows of values and of gates.
#[derive(Clone, Copy)]
struct Rows {
    width: usize,
    /// From one row of values to the next, and from one of gates to the next.
    stride: usize,
    kind: Gate,
}

impl Rows {
    /// Elements of one piece of work, whole rows.
    fn piece(&self) -> usize {
        parallel::rows_per_piece(self.width) * self.width
    }

    #[inline(always)]
    fn row<'a>(&self, values: &'a [f32], index: usize) -> &'a [f32] {
        &values[index * self.stride..][..self.width]
    }

    fn forward(&self, value: &[f32], gate: &[f32]) -> Vec<f32> {
        let mut output = unwritten(value.len() / self.stride * self.width);
        parallel::for_row_blocks(
            &mut output,
            self.width,
            #[inline(always)]
            |first, block| {
                for (index, output) in (first..).zip(block.chunks_exact_mut(self.width)) {
                    let (value, gate) = (self.row(value, index), self.row(gate, index));
                    match self.kind {
                        Gate::Silu => forward_by(silu, value, gate, output),
                        Gate::Gelu(Gelu::Exact) => forward_by(exact_parts, value, gate, output),
                        Gate::Gelu(Gelu::Tanh) => forward_by(tanh_parts, value, gate, output),
                        Gate::Gelu(Gelu::Sigmoid) => forward_by(sigmoid_parts, value, gate, output),
                    }
                }
            },
        );
        output
    }

    /// Writes the gradients by value and gate of each row of the `piece`-th piece.
    fn backward<'a>(
        &self,
        piece: usize,
        value: &[f32],
        gate: &[f32],
        gradient: &[f32],
        into: impl Iterator<Item = (&'a mut [f32], &'a mut [f32])>,
    ) {
        let first = piece * parallel::rows_per_piece(self.width);
        simd::vectorized(
            #[inline(always)]
            || {
                for (index, into) in (first..).zip(into) {
                    let gradient = &gradient[index * self.width..][..self.width];
                    let inputs = (self.row(value, index), self.row(gate, index), gradient);
                    match self.kind {
                        Gate::Silu => backward_by(silu, inputs, into),
                        Gate::Gelu(Gelu::Exact) => backward_by(exact_parts, inputs, into),
                        Gate::Gelu(Gelu::Tanh) => backward_by(tanh_parts, inputs, into),
                        Gate::Gelu(Gelu::Sigmoid) => backward_by(sigmoid_parts, inputs, into),
                    }
                }
            },
        );
    }
}

/// `parts` gives value and derivative of the activation.
#[inline(always)]
fn forward_by(parts: impl Fn(f32) -> (f32, f32), value: &[f32], gate: &[f32], output: &mut [f32]) {
    output.iter_mut().zip(value).zip(gate).for_each(|((y, value), gate)| *y = value * parts(*gate).0);
}

/// The same with the gradients of value and gate.
#[inline(always)]
fn backward_by(
    parts: impl Fn(f32) -> (f32, f32),
    (value, gate, gradient): (&[f32], &[f32], &[f32]),
    (by_value, by_gate): (&mut [f32], &mut [f32]),
) {
    let inputs = value.iter().zip(gate).zip(gradient);
    for ((by_value, by_gate), ((value, gate), gradient)) in by_value.iter_mut().zip(by_gate).zip(inputs) {
        let (active, slope) = parts(*gate);
        *by_value = gradient * active;
        *by_gate = gradient * value * slope;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Probe, assert_agree, assert_derivative};

    const KINDS: [Gate; 4] =
        [Gate::Silu, Gate::Gelu(Gelu::Exact), Gate::Gelu(Gelu::Tanh), Gate::Gelu(Gelu::Sigmoid)];

    #[test]
    fn every_gate_agrees_with_its_twin() {
        for kind in KINDS {
            for tracked in [[true, true], [true, false], [false, true]] {
                let run = |operation: fn(Tensor<3>, Tensor<3>, Gate) -> Tensor<3>| {
                    let mut probe = Probe::new();
                    let value = probe.input([3, 5, 1307], tracked[0]);
                    let gate = probe.input([3, 5, 1307], tracked[1]);
                    let output = operation(value, gate.mul_scalar(3.0), kind);
                    probe.finish(output)
                };
                // The twins' derivatives lose digits where the activation is nearly the identity.
                assert_agree(&run(glu), &run(plain::glu), 5e-6);
            }
        }
    }

    #[test]
    fn halves_agree_with_their_twin() {
        for kind in KINDS {
            for shape in [[3, 7, 2 * 1307], [2, 5, 2]] {
                let run = |operation: fn(Tensor<3>, Gate) -> Tensor<3>| {
                    let mut probe = Probe::new();
                    let x = probe.tracked(shape);
                    probe.finish(operation(x.mul_scalar(2.0), kind))
                };
                assert_agree(&run(glu_halves), &run(plain::glu_halves), 5e-6);
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        for kind in KINDS {
            assert_derivative(2 * 31, |flat| {
                let mut cut = Cutter::new(flat);
                let (value, gate) = (cut.next::<1>([31]), cut.next::<1>([31]));
                glu(value, gate, kind)
            });
            assert_derivative(3 * 10, |flat| glu_halves(flat.reshape([3, 10]), kind));
        }
    }
}
