//! The operations and the sizes they are compared at.

use burn::tensor::Tensor;
use fewstep_kernels::{
    AdamW, AdamWStep, AttentionOptions, Gelu, HalfType, KeyMask, LowRank, Modulation, Moments, Projection,
    QkvStream, RotaryTable, attention, gated_residual, gelu, joint_qkv, linear, linear_concat, norm_modulate,
    plain, rms_norm, split_tokens,
};

use super::check::{Check, Inputs, Run, Which};

/// Samples, image tokens, text tokens, heads, and numbers of a head.
const BATCH: usize = 4;
const IMAGE: usize = 256;
const TEXT: usize = 64;
const HEADS: usize = 6;
const HEAD: usize = 64;
const WIDTH: usize = HEADS * HEAD;
const RANK: usize = 16;
const EPSILON: f32 = 1e-6;

/// Sums of up to some thousand f32 products in another order.
const SUMS: f64 = 2e-5;
/// A few roundings of each number.
const ROUNDINGS: f64 = 5e-6;
/// Bytes of an f32.
const F32: f64 = 4.0;

/// Every check.
pub(super) fn all() -> Vec<Check> {
    let mut checks = vec![
        linear_case("linear", WIDTH, 4 * WIDTH, |inputs| dense(inputs, WIDTH, 4 * WIDTH)),
        linear_case("linear, narrowing", 4 * WIDTH, WIDTH, |inputs| dense(inputs, 4 * WIDTH, WIDTH)),
        linear_case("linear, frozen with LoRA", WIDTH, 4 * WIDTH, |inputs| adapted(inputs, WIDTH, 4 * WIDTH)),
        linear_case("linear, frozen in bf16", WIDTH, 4 * WIDTH, |inputs| halved(inputs, HalfType::Bf16)),
        linear_case("linear, frozen in f16", WIDTH, 4 * WIDTH, |inputs| halved(inputs, HalfType::F16)),
        modulation_case(),
        concat_case(),
    ];
    for (name, options) in [
        ("attention", AttentionOptions::default()),
        ("attention, causal", AttentionOptions { keys: None, causal: true }),
        ("attention, padded text", AttentionOptions { keys: Some(padded()), causal: false }),
    ] {
        checks.push(attention_case(name, options));
    }
    checks.extend([joint_qkv_case(), norm_modulate_case(), rms_norm_case(), gated_residual_case()]);
    checks.extend([gelu_case("gelu, tanh", Gelu::Tanh), gelu_case("gelu, sigmoid", Gelu::Sigmoid)]);
    checks.extend([split_tokens_case(), block_case(), adamw_case()]);
    checks
}

fn dense(inputs: &mut Inputs, input: usize, output: usize) -> Projection {
    let scale = (input as f32).sqrt().recip();
    let (weight, bias) = (inputs.learning([output, input], scale), inputs.learning([output], 0.1));
    Projection { weight, rounded_to: None, bias: Some(bias), low_rank: None }
}

fn adapted(inputs: &mut Inputs, input: usize, output: usize) -> Projection {
    let scale = (input as f32).sqrt().recip();
    let (weight, bias) = (inputs.frozen([output, input], scale), inputs.frozen([output], 0.1));
    let low_rank = LowRank {
        down: inputs.learning([RANK, input], scale),
        up: inputs.learning([output, RANK], 0.25),
        scale: 0.5,
    };
    Projection { weight, rounded_to: None, bias: Some(bias), low_rank: Some(low_rank) }
}

fn halved(inputs: &mut Inputs, half: HalfType) -> Projection {
    let projection = adapted(inputs, WIDTH, 4 * WIDTH);
    Projection { weight: projection.weight.cast(half.dtype()), ..projection }
}

/// A projection of all image tokens.
fn linear_case(
    name: &'static str,
    input: usize,
    output: usize,
    projection: impl Fn(&mut Inputs) -> Projection + 'static,
) -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name,
        size: format!("{rows} x {input} to {output}"),
        flops: 2.0 * (rows * input * output) as f64,
        bytes: F32 * (rows * (input + output) + input * output) as f64,
        // By the input, and by the weight where that learns.
        backward_passes: if name.contains("frozen") { 1.0 } else { 2.0 },
        tolerance: SUMS,
        operation: Box::new(move |which, inputs| {
            let (x, projection) = (inputs.learning([BATCH, IMAGE, input], 1.0), projection(inputs));
            let linear = [linear::<3>, plain::linear::<3>][which as usize];
            Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 2))
        }),
    }
}

/// A projection of one vector a sample: limited by reading the weight.
fn modulation_case() -> Check {
    let (input, output) = (WIDTH, 6 * WIDTH);
    Check {
        name: "linear, one row a sample",
        size: format!("{BATCH} x {input} to {output}"),
        flops: 0.0,
        bytes: F32 * (BATCH * (input + output) + input * output) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(move |which, inputs| {
            let (x, projection) = (inputs.learning([BATCH, input], 1.0), dense(inputs, input, output));
            let linear = [linear::<2>, plain::linear::<2>][which as usize];
            Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 1))
        }),
    }
}

fn concat_case() -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name: "linear, query key value",
        size: format!("{rows} x {WIDTH} to 3 x {WIDTH}"),
        flops: 6.0 * (rows * WIDTH * WIDTH) as f64,
        bytes: F32 * (4 * rows * WIDTH + 3 * WIDTH * WIDTH) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(|which, inputs| {
            let x = inputs.learning([BATCH, IMAGE, WIDTH], 1.0);
            let three = [0; 3].map(|_| dense(inputs, WIDTH, WIDTH));
            let linear_concat = [linear_concat, plain::linear_concat][which as usize];
            Box::new(move || linear_concat(x.clone(), three.clone()).flatten(0, 2))
        }),
    }
}

/// A third of the text of every other sample is padding.
fn padded() -> KeyMask {
    let lengths: Vec<usize> = (0..BATCH).map(|sample| TEXT - sample % 2 * TEXT / 3).collect();
    KeyMask::from_lengths(&lengths, TEXT, IMAGE)
}

fn attention_case(name: &'static str, options: AttentionOptions) -> Check {
    let tokens = TEXT + IMAGE;
    Check {
        name,
        size: format!("{BATCH} x {HEADS} x {tokens} x {HEAD}"),
        flops: 4.0 * (BATCH * tokens * tokens * WIDTH) as f64,
        bytes: F32 * (4 * BATCH * tokens * WIDTH) as f64,
        // Scores again, and four products more.
        backward_passes: 2.5,
        tolerance: SUMS,
        operation: Box::new(move |which, inputs| {
            let (qkv, options) = (inputs.learning([3, BATCH, HEADS, tokens, HEAD], 1.0), options.clone());
            let attention = [attention, plain::attention][which as usize];
            Box::new(move || attention(qkv.clone(), options.clone()).flatten(0, 2))
        }),
    }
}

fn rotary() -> RotaryTable {
    let pairs = HEAD / 2;
    let angle = |position: usize, pair: usize| position as f32 / 100_f32.powf(pair as f32 / pairs as f32);
    let angles: Vec<f32> =
        (0..TEXT + IMAGE).flat_map(|at| (0..pairs).map(move |pair| angle(at, pair))).collect();
    let [cos, sin] = [f32::cos, f32::sin].map(|part| angles.iter().map(|angle| part(*angle)).collect());
    RotaryTable::new(cos, sin, pairs)
}

fn joint_qkv_case() -> Check {
    let tokens = TEXT + IMAGE;
    memory_case("norm and rotation of q, k", BATCH * tokens * WIDTH, 6.0, 2.0, SUMS, |which, inputs| {
        let mut stream = |tokens| QkvStream {
            qkv: inputs.learning([BATCH, tokens, 3 * WIDTH], 1.0),
            norm_q: inputs.learning([HEAD], 1.0),
            norm_k: inputs.learning([HEAD], 1.0),
        };
        let (text, image, rotary) = (stream(TEXT), stream(IMAGE), rotary());
        let joint_qkv = [joint_qkv, plain::joint_qkv][which as usize];
        Box::new(move || joint_qkv(text.clone(), image.clone(), HEADS, &rotary, EPSILON).flatten(0, 4))
    })
}

fn norm_modulate_case() -> Check {
    memory_case("norm and modulation", BATCH * IMAGE * WIDTH, 2.0, 1.5, SUMS, |which, inputs| {
        let (x, modulation) = token_inputs(inputs);
        let at = Modulation { shift: 0, scale: 1 };
        let norm_modulate = [norm_modulate, plain::norm_modulate][which as usize];
        Box::new(move || norm_modulate(x.clone(), modulation.clone(), at, EPSILON).flatten(0, 2))
    })
}

fn rms_norm_case() -> Check {
    memory_case("rms norm", BATCH * IMAGE * WIDTH, 2.0, 1.5, SUMS, |which, inputs| {
        let (x, weight) = (inputs.learning([BATCH, IMAGE, WIDTH], 1.0), inputs.learning([WIDTH], 1.0));
        let rms_norm = [rms_norm, plain::rms_norm][which as usize];
        Box::new(move || rms_norm(x.clone(), weight.clone(), EPSILON).flatten(0, 2))
    })
}

fn gated_residual_case() -> Check {
    memory_case("gated residual", BATCH * IMAGE * WIDTH, 3.0, 1.0, SUMS, |which, inputs| {
        let (x, modulation) = token_inputs(inputs);
        let update = inputs.learning([BATCH, IMAGE, WIDTH], 1.0);
        let gated_residual = [gated_residual, plain::gated_residual][which as usize];
        Box::new(move || gated_residual(x.clone(), update.clone(), modulation.clone(), 2).flatten(0, 2))
    })
}

fn token_inputs(inputs: &mut Inputs) -> (Tensor<3>, Tensor<2>) {
    (inputs.learning([BATCH, IMAGE, WIDTH], 1.0), inputs.learning([BATCH, 6 * WIDTH], 0.5))
}

fn gelu_case(name: &'static str, kind: Gelu) -> Check {
    memory_case(name, BATCH * IMAGE * 4 * WIDTH, 2.0, 1.5, ROUNDINGS, move |which, inputs| {
        let x = inputs.learning([BATCH, IMAGE, 4 * WIDTH], 1.0);
        let gelu = [gelu, plain::gelu][which as usize];
        Box::new(move || gelu(x.clone(), kind).flatten(0, 2))
    })
}

fn split_tokens_case() -> Check {
    memory_case("taking tokens", BATCH * IMAGE * WIDTH, 2.0, 1.0, 0.0, |which, inputs| {
        let joint = inputs.learning([BATCH, TEXT + IMAGE, WIDTH], 1.0);
        let split_tokens = [split_tokens, plain::split_tokens][which as usize];
        Box::new(move || split_tokens(joint.clone(), TEXT..TEXT + IMAGE).flatten(0, 2))
    })
}

/// What follows one another in a transformer's block: modulation, MLP and residual.
fn block_case() -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name: "modulated MLP of a block",
        size: format!("{rows} x {WIDTH}"),
        flops: 16.0 * (rows * WIDTH * WIDTH) as f64,
        bytes: F32 * (12 * rows * WIDTH + 8 * WIDTH * WIDTH) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(|which, inputs| {
            let (x, modulation) = token_inputs(inputs);
            let (up, down) = (dense(inputs, WIDTH, 4 * WIDTH), dense(inputs, 4 * WIDTH, WIDTH));
            let norm = [norm_modulate, plain::norm_modulate][which as usize];
            let linear = [linear::<3>, plain::linear::<3>][which as usize];
            let (gelu, residual) = (
                [gelu, plain::gelu][which as usize],
                [gated_residual, plain::gated_residual][which as usize],
            );
            let at = Modulation { shift: 3, scale: 4 };
            Box::new(move || {
                let normed = norm(x.clone(), modulation.clone(), at, EPSILON);
                let hidden = gelu(linear(normed, up.clone()), Gelu::Tanh);
                residual(x.clone(), linear(hidden, down.clone()), modulation.clone(), 5).flatten(0, 2)
            })
        }),
    }
}

fn adamw_case() -> Check {
    let numbers = 12 * WIDTH * WIDTH;
    memory_case("AdamW", numbers, 7.0, 0.0, ROUNDINGS, move |which, inputs| {
        let (parameter, gradient) = (inputs.frozen([numbers], 1.0), inputs.frozen([numbers], 1.0));
        let step = [AdamW::step, plain::adamw_step][which as usize];
        let at = AdamWStep { learning_rate: 1e-2, gradient_scale: 0.5, step: 1 };
        Box::new(move || {
            let mut moments = Moments::zeros(numbers);
            step(&AdamW::default(), parameter.clone(), gradient.clone(), &mut moments, at)
        })
    })
}

/// A check of an operation that memory limits: `passes` times so many numbers are read or written.
fn memory_case(
    name: &'static str,
    numbers: usize,
    passes: f64,
    backward_passes: f64,
    tolerance: f64,
    operation: impl Fn(Which, &mut Inputs) -> Run + 'static,
) -> Check {
    let bytes = passes * F32 * numbers as f64;
    let size = format!("{numbers} numbers");
    Check { name, size, flops: 0.0, bytes, backward_passes, tolerance, operation: Box::new(operation) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn every_operation_agrees_with_its_twin_on_this_machine() {
        for check in all() {
            let found = check.run(&Device::flex(), 1);
            assert!(found.agrees(), "{}: {found:?}", check.name);
        }
    }
}
