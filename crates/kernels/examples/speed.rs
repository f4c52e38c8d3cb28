//! Times the operations at the sizes of a small transformer's training step, forward and backward apart.
//!
//! Arguments: batch, image tokens, text tokens, width; by default 64, 64, 16, 256. Heads are 64 wide.

use std::time::Instant;

use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AdamW, AdamWStep, AttentionOptions, Gelu, LowRank, Modulation, Moments, Projection, QkvStream,
    RotaryTable, attention, gated_residual, gelu, inject, joint_qkv, linear, linear_concat, norm_modulate,
    split_tokens, tune_allocator,
};
use fewstep_testkit::random;

const HEAD: usize = 64;
const RUNS: usize = 15;

fn main() {
    tune_allocator();
    let arguments = std::env::args().skip(1).map(|number| number.parse().expect("four whole numbers"));
    let sizes: [usize; 4] = arguments.collect::<Vec<_>>().try_into().unwrap_or([64, 64, 16, 256]);
    println!("{:20}{:>28}{:>28}", "", "forward", "backward");
    linear_layers(sizes);
    element_wise(sizes);
    attention_parts(sizes);
    optimiser(sizes);
}

fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    random(shape, 1, &Device::flex().autodiff()).require_grad()
}

fn dense(input: usize, output: usize) -> Projection {
    Projection { weight: leaf([output, input]), bias: Some(leaf([output])), low_rank: None, rounded_to: None }
}

/// Frozen, with a tracked branch.
fn adapted(input: usize, output: usize) -> Projection {
    let device = Device::flex().autodiff();
    let branch = LowRank { down: leaf([16, input]), up: leaf([output, 16]), scale: 1.0 };
    let (weight, bias) = (random([output, input], 1, &device), random([output], 1, &device));
    Projection { weight, bias: Some(bias), low_rank: Some(branch), rounded_to: None }
}

fn linear_layers([batch, image, _, width]: [usize; 4]) {
    let gigaflop = |outputs: usize| 2.0 * (batch * image * width * outputs) as f64 / 1e9;
    let x = leaf([batch, image, width]);
    for factor in [1, 4] {
        let output = factor * width;
        let (dense, adapted) = (dense(width, output), adapted(width, output));
        time(&format!("linear x{factor}"), gigaflop(output), || linear(x.clone(), dense.clone()));
        time(&format!("linear x{factor}, lora"), gigaflop(output), || linear(x.clone(), adapted.clone()));
    }
    let (wide, narrowing) = (leaf([batch, image, 4 * width]), dense(4 * width, width));
    time("linear x1/4", gigaflop(4 * width), || linear(wide.clone(), narrowing.clone()));
    let three = [dense(width, width), dense(width, width), dense(width, width)];
    time("linear_concat", gigaflop(3 * width), || linear_concat(x.clone(), three.clone()));
}

fn element_wise([batch, image, _, width]: [usize; 4]) {
    let (x, modulation) = (leaf([batch, image, width]), leaf([batch, 6 * width]));
    let at = Modulation { shift: 0, scale: 1 };
    time("norm_modulate", 0.0, || norm_modulate(x.clone(), modulation.clone(), at, 1e-6));
    time("gated_residual", 0.0, || gated_residual(x.clone(), x.clone(), modulation.clone(), 2));
    let wide = leaf([batch, image, 4 * width]);
    time("gelu", 0.0, || gelu(wide.clone(), Gelu::Tanh));
    time("split_tokens", 0.0, || split_tokens(x.clone(), 0..image / 2));
}

fn attention_parts([batch, image, text, width]: [usize; 4]) {
    let (tokens, heads) = (image + text, width / HEAD);
    let half_turns = tokens * HEAD / 2;
    let rotary = RotaryTable::new(vec![-1.0; half_turns], vec![0.0; half_turns], HEAD / 2);
    let stream = |tokens| QkvStream {
        qkv: leaf([batch, tokens, 3 * width]),
        norm_q: leaf([HEAD]),
        norm_k: leaf([HEAD]),
    };
    let (text, image) = (stream(text), stream(image));
    time("joint_qkv", 0.0, || joint_qkv(text.clone(), image.clone(), heads, &rotary, 1e-6));
    let qkv = leaf([3, batch, heads, tokens, HEAD]);
    let gigaflop = 4.0 * (batch * tokens * tokens * width) as f64 / 1e9;
    time("attention", gigaflop, || attention(qkv.clone(), AttentionOptions::default()));
}

fn optimiser([_, _, _, width]: [usize; 4]) {
    let shape = [12 * width * width];
    let mut parameter = random::<1>(shape, 1, &Device::flex());
    let gradient = random::<1>(shape, 2, &Device::flex());
    let mut moments = Moments::zeros(shape[0]);
    let mut secs: Vec<f64> = Vec::new();
    for step in 1..=RUNS as u64 {
        let start = Instant::now();
        let at = AdamWStep { learning_rate: 1e-3, gradient_scale: 1.0, step };
        parameter = AdamW::default().step(parameter, gradient.clone(), &mut moments, at);
        secs.push(start.elapsed().as_secs_f64());
    }
    println!("{:20}{}", "adamw, 12 D²", summary(secs, 0.0));
}

/// Prints the medians; `gigaflop` is the forward's work without branches, the backward counts as twice as much.
fn time<const D: usize>(name: &str, gigaflop: f64, operation: impl Fn() -> Tensor<D>) {
    let cotangent = random::<D>(operation().dims(), 3, &Device::flex());
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let start = Instant::now();
        let output = operation();
        forward.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        drop(inject(output, cotangent.clone()).backward());
        backward.push(start.elapsed().as_secs_f64());
    }
    println!("{name:20}{}{}", summary(forward, gigaflop), summary(backward, 2.0 * gigaflop));
}

fn summary(mut secs: Vec<f64>, gigaflop: f64) -> String {
    secs.sort_by(f64::total_cmp);
    let median = secs[secs.len() / 2];
    let rate = if gigaflop > 0.0 { format!("{:4.0} GFLOP/s", gigaflop / median) } else { String::new() };
    format!("{:>13.3} ms {rate:12}", median * 1e3)
}
