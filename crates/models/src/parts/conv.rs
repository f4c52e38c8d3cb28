//! Convolutions over pictures, and how they change the resolution.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use fewstep_kernels::{ConvShape, conv2d};

use crate::weights::unfilled;

/// A convolution with an odd square kernel.
#[derive(Module, Debug)]
pub(crate) struct Conv2d {
    /// `[out, in, k, k]`
    weight: Param<Tensor<4>>,
    bias: Param<Tensor<1>>,
}

impl Conv2d {
    pub(crate) fn unfilled(input: usize, output: usize, kernel: usize, device: &Device) -> Self {
        Self { weight: unfilled([output, input, kernel, kernel], device), bias: unfilled([output], device) }
    }

    /// `[B, in, H, W]` to `[B, out, H, W]`, with zeros around the picture.
    pub(crate) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, kernel, _] = self.weight.dims();
        self.convolve(x, ConvShape::same(kernel / 2))
    }

    /// `[B, in, H, W]` to `[B, out, ⌈H/2⌉, ⌈W/2⌉]`; of odd sides [`Padding::RightAndBelow`] drops the half.
    pub(crate) fn halve(&self, x: Tensor<4>, padding: Padding) -> Tensor<4> {
        let before = match padding {
            Padding::Around => 1,
            Padding::RightAndBelow => 0,
        };
        self.convolve(x, ConvShape { stride: 2, before, after: 1 })
    }

    /// `[B, in, H, W]` to `[B, out, height, width]`; pixels are repeated before the convolution.
    pub(crate) fn enlarge(&self, x: Tensor<4>, [height, width]: [usize; 2]) -> Tensor<4> {
        self.forward(repeated(repeated(x, 2, height), 3, width))
    }

    /// `[B, in, H, W]` to `[B, out, 2H, 2W]`.
    pub(crate) fn double(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        self.enlarge(x, [2 * height, 2 * width])
    }

    fn convolve(&self, x: Tensor<4>, shape: ConvShape) -> Tensor<4> {
        conv2d(x, self.weight.val(), Some(self.bias.val()), shape)
    }
}

/// Where the zeros are that a convolution of stride 2 needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Padding {
    /// On all sides.
    Around,
    /// Right and below.
    RightAndBelow,
}

/// A change of resolution, as diffusers' files name its convolution.
#[derive(Module, Debug)]
pub(crate) struct Resample {
    pub(crate) conv: Conv2d,
}

impl Resample {
    pub(crate) fn unfilled(channels: usize, device: &Device) -> Self {
        Self { conv: Conv2d::unfilled(channels, channels, 3, device) }
    }
}

/// Each of `length` entries along an axis is that of the nearest place, rounded down.
fn repeated(x: Tensor<4>, axis: usize, length: usize) -> Tensor<4> {
    let mut shape = x.dims();
    let found = shape[axis];
    if length == 2 * found {
        let pairs: Tensor<5> = x.unsqueeze_dim(axis + 1);
        let mut both = pairs.dims();
        (both[axis + 1], shape[axis]) = (2, length);
        return pairs.expand(both).reshape(shape);
    }
    let places: Vec<i32> = (0..length).map(|place| (place * found / length) as i32).collect();
    let places = Tensor::<1, Int>::from_data(TensorData::new(places, [length]), &x.device());
    x.select(axis, places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::{assert_close, values};

    #[test]
    fn each_pixel_becomes_those_nearest_to_it() {
        let device = Device::flex();
        let x = Tensor::<4>::from_floats([[[[1.0, 2.0], [3.0, 4.0]]]], &device);
        assert_close(&values(repeated(x.clone(), 3, 4)), &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0], 0.0);
        assert_close(&values(repeated(x.clone(), 2, 4)), &[1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0], 0.0);
        // ⌊0 · 2/3⌋, ⌊1 · 2/3⌋, ⌊2 · 2/3⌋
        assert_close(&values(repeated(x, 3, 3)), &[1.0, 1.0, 2.0, 3.0, 3.0, 4.0], 0.0);
    }
}
