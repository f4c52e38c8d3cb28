//! The layers of the autoencoder, on a chunk of frames.
//!
//! States are `[T · B, C, H, W]`: T frames of B samples, frames outside. Only convolutions over time mix frames.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{After, AttentionOptions, ConvShape, attention, channel_norm, conv2d};

use super::past::Past;
use crate::parts::conv::{Conv2d, Padding};
use crate::weights::unfilled;

/// Sees a state with its name.
pub(super) type Observer<'a> = dyn FnMut(&str, &Tensor<4>) + 'a;

/// A convolution over space, and this and past frames. Before the first frame there are zeros.
#[derive(Module, Debug)]
pub(super) struct CausalConv {
    /// `[out, in, frames, k, k]`
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
}

impl CausalConv {
    /// With a cubic kernel.
    pub(super) fn unfilled(input: usize, output: usize, kernel: usize, device: &Device) -> Self {
        Self {
            weight: unfilled([output, input, kernel, kernel, kernel], device),
            bias: unfilled([output], device),
        }
    }

    /// With a kernel of three frames and one pixel.
    fn unfilled_over_time(input: usize, output: usize, device: &Device) -> Self {
        Self { weight: unfilled([output, input, 3, 1, 1], device), bias: unfilled([output], device) }
    }

    /// `[T · B, in, H, W]` to `[T · B, out, H, W]`.
    pub(super) fn forward(&self, x: Tensor<4>, past: &mut Past) -> Tensor<4> {
        let (rows, looks_back) = (x.dims()[0], self.frames() - 1);
        if looks_back == 0 {
            return self.forward_still(x);
        }
        let before = past.recall();
        if before.is_none() && rows == past.batch {
            past.keep(&x, looks_back);
            return self.forward_still(x);
        }
        let seen = Tensor::cat(before.into_iter().chain([x]).collect(), 0);
        past.keep(&seen, looks_back);
        let [found, channels, height, width] = seen.dims();
        let missing = rows + looks_back * past.batch - found;
        let padded = match missing {
            0 => seen,
            _ => {
                Tensor::cat(vec![Tensor::zeros([missing, channels, height, width], &seen.device()), seen], 0)
            }
        };
        let windows = (0..=looks_back).map(|frame| padded.clone().narrow(0, frame * past.batch, rows));
        self.of_windows(windows.collect())
    }

    /// Frames of the kernel.
    fn frames(&self) -> usize {
        let [_, _, frames, _, _] = self.weight.val().dims();
        frames
    }

    /// Of frames before which there are zeros: the kernel's last frame alone meets them.
    fn forward_still(&self, x: Tensor<4>) -> Tensor<4> {
        let weight = last_frame(self.weight.val()).squeeze_dim::<4>(2); // [out, in, k, k]
        self.convolve(x, weight)
    }

    /// For each of the kernel's frames what it meets, `[T · B, in, H, W]`.
    fn of_windows(&self, windows: Vec<Tensor<4>>) -> Tensor<4> {
        let weight = self.weight.val();
        let [output, input, frames, kernel, _] = weight.dims();
        let weight = weight.swap_dims(1, 2).reshape([output, frames * input, kernel, kernel]);
        self.convolve(Tensor::cat(windows, 1), weight)
    }

    fn convolve(&self, x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
        let [_, _, kernel, _] = weight.dims();
        conv2d(x, weight, Some(self.bias.val()), ConvShape::same(kernel / 2))
    }
}

/// The last entry of the third axis of a causal convolution's weight.
pub(super) fn last_frame<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    let frames = weight.dims()[2];
    weight.slice_dim(2, frames - 1..frames)
}

/// [`channel_norm`] over frames.
#[derive(Module, Debug)]
pub(super) struct Norm {
    /// `[C, 1, 1, 1]`
    gamma: Param<Tensor<4>>,
}

impl Norm {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        Self { gamma: unfilled([channels, 1, 1, 1], device) }
    }

    pub(super) fn forward(&self, x: Tensor<4>, after: After) -> Tensor<4> {
        channel_norm(x, self.gamma.val().flatten(0, 3), after)
    }
}

/// [`channel_norm`] within one frame: files give its weight another rank.
#[derive(Module, Debug)]
struct FrameNorm {
    /// `[C, 1, 1]`
    gamma: Param<Tensor<3>>,
}

/// Two convolutions beside a shortcut.
#[derive(Module, Debug)]
pub(super) struct ResidualBlock {
    norm1: Norm,
    conv1: CausalConv,
    norm2: Norm,
    conv2: CausalConv,
    /// Where the number of channels changes.
    conv_shortcut: Option<CausalConv>,
}

impl ResidualBlock {
    pub(super) fn unfilled(input: usize, output: usize, device: &Device) -> Self {
        Self {
            norm1: Norm::unfilled(input, device),
            conv1: CausalConv::unfilled(input, output, 3, device),
            norm2: Norm::unfilled(output, device),
            conv2: CausalConv::unfilled(output, output, 3, device),
            conv_shortcut: (input != output).then(|| CausalConv::unfilled(input, output, 1, device)),
        }
    }

    pub(super) fn forward(&self, x: Tensor<4>, past: &mut Past) -> Tensor<4> {
        let hidden = self.conv1.forward(self.norm1.forward(x.clone(), After::Silu), past);
        let hidden = self.conv2.forward(self.norm2.forward(hidden, After::Silu), past);
        match &self.conv_shortcut {
            Some(shortcut) => hidden + shortcut.forward(x, past),
            None => hidden + x,
        }
    }
}

/// Self-attention of all pixels of a frame with one head.
#[derive(Module, Debug)]
pub(super) struct AttentionBlock {
    norm: FrameNorm,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        Self {
            norm: FrameNorm { gamma: unfilled([channels, 1, 1], device) },
            to_qkv: Conv2d::unfilled(channels, 3 * channels, 1, device),
            proj: Conv2d::unfilled(channels, channels, 1, device),
        }
    }

    pub(super) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let normed = channel_norm(x.clone(), self.norm.gamma.val().flatten(0, 2), After::Nothing);
        let qkv = self
            .to_qkv
            .forward(normed)
            .reshape([batch, 3, 1, channels, height * width])
            .permute([1, 0, 2, 4, 3]); // [3, B, 1, H · W, C]
        let attended = attention(qkv, AttentionOptions::default()); // [B, H · W, C]
        let attended = attended.swap_dims(1, 2).reshape([batch, channels, height, width]);
        self.proj.forward(attended) + x
    }
}

/// A residual block, attention, and another residual block.
#[derive(Module, Debug)]
pub(super) struct MidBlock {
    attentions: Vec<AttentionBlock>,
    resnets: Vec<ResidualBlock>,
}

impl MidBlock {
    pub(super) fn unfilled(channels: usize, device: &Device) -> Self {
        let block = || ResidualBlock::unfilled(channels, channels, device);
        Self { attentions: vec![AttentionBlock::unfilled(channels, device)], resnets: vec![block(), block()] }
    }

    pub(super) fn forward(&self, x: Tensor<4>, past: &mut Past, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.resnets[0].forward(x, past);
        for (attention, block) in self.attentions.iter().zip(&self.resnets[1..]) {
            x = attention.forward(x);
            observe("mid.attn", &x);
            x = block.forward(x, past);
        }
        observe("mid", &x);
        x
    }
}

/// Halves or doubles the resolution, and where it has a convolution for that the number of frames after the first.
#[derive(Module, Debug)]
pub(super) struct Resampler {
    resample: Conv2d,
    time_conv: Option<CausalConv>,
}

impl Resampler {
    /// For [`Resampler::halve`].
    pub(super) fn unfilled_down(channels: usize, over_time: bool, device: &Device) -> Self {
        Self {
            resample: Conv2d::unfilled(channels, channels, 3, device),
            time_conv: over_time.then(|| CausalConv::unfilled_over_time(channels, channels, device)),
        }
    }

    /// For [`Resampler::double`], which halves the channels.
    pub(super) fn unfilled_up(channels: usize, over_time: bool, device: &Device) -> Self {
        Self {
            resample: Conv2d::unfilled(channels, channels / 2, 3, device),
            time_conv: over_time.then(|| CausalConv::unfilled_over_time(channels, 2 * channels, device)),
        }
    }

    /// Frees what a single frame never meets.
    pub(super) fn drop_time(&mut self) {
        self.time_conv = None;
    }

    /// `[T · B, C, H, W]` to `[T/2 · B, C, H/2, W/2]`; the first frame stays.
    pub(super) fn halve(&self, x: Tensor<4>, past: &mut Past) -> Tensor<4> {
        let x = self.resample.halve(x, Padding::RightAndBelow);
        let Some(time_conv) = &self.time_conv else { return x };
        let before = past.recall();
        past.keep(&x, 1);
        let Some(before) = before else { return x };
        // Each new frame is made of a pair and the frame before it.
        let (rows, batch) = (x.dims()[0], past.batch);
        let seen = Tensor::cat(vec![before, x], 0);
        let [first, _] = pairs(seen.clone().narrow(0, 0, rows), batch);
        let [second, third] = pairs(seen.narrow(0, batch, rows), batch);
        time_conv.of_windows(vec![first, second, third])
    }

    /// `[T · B, C, H, W]` to `[2T · B, C/2, 2H, 2W]`; the first frame stays one.
    pub(super) fn double(&self, x: Tensor<4>, past: &mut Past) -> Tensor<4> {
        let x = match &self.time_conv {
            None => x,
            // It is no past of the next one either.
            Some(_) if past.is_first() => {
                past.keep_nothing();
                x
            }
            Some(time_conv) => interleaved(time_conv.forward(x, past), past.batch),
        };
        self.resample.double(x)
    }
}

/// The first and the second frame of each pair: `[2T · B, C, H, W]` to twice `[T · B, C, H, W]`.
fn pairs(x: Tensor<4>, batch: usize) -> [Tensor<4>; 2] {
    let [rows, channels, height, width] = x.dims();
    let paired = x.reshape([rows / (2 * batch), 2 * batch, channels, height, width]);
    [0, 1].map(|at| {
        let frames = paired.clone().narrow(1, at * batch, batch);
        frames.reshape([rows / 2, channels, height, width])
    })
}

/// Two frames of each one's halves of channels: `[T · B, 2C, H, W]` to `[2T · B, C, H, W]`.
fn interleaved(x: Tensor<4>, batch: usize) -> Tensor<4> {
    let [rows, channels, height, width] = x.dims();
    x.reshape([rows / batch, batch, 2, channels / 2, height * width])
        .permute([0, 2, 1, 3, 4]) // [T, 2, B, C, H · W]
        .reshape([2 * rows, channels / 2, height, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;
    use fewstep_testkit::{assert_close, random, values};

    fn ramp(shape: [usize; 4]) -> Tensor<4> {
        let count = shape.iter().product::<usize>();
        let numbers: Vec<f32> = (0..count).map(|at| at as f32).collect();
        Tensor::from_data(TensorData::new(numbers, shape), &Device::flex())
    }

    #[test]
    fn halves_of_channels_are_frames_one_after_the_other() {
        // Two frames of one sample with four channels of one pixel.
        assert_close(&values(interleaved(ramp([2, 4, 1, 1]), 1)), &values(ramp([4, 2, 1, 1])), 0.0);
        // One frame of two samples: the samples stand side by side in each new frame.
        let found = values(interleaved(ramp([2, 2, 1, 1]), 2));
        assert_close(&found, &[0.0, 2.0, 1.0, 3.0], 0.0);
    }

    #[test]
    fn pairs_are_of_neighbouring_frames_of_each_sample() {
        let [first, second] = pairs(ramp([8, 1, 1, 1]), 2);
        assert_close(&values(first), &[0.0, 1.0, 4.0, 5.0], 0.0);
        assert_close(&values(second), &[2.0, 3.0, 6.0, 7.0], 0.0);
    }

    #[test]
    fn a_convolution_over_time_does_not_depend_on_how_frames_are_cut_into_chunks() {
        let device = Device::flex();
        let conv = CausalConv {
            weight: Param::from_tensor(random([3, 2, 3, 3, 3], 1, &device)),
            bias: Param::from_tensor(random([3], 2, &device)),
        };
        let (batch, frames) = (2, 7);
        let x: Tensor<4> = random([frames * batch, 2, 4, 5], 3, &device);
        let run = |chunks: &[usize]| {
            let (mut past, mut start) = (Past::new(batch), 0);
            let mut outputs = Vec::new();
            for (at, length) in chunks.iter().enumerate() {
                past.enter(at, chunks.len());
                outputs.push(conv.forward(x.clone().narrow(0, start * batch, length * batch), &mut past));
                start += length;
            }
            values(Tensor::cat(outputs, 0))
        };
        let whole = run(&[frames]);
        for chunks in [&[1, 1, 1, 1, 1, 1, 1][..], &[1, 2, 4], &[1, 6], &[3, 1, 3]] {
            // The same products in another order, with the zeros before the first frame left out.
            assert_close(&run(chunks), &whole, 2e-6);
        }
        // A frame's output does not change with what comes after it.
        let shorter = conv.forward(x.narrow(0, 0, 3 * batch), &mut {
            let mut past = Past::new(batch);
            past.enter(0, 1);
            past
        });
        assert_close(&values(shorter), &whole[..3 * batch * 3 * 20], 2e-6);
    }
}
