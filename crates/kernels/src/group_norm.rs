//! The norm over groups of channels of convolutional networks, with the activation that follows it.

use burn::tensor::Tensor;

use crate::activation::{After, silu};
use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::{parallel, plain, simd};

/// Numbers of a group that one piece of work sums.
const PIECE: usize = 16 * 1024;

/// What a group norm is beside its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupNorm {
    /// Groups that the channels are cut into, in their order.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f32,
    /// What follows.
    pub after: After,
}

/// Brings each group of channels of each sample, all its pixels together, to mean 0 and variance 1, multiplies each
/// channel by its `weight`, adds its `bias`; then the activation (arXiv 1803.08494).
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - `weight`, `bias`: `[channels]`
/// - returns: as `x`
///
/// # Panics
/// If the channels are no multiple of the groups.
pub fn group_norm(x: Tensor<4>, weight: Tensor<1>, bias: Tensor<1>, norm: GroupNorm) -> Tensor<4> {
    if !is_fused(&x) {
        return plain::group_norm(x, weight, bias, norm);
    }
    let shape = x.dims();
    let [_, channels, height, width] = shape;
    assert_eq!([weight.dims(), bias.dims()], [[channels]; 2], "weight and bias of the channels");
    let groups = Groups::new(norm, channels, height * width);
    operation([Input::new(x), Input::new(weight), Input::new(bias)], |[x, weight, bias], tracked| {
        let (output, moments) = groups.forward(&x, Affine { weight: &weight, bias: &bias });
        let pullback: Pullback<3> = Box::new(move |gradient| {
            let affine = Affine { weight: &weight, bias: &bias };
            let (by_x, [by_weight, by_bias]) = groups.backward(&x, affine, &moments, &gradient);
            [
                tracked[0].then(|| Values::from_vec(by_x, &shape)),
                tracked[1].then(|| Values::from_vec(by_weight, &[channels])),
                tracked[2].then(|| Values::from_vec(by_bias, &[channels])),
            ]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// The parameters of all channels.
#[derive(Clone, Copy)]
struct Affine<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
}

/// Mean and inverse standard deviation of a group.
#[derive(Clone, Copy)]
struct Moments {
    mean: f32,
    inverse: f32,
}

/// Sums over the pixels of one channel of one sample: of the gradient after the activation's, and of its product with
/// the normalised input.
#[derive(Clone, Copy, Default)]
struct Sums {
    gradient: f32,
    projection: f32,
}

#[derive(Clone, Copy)]
struct Groups {
    /// Of one sample.
    groups: usize,
    /// Channels of a group.
    channels: usize,
    pixels: usize,
    epsilon: f32,
    after: After,
}

impl Groups {
    fn new(norm: GroupNorm, channels: usize, pixels: usize) -> Self {
        let GroupNorm { groups, epsilon, after } = norm;
        assert!(groups > 0 && channels.is_multiple_of(groups), "{groups} groups of {channels} channels");
        Self { groups, channels: channels / groups, pixels, epsilon, after }
    }

    /// Numbers of a group.
    fn size(&self) -> usize {
        self.channels * self.pixels
    }

    /// The channels of the `index`-th group of a batch, counted within their sample.
    fn first_channel(&self, index: usize) -> usize {
        index % self.groups * self.channels
    }

    /// Output, and the moments of each group of each sample.
    fn forward(&self, x: &[f32], affine: Affine<'_>) -> (Vec<f32>, Vec<Moments>) {
        let mut output = unwritten(x.len());
        let work = output.chunks_exact_mut(self.size()).zip(x.chunks_exact(self.size())).enumerate();
        let moments = parallel::map(work, |(index, (output, x))| {
            let moments = self.moments(x);
            self.group_forward(x, moments, affine, self.first_channel(index), output);
            moments
        });
        (output, moments)
    }

    fn moments(&self, x: &[f32]) -> Moments {
        let total = |of: &(dyn Fn(&[f32]) -> f32 + Sync)| -> f32 {
            let pieces = parallel::map(x.chunks(PIECE), of);
            (pieces.into_iter().map(f64::from).sum::<f64>() / x.len() as f64) as f32
        };
        let mean = total(&simd::sum);
        let variance = total(&|x| simd::squared_deviation(x, mean));
        Moments { mean, inverse: 1.0 / (variance + self.epsilon).sqrt() }
    }

    fn group_forward(
        &self,
        x: &[f32],
        moments: Moments,
        affine: Affine<'_>,
        channel: usize,
        output: &mut [f32],
    ) {
        let (pixels, after) = (self.pixels, self.after);
        parallel::for_row_blocks(
            output,
            pixels,
            #[inline(always)]
            |first, block| {
                for (row, output) in (first..).zip(block.chunks_exact_mut(pixels)) {
                    let x = &x[row * pixels..][..pixels];
                    let scale = moments.inverse * affine.weight[channel + row];
                    let bias = affine.bias[channel + row];
                    let elements = output.iter_mut().zip(x);
                    match after {
                        After::Nothing => {
                            elements.for_each(|(y, x)| *y = (x - moments.mean).mul_add(scale, bias));
                        }
                        After::Silu => {
                            elements.for_each(|(y, x)| *y = silu((x - moments.mean).mul_add(scale, bias)).0);
                        }
                    }
                }
            },
        );
    }

    /// Gradients of x, and of weight and bias.
    fn backward(
        &self,
        x: &[f32],
        affine: Affine<'_>,
        moments: &[Moments],
        gradient: &[f32],
    ) -> (Vec<f32>, [Vec<f32>; 2]) {
        let mut output = unwritten(x.len());
        let mut sums = vec![Sums::default(); x.len() / self.pixels];
        let work = output.chunks_exact_mut(self.size()).zip(sums.chunks_exact_mut(self.channels));
        parallel::for_each(work.enumerate(), |(index, (output, sums))| {
            let group = Group {
                x: &x[index * self.size()..][..self.size()],
                gradient: &gradient[index * self.size()..][..self.size()],
                moments: moments[index],
                first_channel: self.first_channel(index),
            };
            self.group_sums(&group, affine, output, sums);
            self.group_backward(&group, affine.weight, sums, output);
        });
        (output, self.by_parameters(&sums))
    }

    /// Writes the gradient before the activation, and what it sums to.
    fn group_sums(&self, group: &Group<'_>, affine: Affine<'_>, output: &mut [f32], sums: &mut [Sums]) {
        let Moments { mean, inverse } = group.moments;
        let rows = output.chunks_exact_mut(self.pixels).zip(sums).enumerate();
        parallel::for_each(rows, |(row, (output, sums))| {
            let x = &group.x[row * self.pixels..][..self.pixels];
            let gradient = &group.gradient[row * self.pixels..][..self.pixels];
            let channel = group.first_channel + row;
            let (scale, bias) = (inverse * affine.weight[channel], affine.bias[channel]);
            match self.after {
                After::Nothing => output.copy_from_slice(gradient),
                After::Silu => simd::vectorized(
                    #[inline(always)]
                    || {
                        for ((by, x), seen) in output.iter_mut().zip(x).zip(gradient) {
                            *by = seen * silu((x - mean).mul_add(scale, bias)).1;
                        }
                    },
                ),
            }
            sums.gradient = simd::sum(output);
            sums.projection = inverse * simd::dot_deviation(output, x, mean);
        });
    }

    /// Turns the gradient before the activation into that of x: what moves the group's mean or variance is taken out.
    fn group_backward(&self, group: &Group<'_>, weight: &[f32], sums: &[Sums], output: &mut [f32]) {
        let Moments { mean, inverse } = group.moments;
        let weight = &weight[group.first_channel..][..self.channels];
        let average = |of: fn(&Sums) -> f32| {
            let weighted = weight.iter().zip(sums).map(|(weight, sums)| f64::from(weight * of(sums)));
            (weighted.sum::<f64>() / self.size() as f64) as f32
        };
        let shift = average(|sums| sums.gradient);
        let slope = average(|sums| sums.projection) * inverse;
        let pixels = self.pixels;
        parallel::for_row_blocks(
            output,
            pixels,
            #[inline(always)]
            |first, block| {
                for (row, output) in (first..).zip(block.chunks_exact_mut(pixels)) {
                    let (x, weight) = (&group.x[row * pixels..][..pixels], weight[row]);
                    for (by, x) in output.iter_mut().zip(x) {
                        *by = inverse * (*by * weight - shift - (x - mean) * slope);
                    }
                }
            },
        );
    }

    /// Gradients of weight and bias: the samples' sums, in their order.
    fn by_parameters(&self, sums: &[Sums]) -> [Vec<f32>; 2] {
        let channels = self.groups * self.channels;
        let mut output = [vec![0.0; channels], vec![0.0; channels]];
        for sample in sums.chunks_exact(channels) {
            for (channel, sums) in sample.iter().enumerate() {
                output[0][channel] += sums.projection;
                output[1][channel] += sums.gradient;
            }
        }
        output
    }
}

/// One group of one sample in a backward.
struct Group<'a> {
    x: &'a [f32],
    gradient: &'a [f32],
    moments: Moments,
    first_channel: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Outcome, Probe, assert_agree, assert_derivative};

    type Operation = fn(Tensor<4>, Tensor<1>, Tensor<1>, GroupNorm) -> Tensor<4>;

    fn run(operation: Operation, shape: [usize; 4], norm: GroupNorm, tracked: usize) -> Outcome {
        let mut probe = Probe::new();
        let x = probe.input(shape, tracked & 1 != 0);
        let weight = probe.input([shape[1]], tracked & 2 != 0);
        let bias = probe.input([shape[1]], tracked & 4 != 0);
        // Far from zero, as states of a network are.
        let output = operation(x.mul_scalar(3.0).add_scalar(2.0), weight, bias, norm);
        probe.finish(output)
    }

    #[test]
    fn group_norm_agrees_with_its_twin() {
        let cases = [
            ([2, 6, 5, 7], 3),
            ([2, 6, 5, 7], 6),
            ([3, 4, 1, 2], 2),
            ([1, 12, 33, 31], 1),
            ([1, 3, 150, 131], 1),
            ([2, 64, 9, 8], 32),
        ];
        for (shape, groups) in cases {
            for after in [After::Nothing, After::Silu] {
                for tracked in 1..8 {
                    let norm = GroupNorm { groups, epsilon: 1e-5, after };
                    let [fused, plain] =
                        [group_norm as Operation, plain::group_norm].map(|of| run(of, shape, norm, tracked));
                    // Sums of up to sixty thousand numbers in another order.
                    assert_agree(&fused, &plain, 2e-5);
                }
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        for after in [After::Nothing, After::Silu] {
            assert_derivative(2 * 6 * 3 * 2 + 6 + 6, |flat| {
                let mut cut = Cutter::new(flat);
                let (x, weight, bias) = (cut.next([2, 6, 3, 2]), cut.next([6]), cut.next([6]));
                group_norm(x, weight, bias, GroupNorm { groups: 3, epsilon: 1e-5, after })
            });
        }
    }

    #[test]
    fn a_group_of_equal_numbers_becomes_its_bias() {
        let device = burn::tensor::Device::flex();
        let x = Tensor::<4>::full([1, 2, 3, 3], 7.0, &device);
        let (weight, bias) =
            (Tensor::<1>::from_floats([2.0, 3.0], &device), Tensor::<1>::from_floats([0.5, -1.0], &device));
        let norm = GroupNorm { groups: 1, epsilon: 1e-5, after: After::Nothing };
        let y = fewstep_testkit::values(group_norm(x, weight, bias, norm));
        assert_eq!(y, [[0.5; 9], [-1.0; 9]].concat());
    }

    #[test]
    fn repeated_runs_give_the_same_bits() {
        let norm = GroupNorm { groups: 2, epsilon: 1e-6, after: After::Silu };
        let once = || run(group_norm, [2, 8, 70, 60], norm, 7);
        assert_eq!(once(), once());
    }
}
