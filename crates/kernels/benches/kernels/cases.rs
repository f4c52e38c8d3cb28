//! The operations with their inputs.

use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    After, AttentionOptions, ConvShape, Gate, Gelu, GroupNorm, HalfType, LowRank, Modulation, Projection,
    QkvStream, RotaryTable, attention, channel_norm, conv2d, gated_residual, gelu, glu, group_norm,
    joint_qkv, linear, linear_concat, norm_modulate, rms_norm, split_tokens,
};
use fewstep_testkit::random;

use crate::{Case, Run, Work};

/// Samples, image tokens, text tokens, heads, and numbers of a head.
const BATCH: usize = 4;
const IMAGE: usize = 256;
const TEXT: usize = 64;
const HEADS: usize = 4;
const HEAD: usize = 64;
const WIDTH: usize = HEADS * HEAD;
const TOKENS: usize = IMAGE + TEXT;
const ROWS: usize = BATCH * IMAGE;
const RANK: usize = 16;
const EPSILON: f32 = 1e-6;

/// Samples, channels and side of a picture's states.
const PICTURES: usize = 2;
const CHANNELS: usize = 128;
const SIDE: usize = 32;
const STATES: usize = PICTURES * CHANNELS * SIDE * SIDE;

/// Every operation.
pub(super) fn all() -> Vec<Case> {
    let square = 2 * ROWS * WIDTH * WIDTH;
    let scores = 4 * BATCH * TOKENS * TOKENS * WIDTH;
    let taps = 2 * STATES * CHANNELS;
    let bytes = |numbers: usize| Work::Bytes(4 * numbers);
    let case = |name, work, make: fn() -> Run| Case { name, work, make, plain: false };
    vec![
        case("linear", Work::Flops(4 * square, 2.0), || projected(dense(WIDTH, 4 * WIDTH))),
        case("linear, frozen with LoRA", Work::Flops(4 * square, 1.0), || projected(adapted())),
        case("linear, frozen in bf16", Work::Flops(4 * square, 1.0), || projected(halved())),
        case("linear, one row a sample", bytes(6 * WIDTH * WIDTH), one_row),
        case("linear, query key value", Work::Flops(3 * square, 2.0), query_key_value),
        case("attention", Work::Flops(scores, 2.5), attended),
        case("norm and rotation of q, k", bytes(6 * BATCH * TOKENS * WIDTH), normed_and_turned),
        case("norm and modulation", bytes(2 * ROWS * WIDTH), modulated),
        case("rms norm", bytes(2 * ROWS * WIDTH), rms_normed),
        case("gated residual", bytes(3 * ROWS * WIDTH), gated),
        case("gelu", bytes(8 * ROWS * WIDTH), activated),
        case("gate of an MLP", bytes(12 * ROWS * WIDTH), gated_mlp),
        case("split tokens", bytes(ROWS * WIDTH), split),
        case("convolution", Work::Flops(9 * taps, 2.0), || convolved(3)),
        case("convolution, 1 x 1", Work::Flops(taps, 2.0), || convolved(1)),
        case("group norm", bytes(2 * STATES), || group_normed(After::Nothing)),
        case("group norm and SiLU", bytes(2 * STATES), || group_normed(After::Silu)),
        case("norm of channels and SiLU", bytes(2 * STATES), channels_normed),
    ]
}

fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    random(shape, 1, &Device::flex().autodiff()).require_grad()
}

fn frozen<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    random(shape, 1, &Device::flex().autodiff())
}

fn dense(input: usize, output: usize) -> Projection {
    Projection { weight: leaf([output, input]), bias: Some(leaf([output])), low_rank: None, rounded_to: None }
}

fn adapted() -> Projection {
    let branch = LowRank { down: leaf([RANK, WIDTH]), up: leaf([4 * WIDTH, RANK]), scale: 1.0 };
    Projection {
        weight: frozen([4 * WIDTH, WIDTH]),
        bias: Some(frozen([4 * WIDTH])),
        low_rank: Some(branch),
        rounded_to: None,
    }
}

fn halved() -> Projection {
    let projection = adapted();
    Projection { weight: projection.weight.cast(HalfType::Bf16.dtype()), ..projection }
}

fn tokens() -> Tensor<3> {
    leaf([BATCH, IMAGE, WIDTH])
}

fn picture() -> Tensor<4> {
    leaf([PICTURES, CHANNELS, SIDE, SIDE])
}

fn projected(projection: Projection) -> Run {
    let x = tokens();
    Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 2))
}

fn one_row() -> Run {
    let (x, projection) = (leaf([BATCH, WIDTH]), dense(WIDTH, 6 * WIDTH));
    Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 1))
}

fn query_key_value() -> Run {
    let (x, three) = (tokens(), [0; 3].map(|_| dense(WIDTH, WIDTH)));
    Box::new(move || linear_concat(x.clone(), three.clone()).flatten(0, 2))
}

fn attended() -> Run {
    let qkv = leaf([3, BATCH, HEADS, TOKENS, HEAD]);
    Box::new(move || attention(qkv.clone(), AttentionOptions::default()).flatten(0, 2))
}

fn normed_and_turned() -> Run {
    let half_turns = TOKENS * HEAD / 2;
    let rotary = RotaryTable::new(vec![-1.0; half_turns], vec![0.0; half_turns], HEAD / 2);
    let stream = |tokens| QkvStream {
        qkv: leaf([BATCH, tokens, 3 * WIDTH]),
        norm_q: leaf([HEAD]),
        norm_k: leaf([HEAD]),
    };
    let (text, image) = (stream(TEXT), stream(IMAGE));
    Box::new(move || joint_qkv(text.clone(), image.clone(), HEADS, &rotary, EPSILON).flatten(0, 4))
}

fn modulated() -> Run {
    let (x, modulation) = (tokens(), leaf([BATCH, 6 * WIDTH]));
    let at = Modulation { shift: 0, scale: 1 };
    Box::new(move || norm_modulate(x.clone(), modulation.clone(), at, EPSILON).flatten(0, 2))
}

fn rms_normed() -> Run {
    let (x, weight) = (tokens(), leaf([WIDTH]));
    Box::new(move || rms_norm(x.clone(), weight.clone(), EPSILON).flatten(0, 2))
}

fn gated() -> Run {
    let (x, update, modulation) = (tokens(), tokens(), leaf([BATCH, 6 * WIDTH]));
    Box::new(move || gated_residual(x.clone(), update.clone(), modulation.clone(), 2).flatten(0, 2))
}

fn activated() -> Run {
    let x = leaf([BATCH, IMAGE, 4 * WIDTH]);
    Box::new(move || gelu(x.clone(), Gelu::Tanh).flatten(0, 2))
}

fn gated_mlp() -> Run {
    let (value, gate) = (leaf([BATCH, IMAGE, 4 * WIDTH]), leaf([BATCH, IMAGE, 4 * WIDTH]));
    Box::new(move || glu(value.clone(), gate.clone(), Gate::Silu).flatten(0, 2))
}

fn split() -> Run {
    let x = tokens();
    Box::new(move || split_tokens(x.clone(), 0..IMAGE / 2).flatten(0, 2))
}

fn convolved(kernel: usize) -> Run {
    let (x, weight) = (picture(), leaf([CHANNELS, CHANNELS, kernel, kernel]));
    Box::new(move || conv2d(x.clone(), weight.clone(), None, ConvShape::same(kernel / 2)).flatten(0, 3))
}

fn group_normed(after: After) -> Run {
    let (x, weight, bias) = (picture(), leaf([CHANNELS]), leaf([CHANNELS]));
    let norm = GroupNorm { groups: 32, epsilon: EPSILON, after };
    Box::new(move || group_norm(x.clone(), weight.clone(), bias.clone(), norm).flatten(0, 3))
}

fn channels_normed() -> Run {
    let (x, gamma) = (picture(), leaf([CHANNELS]));
    Box::new(move || channel_norm(x.clone(), gamma.clone(), After::Silu).flatten(0, 3))
}
