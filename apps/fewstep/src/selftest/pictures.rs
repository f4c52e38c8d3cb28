//! The operations of convolutional networks and the sizes they are compared at.

use fewstep_kernels::{After, ConvShape, GroupNorm, channel_norm, conv2d, group_norm};

use super::check::{Check, F32, SUMS, memory_case};

/// Samples, channels, groups of them, and side of the picture.
const BATCH: usize = 2;
const CHANNELS: usize = 128;
const GROUPS: usize = 32;
const SIDE: usize = 32;
const NUMBERS: usize = BATCH * CHANNELS * SIDE * SIDE;

/// Every check.
pub(super) fn all() -> Vec<Check> {
    vec![
        conv_case("convolution", 3, ConvShape::same(1)),
        conv_case("convolution, halving", 3, ConvShape { stride: 2, before: 1, after: 1 }),
        conv_case("convolution, 1 x 1", 1, ConvShape::same(0)),
        group_norm_case("group norm", After::Nothing),
        group_norm_case("group norm and SiLU", After::Silu),
        channel_norm_case(),
    ]
}

fn conv_case(name: &str, kernel: usize, shape: ConvShape) -> Check {
    let side = SIDE / shape.stride;
    let weights = CHANNELS * CHANNELS * kernel * kernel;
    Check {
        name: name.into(),
        size: format!("{BATCH} x {CHANNELS} x {side} x {side}"),
        flops: 2.0 * (BATCH * side * side * weights) as f64,
        bytes: F32 * (NUMBERS + BATCH * CHANNELS * side * side + weights) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(move |inputs| {
            let scale = ((CHANNELS * kernel * kernel) as f32).sqrt().recip();
            let x = inputs.learning([BATCH, CHANNELS, SIDE, SIDE], 1.0);
            let weight = inputs.learning([CHANNELS, CHANNELS, kernel, kernel], scale);
            let bias = inputs.learning([CHANNELS], 0.1);
            Box::new(move || conv2d(x.clone(), weight.clone(), Some(bias.clone()), shape).flatten(0, 3))
        }),
    }
}

fn group_norm_case(name: &str, after: After) -> Check {
    memory_case(name, NUMBERS, 2.0, 1.5, SUMS, move |inputs| {
        let x = inputs.learning([BATCH, CHANNELS, SIDE, SIDE], 1.0);
        let (weight, bias) = (inputs.learning([CHANNELS], 1.0), inputs.learning([CHANNELS], 1.0));
        let norm = GroupNorm { groups: GROUPS, epsilon: 1e-5, after };
        Box::new(move || group_norm(x.clone(), weight.clone(), bias.clone(), norm).flatten(0, 3))
    })
}

fn channel_norm_case() -> Check {
    memory_case("norm of channels and SiLU", NUMBERS, 2.0, 1.5, SUMS, |inputs| {
        let x = inputs.learning([BATCH, CHANNELS, SIDE, SIDE], 1.0);
        let gamma = inputs.learning([CHANNELS], 1.0);
        Box::new(move || channel_norm(x.clone(), gamma.clone(), After::Silu).flatten(0, 3))
    })
}
