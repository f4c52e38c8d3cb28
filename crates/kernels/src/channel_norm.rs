//! The norm over channels of convolutional networks, with the activation that follows it.

use burn::tensor::Tensor;

use crate::activation::{After, silu};
use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::{parallel, plain, simd};

/// Pixels that one piece of work has.
const PIXELS: usize = 512;

/// Scales the channels of each pixel to length `√channels`, then each channel by `gamma`; then the activation.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - `gamma`: `[channels]`
/// - returns: as `x`
pub fn channel_norm(x: Tensor<4>, gamma: Tensor<1>, after: After) -> Tensor<4> {
    if !is_fused(&x) {
        return plain::channel_norm(x, gamma, after);
    }
    let shape = x.dims();
    let [_, channels, height, width] = shape;
    assert_eq!(gamma.dims(), [channels], "scales of the channels");
    let norm = ChannelNorm { channels, pixels: height * width, after };
    operation([Input::new(x), Input::new(gamma)], |[x, gamma], tracked| {
        let output = norm.forward(&x, &gamma);
        let pullback: Pullback<2> = Box::new(move |gradient| {
            let (by_x, by_gamma) = norm.backward(&x, &gamma, &gradient);
            [
                tracked[0].then(|| Values::from_vec(by_x, &shape)),
                tracked[1].then(|| Values::from_vec(by_gamma, &[channels])),
            ]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// torch's `normalize` divides by the length or this, whichever is larger.
pub(crate) const SMALLEST_LENGTH: f32 = 1e-12;

#[derive(Clone, Copy)]
struct ChannelNorm {
    channels: usize,
    pixels: usize,
    after: After,
}

/// Some pixels of one sample.
struct Piece<'a> {
    sample: usize,
    first: usize,
    /// Where each channel's result goes.
    output: Vec<&'a mut [f32]>,
}

impl ChannelNorm {
    /// Cuts an output into pieces of pixels.
    fn pieces<'a>(&self, output: &'a mut [f32]) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        for (sample, output) in output.chunks_exact_mut(self.channels * self.pixels).enumerate() {
            let begin = pieces.len();
            for channel in output.chunks_exact_mut(self.pixels) {
                for (index, pixels) in channel.chunks_mut(PIXELS).enumerate() {
                    if pieces.len() <= begin + index {
                        pieces.push(Piece { sample, first: index * PIXELS, output: Vec::new() });
                    }
                    pieces[begin + index].output.push(pixels);
                }
            }
        }
        pieces
    }

    /// A channel of the pixels of a piece.
    #[inline(always)]
    fn line<'a>(&self, values: &'a [f32], piece: &Piece<'_>, channel: usize) -> &'a [f32] {
        let start = (piece.sample * self.channels + channel) * self.pixels + piece.first;
        &values[start..start + piece.output[channel].len()]
    }

    /// One over the length of each pixel of a piece.
    #[inline(always)]
    fn inverse_lengths(&self, x: &[f32], piece: &Piece<'_>) -> Vec<f32> {
        let mut squares = vec![0.0_f32; piece.output[0].len()];
        for channel in 0..self.channels {
            for (square, x) in squares.iter_mut().zip(self.line(x, piece, channel)) {
                *square = x.mul_add(*x, *square);
            }
        }
        squares.iter_mut().for_each(|square| *square = 1.0 / square.sqrt().max(SMALLEST_LENGTH));
        squares
    }

    fn scale(&self, gamma: f32) -> f32 {
        gamma * (self.channels as f32).sqrt()
    }

    fn forward(&self, x: &[f32], gamma: &[f32]) -> Vec<f32> {
        let mut output = unwritten(x.len());
        parallel::for_each(self.pieces(&mut output), |piece| {
            simd::vectorized(
                #[inline(always)]
                || self.piece_forward(x, gamma, piece),
            );
        });
        output
    }

    #[inline(always)]
    fn piece_forward(&self, x: &[f32], gamma: &[f32], mut piece: Piece<'_>) {
        let inverse = self.inverse_lengths(x, &piece);
        for (channel, gamma) in gamma.iter().enumerate() {
            let (x, scale) = (self.line(x, &piece, channel), self.scale(*gamma));
            let elements = piece.output[channel].iter_mut().zip(x).zip(&inverse);
            match self.after {
                After::Nothing => elements.for_each(|((y, x), inverse)| *y = x * inverse * scale),
                After::Silu => elements.for_each(|((y, x), inverse)| *y = silu(x * inverse * scale).0),
            }
        }
    }

    /// Gradients of x and of the scales.
    fn backward(&self, x: &[f32], gamma: &[f32], gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut output = unwritten(x.len());
        let partial = parallel::map(self.pieces(&mut output).into_iter(), |piece| {
            simd::vectorized(
                #[inline(always)]
                || self.piece_backward(x, gamma, gradient, piece),
            )
        });
        let mut by_gamma = vec![0.0; self.channels];
        partial.iter().for_each(|partial| simd::add_to(&mut by_gamma, partial));
        (output, by_gamma)
    }

    /// Writes the gradient of a piece of x; gives the piece's part of that of the scales.
    #[inline(always)]
    fn piece_backward(&self, x: &[f32], gamma: &[f32], gradient: &[f32], mut piece: Piece<'_>) -> Vec<f32> {
        let inverse = self.inverse_lengths(x, &piece);
        let mut projections = vec![0.0_f32; inverse.len()];
        let mut by_gamma = Vec::with_capacity(self.channels);
        for (channel, gamma) in gamma.iter().enumerate() {
            let mut by_scale = 0.0_f32;
            let (x, seen) = (self.line(x, &piece, channel), self.line(gradient, &piece, channel));
            let scale = self.scale(*gamma);
            let lines = piece.output[channel].iter_mut().zip(x).zip(seen).zip(&inverse).zip(&mut projections);
            for ((((by_normal, x), seen), inverse), projection) in lines {
                let normal = x * inverse;
                let by_scaled = match self.after {
                    After::Nothing => *seen,
                    After::Silu => seen * silu(normal * scale).1,
                };
                by_scale += by_scaled * normal;
                *by_normal = by_scaled * scale;
                *projection = normal.mul_add(*by_normal, *projection);
            }
            by_gamma.push(self.scale(by_scale));
        }
        for channel in 0..self.channels {
            let x = self.line(x, &piece, channel);
            let lines = piece.output[channel].iter_mut().zip(x).zip(&inverse).zip(&projections);
            lines.for_each(|(((by, x), inverse), projection)| {
                *by = inverse * (*by - x * inverse * projection)
            });
        }
        by_gamma
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Probe, assert_agree, assert_derivative};

    #[test]
    fn channel_norm_agrees_with_its_twin() {
        for shape in [[2, 3, 5, 7], [1, 32, 33, 31], [3, 2, 1, 1]] {
            for after in [After::Nothing, After::Silu] {
                for tracked in [[true, true], [true, false], [false, true]] {
                    let run = |operation: fn(Tensor<4>, Tensor<1>, After) -> Tensor<4>| {
                        let mut probe = Probe::new();
                        let x = probe.input(shape, tracked[0]);
                        let gamma = probe.input([shape[1]], tracked[1]);
                        let output = operation(x, gamma, after);
                        probe.finish(output)
                    };
                    // The gradient of a scale sums a thousand pixels.
                    assert_agree(&run(channel_norm), &run(plain::channel_norm), 1e-5);
                }
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        for after in [After::Nothing, After::Silu] {
            assert_derivative(2 * 5 * 6 + 5, |flat| {
                let mut cut = Cutter::new(flat);
                let (x, gamma) = (cut.next([2, 5, 2, 3]), cut.next([5]));
                channel_norm(x, gamma, after)
            });
        }
    }
}
