//! Taking a run of tokens out of a joined sequence.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::{parallel, plain};

/// The tokens of `range`.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`
/// - returns: `[batch, range.len(), width]`
pub fn split_tokens(x: Tensor<3>, range: Range<usize>) -> Tensor<3> {
    if !is_fused(&x) {
        return plain::split_tokens(x, range);
    }
    let [batch, tokens, width] = x.dims();
    assert!(range.start < range.end && range.end <= tokens, "tokens {range:?} of {tokens}");
    operation([Input::new(x)], |[x], _| {
        let mut output = unwritten(batch * range.len() * width);
        let taken = range.start * width..range.end * width;
        let samples = output.chunks_mut(taken.len()).zip(x.chunks(tokens * width));
        parallel::for_each(samples, |(output, x)| output.copy_from_slice(&x[taken.clone()]));
        let shape = [batch, range.len(), width];
        let pullback: Pullback<1> = Box::new(move |gradient| {
            let mut output = unwritten(batch * tokens * width);
            let samples = output.chunks_mut(tokens * width).zip(gradient.chunks(taken.len()));
            parallel::for_each(samples, |(output, gradient)| {
                output[..taken.start].fill(0.0);
                output[taken.clone()].copy_from_slice(gradient);
                output[taken.end..].fill(0.0);
            });
            [Some(Values::from_vec(output, &[batch, tokens, width]))]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Probe, assert_agree};

    #[test]
    fn every_range_agrees_with_its_twin() {
        for range in [0..7, 7..12, 3..4, 0..12] {
            let run = |operation: fn(Tensor<3>, Range<usize>) -> Tensor<3>| {
                let mut probe = Probe::new();
                let x = probe.tracked([3, 12, 5]);
                let output = operation(x, range.clone());
                probe.finish(output)
            };
            // Copies are exact.
            assert_agree(&run(split_tokens), &run(plain::split_tokens), 0.0);
        }
    }
}
