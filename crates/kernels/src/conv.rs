//! Convolution over two axes as matrix products, without the unfolded input of the whole picture.
//!
//! Forward unfolds as many pixels at a time as fit into a core's cache. Backward goes channel by channel of the input, so
//! that no two pieces of work add to the same number.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::matmul::{Matrix, MatrixMut, Output, multiply};
use crate::{parallel, plain};

/// Numbers of an unfolded piece: half of a usual second-level cache.
const PIECE: usize = 64 * 1024;

/// Input channels that one piece of work of the backward has.
const CHANNELS: usize = 8;

/// Strides and zero padding of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Input pixels from one output pixel to the next, both ways.
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
}

impl ConvShape {
    /// Stride 1, the same zeros on all sides: for a kernel of `2 · padding + 1` the size of the picture stays.
    pub fn same(padding: usize) -> Self {
        Self { stride: 1, before: padding, after: padding }
    }
}

/// Cross-correlation with a square kernel, as `torch.nn.functional.conv2d`.
///
/// # Shapes
/// - `x`: `[batch, input, height, width]`
/// - `weight`: `[output, input, kernel, kernel]`
/// - `bias`: `[output]`
/// - returns: `[batch, output, (height + before + after - kernel) / stride + 1, the same of width]`
pub fn conv2d(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, shape: ConvShape) -> Tensor<4> {
    if !is_fused(&x) {
        return plain::conv2d(x, weight, bias, shape);
    }
    let conv = Convolution::new(x.dims(), weight.dims(), shape);
    let output_shape = [conv.batch, conv.output, conv.target.height, conv.target.width];
    let has_bias = bias.is_some();
    let inputs = [Input::new(x), Input::new(weight), Input::optional(bias)];
    operation(inputs, |[x, weight, bias], tracked| {
        let output = conv.forward(&x, &weight, has_bias.then_some(&bias));
        // Only the gradient of a weight needs the input.
        let x = if tracked[1] { x } else { Values::from_vec(Vec::new(), &[0]) };
        let pullback: Pullback<3> = Box::new(move |gradient| conv.pull_back(&x, &weight, &gradient, tracked));
        (Values::from_vec(output, &output_shape), pullback)
    })
}

#[derive(Clone, Copy)]
struct Size {
    height: usize,
    width: usize,
}

impl Size {
    fn pixels(&self) -> usize {
        self.height * self.width
    }
}

/// Some rows of one sample's target.
struct Strip<'a> {
    sample: usize,
    rows: Range<usize>,
    /// Where each channel's pixels go.
    output: Vec<&'a mut [f32]>,
}

#[derive(Clone, Copy)]
struct Convolution {
    batch: usize,
    input: usize,
    output: usize,
    kernel: usize,
    source: Size,
    target: Size,
    shape: ConvShape,
}

impl Convolution {
    fn new(x: [usize; 4], weight: [usize; 4], shape: ConvShape) -> Self {
        let [batch, input, height, width] = x;
        let [output, channels, kernel, kernel_width] = weight;
        assert_eq!((channels, kernel), (input, kernel_width), "channels and sides of weight {weight:?}");
        let side = |pixels: usize| {
            let padded = pixels + shape.before + shape.after;
            assert!(padded >= kernel, "a kernel of {kernel} on {padded} pixels");
            (padded - kernel) / shape.stride + 1
        };
        let target = Size { height: side(height), width: side(width) };
        Self { batch, input, output, kernel, source: Size { height, width }, target, shape }
    }

    /// Weights of one input channel for one output channel.
    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Rows of the target that are unfolded together where so many channels are.
    fn rows_at_once(&self, channels: usize) -> usize {
        (PIECE / (channels * self.taps() * self.target.width)).clamp(1, self.target.height)
    }

    fn forward(&self, x: &[f32], weight: &[f32], bias: Option<&Values>) -> Vec<f32> {
        let (pixels, depth) = (self.target.pixels(), self.input * self.taps());
        let step = self.rows_at_once(self.input);
        let mut output = unwritten(self.batch * self.output * pixels);
        let weight = Matrix::new(weight, self.output, depth);
        parallel::for_each(self.strips_of(&mut output, step), |strip| {
            let Strip { sample, rows, output } = strip;
            let x = &x[sample * self.input * self.source.pixels()..][..self.input * self.source.pixels()];
            let width = rows.len() * self.target.width;
            let part = self.strip(x, weight, bias, rows);
            output.into_iter().zip(part.chunks_exact(width)).for_each(|(to, from)| to.copy_from_slice(from));
        });
        output
    }

    /// Cuts an output into strips of rows.
    fn strips_of<'a>(&self, output: &'a mut [f32], step: usize) -> Vec<Strip<'a>> {
        let mut strips = Vec::new();
        for (sample, output) in output.chunks_exact_mut(self.output * self.target.pixels()).enumerate() {
            let begin = strips.len();
            let empty = |rows| Strip { sample, rows, output: Vec::with_capacity(self.output) };
            strips.extend(ranges(self.target.height, step).map(empty));
            for channel in output.chunks_exact_mut(self.target.pixels()) {
                let pixels = channel.chunks_mut(step * self.target.width);
                strips[begin..].iter_mut().zip(pixels).for_each(|(strip, pixels)| strip.output.push(pixels));
            }
        }
        strips
    }

    /// Some rows of the target of one sample, `[output, rows, width]`.
    fn strip(&self, x: &[f32], weight: Matrix, bias: Option<&Values>, rows: Range<usize>) -> Vec<f32> {
        let (width, depth) = (rows.len() * self.target.width, self.input * self.taps());
        let mut part = unwritten(self.output * width);
        let mode = match bias {
            Some(bias) => {
                part.chunks_exact_mut(width).zip(bias.iter()).for_each(|(part, bias)| part.fill(*bias));
                Output::Accumulate
            }
            None => Output::Overwrite,
        };
        let mut unfolded = unwritten(depth * width);
        self.unfold(x, 0..self.input, rows, &mut unfolded);
        let unfolded = Matrix::new(&unfolded, depth, width);
        multiply((MatrixMut::new(&mut part, self.output, width), mode), 1.0, weight, unfolded);
        part
    }

    /// For every tap of some input channels, the pixel it sees from each target pixel of some rows.
    fn unfold(&self, x: &[f32], channels: Range<usize>, rows: Range<usize>, into: &mut [f32]) {
        let width = self.target.width;
        let mut lines = into.chunks_exact_mut(width);
        for channel in channels {
            let x = &x[channel * self.source.pixels()..][..self.source.pixels()];
            for (down, across) in self.offsets() {
                for row in rows.clone() {
                    let line = lines.next().expect("the buffer has a line for each row of each tap");
                    match self.source_row(row, down) {
                        Some(source) => self.unfold_line(
                            &x[source * self.source.width..][..self.source.width],
                            across,
                            line,
                        ),
                        None => line.fill(0.0),
                    }
                }
            }
        }
    }

    fn offsets(&self) -> impl Iterator<Item = (usize, usize)> {
        let kernel = self.kernel;
        (0..kernel).flat_map(move |down| (0..kernel).map(move |across| (down, across)))
    }

    /// The source row that a tap sees from a target row, if it lies in the picture.
    fn source_row(&self, row: usize, down: usize) -> Option<usize> {
        (row * self.shape.stride + down)
            .checked_sub(self.shape.before)
            .filter(|row| *row < self.source.height)
    }

    /// Target columns whose tap `across` lies in the picture.
    fn columns(&self, across: usize) -> Range<usize> {
        let ConvShape { stride, before, .. } = self.shape;
        let first = before.saturating_sub(across).div_ceil(stride);
        let end = (self.source.width + before).saturating_sub(across).div_ceil(stride).min(self.target.width);
        first.min(end)..end
    }

    fn unfold_line(&self, source: &[f32], across: usize, line: &mut [f32]) {
        let columns = self.columns(across);
        line[..columns.start].fill(0.0);
        line[columns.end..].fill(0.0);
        if columns.is_empty() {
            return;
        }
        let ConvShape { stride, before, .. } = self.shape;
        let source = &source[columns.start * stride + across - before..];
        let line = &mut line[columns];
        match stride {
            1 => line.copy_from_slice(&source[..line.len()]),
            _ => line.iter_mut().zip(source.iter().step_by(stride)).for_each(|(to, from)| *to = *from),
        }
    }

    /// The reverse of [`Convolution::unfold`]: adds what each tap got to the pixel it saw.
    fn fold(&self, unfolded: &[f32], channels: usize, rows: Range<usize>, x: &mut [f32]) {
        let ConvShape { stride, before, .. } = self.shape;
        let mut lines = unfolded.chunks_exact(self.target.width);
        for x in x.chunks_exact_mut(self.source.pixels()).take(channels) {
            for (down, across) in self.offsets() {
                for row in rows.clone() {
                    let line = lines.next().expect("the buffer has a line for each row of each tap");
                    let (Some(source), columns) = (self.source_row(row, down), self.columns(across)) else {
                        continue;
                    };
                    if columns.is_empty() {
                        continue;
                    }
                    let first = source * self.source.width + columns.start * stride + across - before;
                    let pixels = x[first..].iter_mut().step_by(stride);
                    pixels.zip(&line[columns]).for_each(|(pixel, got)| *pixel += got);
                }
            }
        }
    }

    fn pull_back(
        &self,
        x: &[f32],
        weight: &[f32],
        gradient: &[f32],
        tracked: [bool; 3],
    ) -> [Option<Values>; 3] {
        let Self { batch, input, output, kernel, source, .. } = *self;
        let by_x = tracked[0].then(|| {
            Values::from_vec(self.by_input(weight, gradient), &[batch, input, source.height, source.width])
        });
        let by_weight = tracked[1]
            .then(|| Values::from_vec(self.by_weight(x, gradient), &[output, input, kernel, kernel]));
        [by_x, by_weight, tracked[2].then(|| Values::from_vec(self.by_bias(gradient), &[output]))]
    }

    /// Target rows that are unfolded together in a backward.
    fn strips(&self) -> impl Iterator<Item = Range<usize>> {
        ranges(self.target.height, self.rows_at_once(CHANNELS))
    }

    fn by_input(&self, weight: &[f32], gradient: &[f32]) -> Vec<f32> {
        let (pixels, depth) = (self.target.pixels(), self.input * self.taps());
        let mut output = vec![0.0; self.batch * self.input * self.source.pixels()];
        let samples = output.chunks_mut(self.input * self.source.pixels()).enumerate();
        let groups = samples.flat_map(|(sample, x)| {
            let groups = x.chunks_mut(CHANNELS * self.source.pixels()).enumerate();
            groups.map(move |(group, x)| (sample, group, x))
        });
        parallel::for_each(groups, |(sample, group, x)| {
            let gradient = &gradient[sample * self.output * pixels..][..self.output * pixels];
            let channels = x.len() / self.source.pixels();
            let taps = channels * self.taps();
            let weight = Matrix::strided(&weight[group * CHANNELS * self.taps()..], self.output, taps, depth);
            for rows in self.strips() {
                let width = rows.len() * self.target.width;
                let mut unfolded = unwritten(taps * width);
                let seen = &gradient[rows.start * self.target.width..];
                let seen = Matrix::strided(seen, self.output, width, pixels);
                let into = (MatrixMut::new(&mut unfolded, taps, width), Output::Overwrite);
                multiply(into, 1.0, weight.transposed(), seen);
                self.fold(&unfolded, channels, rows, x);
            }
        });
        output
    }

    fn by_weight(&self, x: &[f32], gradient: &[f32]) -> Vec<f32> {
        let depth = self.input * self.taps();
        let groups: Vec<Range<usize>> = ranges(self.input, CHANNELS).collect();
        let parts = parallel::map(groups.iter(), |channels| self.by_weight_of(x, gradient, channels.clone()));
        let mut output = unwritten(self.output * depth);
        for (channels, part) in groups.iter().zip(&parts) {
            let taps = channels.len() * self.taps();
            for (output, part) in output.chunks_exact_mut(depth).zip(part.chunks_exact(taps)) {
                output[channels.start * self.taps()..][..taps].copy_from_slice(part);
            }
        }
        output
    }

    /// The gradient by the weights of some input channels, `[output, channels · taps]`.
    fn by_weight_of(&self, x: &[f32], gradient: &[f32], channels: Range<usize>) -> Vec<f32> {
        let (pixels, taps) = (self.target.pixels(), channels.len() * self.taps());
        let mut part = vec![0.0; self.output * taps];
        for sample in 0..self.batch {
            let x = &x[sample * self.input * self.source.pixels()..][..self.input * self.source.pixels()];
            let gradient = &gradient[sample * self.output * pixels..][..self.output * pixels];
            for rows in self.strips() {
                let width = rows.len() * self.target.width;
                let mut unfolded = unwritten(taps * width);
                self.unfold(x, channels.clone(), rows.clone(), &mut unfolded);
                let seen = &gradient[rows.start * self.target.width..];
                let seen = Matrix::strided(seen, self.output, width, pixels);
                let into = (MatrixMut::new(&mut part, self.output, taps), Output::Accumulate);
                multiply(into, 1.0, seen, Matrix::new(&unfolded, taps, width).transposed());
            }
        }
        part
    }

    fn by_bias(&self, gradient: &[f32]) -> Vec<f32> {
        let mut output = vec![0.0; self.output];
        for sample in gradient.chunks_exact(self.output * self.target.pixels()) {
            for (sum, pixels) in output.iter_mut().zip(sample.chunks_exact(self.target.pixels())) {
                *sum += crate::simd::sum(pixels);
            }
        }
        output
    }
}

/// `0..len` in ranges of at most `step`.
fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |start| start..len.min(start + step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Probe, assert_agree, assert_derivative};

    const HALVING: ConvShape = ConvShape { stride: 2, before: 0, after: 1 };

    #[test]
    fn conv2d_agrees_with_its_twin() {
        let cases = [
            ([2, 3, 7, 9], 5, 3, ConvShape::same(1)),
            ([1, 19, 6, 5], 4, 1, ConvShape::same(0)),
            ([2, 9, 8, 6], 11, 3, HALVING),
            ([1, 17, 9, 7], 3, 3, ConvShape { stride: 2, before: 1, after: 1 }),
            ([1, 2, 3, 3], 2, 3, ConvShape::same(0)),
            ([1, 40, 70, 66], 8, 3, ConvShape::same(1)),
            ([1, 1, 2, 2], 1, 5, ConvShape::same(2)),
        ];
        for (x, output, kernel, shape) in cases {
            for bits in 1..8 {
                let run = |operation: fn(Tensor<4>, Tensor<4>, Option<Tensor<1>>, ConvShape) -> Tensor<4>| {
                    let mut probe = Probe::new();
                    let [_, input, _, _] = x;
                    let x = probe.input(x, bits & 1 != 0);
                    let weight = probe.input([output, input, kernel, kernel], bits & 2 != 0);
                    let bias = probe.input([output], bits & 4 != 0);
                    let found = operation(x, weight, Some(bias), shape);
                    probe.finish(found)
                };
                // Sums of up to five thousand products in another order.
                assert_agree(&run(conv2d), &run(plain::conv2d), 1e-5);
            }
        }
    }

    #[test]
    fn a_convolution_without_bias_agrees_with_its_twin() {
        let run = |operation: fn(Tensor<4>, Tensor<4>, Option<Tensor<1>>, ConvShape) -> Tensor<4>| {
            let mut probe = Probe::new();
            let (x, weight) = (probe.tracked([2, 3, 6, 6]), probe.tracked([4, 3, 3, 3]));
            let found = operation(x, weight, None, ConvShape::same(1));
            probe.finish(found)
        };
        assert_agree(&run(conv2d), &run(plain::conv2d), 1e-5);
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        assert_derivative(2 * 2 * 5 * 6 + 3 * 2 * 9 + 3, |flat| {
            let mut cut = Cutter::new(flat);
            let (x, weight, bias) = (cut.next([2, 2, 5, 6]), cut.next([3, 2, 3, 3]), cut.next([3]));
            conv2d(x, weight, Some(bias), HALVING)
        });
    }
}
