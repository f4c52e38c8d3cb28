//! The operations of transformers and the sizes they are compared at.

use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AdamW, AdamWStep, AttentionOptions, Gate, Gelu, HalfType, KeyMask, LowRank, Modulation, Moments,
    Projection, QkvStream, RotaryTable, attention, gated_residual, gelu, glu, glu_halves, joint_qkv, linear,
    linear_concat, norm_modulate, rms_norm, split_tokens,
};

use super::check::{Check, F32, Inputs, ROUNDINGS, SUMS, memory_case};

/// Samples, image tokens, text tokens, heads, and numbers of a head.
const BATCH: usize = 4;
const IMAGE: usize = 256;
const TEXT: usize = 64;
const HEADS: usize = 6;
const HEAD: usize = 64;
const WIDTH: usize = HEADS * HEAD;
const RANK: usize = 16;
const EPSILON: f32 = 1e-6;

/// Every check that a device has the number types for.
pub(super) fn all(device: &Device) -> Vec<Check> {
    let mut checks = vec![
        linear_case("linear", WIDTH, 4 * WIDTH, |inputs| dense(inputs, WIDTH, 4 * WIDTH)),
        linear_case("linear, narrowing", 4 * WIDTH, WIDTH, |inputs| dense(inputs, 4 * WIDTH, WIDTH)),
        linear_case("linear, frozen with LoRA", WIDTH, 4 * WIDTH, |inputs| adapted(inputs, WIDTH, 4 * WIDTH)),
        modulation_case(),
        concat_case(),
    ];
    for (name, half) in [("linear, frozen in bf16", HalfType::Bf16), ("linear, frozen in f16", HalfType::F16)]
    {
        // The CPU widens stored weights itself; elsewhere burn gives zeros for what a device does not know.
        if *device == Device::flex() || device.supports_dtype(half.dtype()) {
            checks.push(linear_case(name, WIDTH, 4 * WIDTH, move |inputs| halved(inputs, half)));
        }
    }
    for (name, options) in [
        ("attention", AttentionOptions::default()),
        ("attention, causal", AttentionOptions { keys: None, causal: true }),
        ("attention, padded text", AttentionOptions { keys: Some(padded()), causal: false }),
    ] {
        checks.push(attention_case(name, options));
    }
    checks.extend([joint_qkv_case(), norm_modulate_case(), rms_norm_case(), gated_residual_case()]);
    for (name, kind) in
        [("gelu, exact", Gelu::Exact), ("gelu, tanh", Gelu::Tanh), ("gelu, sigmoid", Gelu::Sigmoid)]
    {
        checks.push(gelu_case(name, kind));
    }
    checks.extend([glu_case(), glu_halves_case()]);
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
    name: &str,
    input: usize,
    output: usize,
    projection: impl Fn(&mut Inputs) -> Projection + 'static,
) -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name: name.into(),
        size: format!("{rows} x {input} to {output}"),
        flops: 2.0 * (rows * input * output) as f64,
        bytes: F32 * (rows * (input + output) + input * output) as f64,
        // By the input, and by the weight where that learns.
        backward_passes: if name.contains("frozen") { 1.0 } else { 2.0 },
        tolerance: SUMS,
        operation: Box::new(move |inputs| {
            let (x, projection) = (inputs.learning([BATCH, IMAGE, input], 1.0), projection(inputs));
            Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 2))
        }),
    }
}

/// A projection of one vector a sample: limited by reading the weight.
fn modulation_case() -> Check {
    let (input, output) = (WIDTH, 6 * WIDTH);
    Check {
        name: "linear, one row a sample".into(),
        size: format!("{BATCH} x {input} to {output}"),
        flops: 0.0,
        bytes: F32 * (BATCH * (input + output) + input * output) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(move |inputs| {
            let (x, projection) = (inputs.learning([BATCH, input], 1.0), dense(inputs, input, output));
            Box::new(move || linear(x.clone(), projection.clone()).flatten(0, 1))
        }),
    }
}

fn concat_case() -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name: "linear, query key value".into(),
        size: format!("{rows} x {WIDTH} to 3 x {WIDTH}"),
        flops: 6.0 * (rows * WIDTH * WIDTH) as f64,
        bytes: F32 * (4 * rows * WIDTH + 3 * WIDTH * WIDTH) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(|inputs| {
            let x = inputs.learning([BATCH, IMAGE, WIDTH], 1.0);
            let three = [0; 3].map(|_| dense(inputs, WIDTH, WIDTH));
            Box::new(move || linear_concat(x.clone(), three.clone()).flatten(0, 2))
        }),
    }
}

/// A third of the text of every other sample is padding.
fn padded() -> KeyMask {
    let lengths: Vec<usize> = (0..BATCH).map(|sample| TEXT - sample % 2 * TEXT / 3).collect();
    KeyMask::from_lengths(&lengths, TEXT, IMAGE)
}

fn attention_case(name: &str, options: AttentionOptions) -> Check {
    let tokens = TEXT + IMAGE;
    Check {
        name: name.into(),
        size: format!("{BATCH} x {HEADS} x {tokens} x {HEAD}"),
        flops: 4.0 * (BATCH * tokens * tokens * WIDTH) as f64,
        bytes: F32 * (4 * BATCH * tokens * WIDTH) as f64,
        // Scores again, and four products more.
        backward_passes: 2.5,
        tolerance: SUMS,
        operation: Box::new(move |inputs| {
            let (qkv, options) = (inputs.learning([3, BATCH, HEADS, tokens, HEAD], 1.0), options.clone());
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
    memory_case("norm and rotation of q, k", BATCH * tokens * WIDTH, 6.0, 2.0, SUMS, |inputs| {
        let mut stream = |tokens| QkvStream {
            qkv: inputs.learning([BATCH, tokens, 3 * WIDTH], 1.0),
            norm_q: inputs.learning([HEAD], 1.0),
            norm_k: inputs.learning([HEAD], 1.0),
        };
        let (text, image, rotary) = (stream(TEXT), stream(IMAGE), rotary());
        Box::new(move || joint_qkv(text.clone(), image.clone(), HEADS, &rotary, EPSILON).flatten(0, 4))
    })
}

fn norm_modulate_case() -> Check {
    memory_case("norm and modulation", BATCH * IMAGE * WIDTH, 2.0, 1.5, SUMS, |inputs| {
        let (x, modulation) = token_inputs(inputs);
        let at = Modulation { shift: 0, scale: 1 };
        Box::new(move || norm_modulate(x.clone(), modulation.clone(), at, EPSILON).flatten(0, 2))
    })
}

fn rms_norm_case() -> Check {
    memory_case("rms norm", BATCH * IMAGE * WIDTH, 2.0, 1.5, SUMS, |inputs| {
        let (x, weight) = (inputs.learning([BATCH, IMAGE, WIDTH], 1.0), inputs.learning([WIDTH], 1.0));
        Box::new(move || rms_norm(x.clone(), weight.clone(), EPSILON).flatten(0, 2))
    })
}

fn gated_residual_case() -> Check {
    memory_case("gated residual", BATCH * IMAGE * WIDTH, 3.0, 1.0, SUMS, |inputs| {
        let (x, modulation) = token_inputs(inputs);
        let update = inputs.learning([BATCH, IMAGE, WIDTH], 1.0);
        Box::new(move || gated_residual(x.clone(), update.clone(), modulation.clone(), 2).flatten(0, 2))
    })
}

fn token_inputs(inputs: &mut Inputs) -> (Tensor<3>, Tensor<2>) {
    (inputs.learning([BATCH, IMAGE, WIDTH], 1.0), inputs.learning([BATCH, 6 * WIDTH], 0.5))
}

fn gelu_case(name: &str, kind: Gelu) -> Check {
    memory_case(name, BATCH * IMAGE * 4 * WIDTH, 2.0, 1.5, ROUNDINGS, move |inputs| {
        let x = inputs.learning([BATCH, IMAGE, 4 * WIDTH], 1.0);
        Box::new(move || gelu(x.clone(), kind).flatten(0, 2))
    })
}

fn glu_case() -> Check {
    memory_case("gate by SiLU", BATCH * IMAGE * 4 * WIDTH, 3.0, 5.0 / 3.0, ROUNDINGS, |inputs| {
        let value = inputs.learning([BATCH, IMAGE, 4 * WIDTH], 1.0);
        let gate = inputs.learning([BATCH, IMAGE, 4 * WIDTH], 1.0);
        Box::new(move || glu(value.clone(), gate.clone(), Gate::Silu).flatten(0, 2))
    })
}

fn glu_halves_case() -> Check {
    memory_case("gate by GELU, halves", BATCH * IMAGE * 4 * WIDTH, 3.0, 5.0 / 3.0, ROUNDINGS, |inputs| {
        let x = inputs.learning([BATCH, IMAGE, 8 * WIDTH], 1.0);
        Box::new(move || glu_halves(x.clone(), Gate::Gelu(Gelu::Exact)).flatten(0, 2))
    })
}

fn split_tokens_case() -> Check {
    memory_case("taking tokens", BATCH * IMAGE * WIDTH, 2.0, 1.0, 0.0, |inputs| {
        let joint = inputs.learning([BATCH, TEXT + IMAGE, WIDTH], 1.0);
        Box::new(move || split_tokens(joint.clone(), TEXT..TEXT + IMAGE).flatten(0, 2))
    })
}

/// What follows one another in a transformer's block: modulation, MLP and residual.
fn block_case() -> Check {
    let rows = BATCH * IMAGE;
    Check {
        name: "modulated MLP of a block".into(),
        size: format!("{rows} x {WIDTH}"),
        flops: 16.0 * (rows * WIDTH * WIDTH) as f64,
        bytes: F32 * (12 * rows * WIDTH + 8 * WIDTH * WIDTH) as f64,
        backward_passes: 2.0,
        tolerance: SUMS,
        operation: Box::new(|inputs| {
            let (x, modulation) = token_inputs(inputs);
            let (up, down) = (dense(inputs, WIDTH, 4 * WIDTH), dense(inputs, 4 * WIDTH, WIDTH));
            let at = Modulation { shift: 3, scale: 4 };
            Box::new(move || {
                let normed = norm_modulate(x.clone(), modulation.clone(), at, EPSILON);
                let hidden = gelu(linear(normed, up.clone()), Gelu::Tanh);
                gated_residual(x.clone(), linear(hidden, down.clone()), modulation.clone(), 5).flatten(0, 2)
            })
        }),
    }
}

fn adamw_case() -> Check {
    let numbers = 12 * WIDTH * WIDTH;
    memory_case("AdamW", numbers, 7.0, 0.0, ROUNDINGS, move |inputs| {
        let (parameter, gradient) = (inputs.frozen([numbers], 1.0), inputs.frozen([numbers], 1.0));
        let at = AdamWStep { learning_rate: 1e-2, gradient_scale: 0.5, step: 1 };
        Box::new(move || {
            let mut moments = Moments::zeros(numbers);
            AdamW::default().step(parameter.clone(), gradient.clone(), &mut moments, at)
        })
    })
}
