//! Gradient checkpointing's promise: a backward pass holds the whole inside of one block alone, and of the others what is
//! dear to compute, whatever the family. And what an evaluation leaves to its repetition is as little as is said of it.
//!
//! Alone in its test binary, because it counts what the whole process allocates.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{Remembered, inject};
use fewstep_models::{Components, Condition, Denoiser, Footprint, LoadOptions, Model, ModelSource, Workload};
use fewstep_testkit::{golden, random, values};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Side of the picture in px: activations outweigh the tiny models' weights and gradients.
const SIDE: usize = 512;

fn condition(model: &Model) -> Condition {
    model.encode_prompts(&["a red apple".to_owned()]).unwrap().with_frames(1)
}

/// A noisy latent and its sigma.
fn inputs(model: &Model) -> (Tensor<4>, Tensor<1>) {
    let [channels, height, width] = model.latent_shape([SIDE, SIDE]).unwrap();
    let noisy = random::<4>([1, channels, height, width], 3, &Device::flex());
    (noisy, Tensor::from_floats([0.7], &Device::flex()))
}

/// Bytes that an evaluation leaves to its repetition, and those that are said to be.
fn remembered(model: &Model, source: &ModelSource) -> (f64, f64) {
    let condition = condition(model);
    let (noisy, sigma) = inputs(model);
    let workload = Workload {
        height: SIDE,
        width: SIDE,
        frames: 1,
        batch_size: 1,
        text_tokens: condition.text.dims()[1],
        lora_rank: None,
        components: Components::Denoiser,
        on_cpu: true,
    };
    let said = Footprint::of(source, &workload).unwrap().activations.remembered;
    let before = MEMORY.current_usage();
    let (velocity, remembered) = Remembered::of(|| model.velocity(noisy.clone(), sigma.clone(), &condition));
    drop(velocity);
    let bytes = MEMORY.current_usage() - before;
    let again = remembered.taken_over_in(|| model.velocity(noisy.clone(), sigma.clone(), &condition));
    assert_eq!(values(again), values(model.velocity(noisy, sigma, &condition)));
    (bytes as f64, 4.0 * said as f64)
}

/// Bytes allocated at the worst moment of a forward and backward of the denoiser, beside what was there before.
fn peak(model: &Model) -> f64 {
    let condition = condition(model).autodiff();
    let (noisy, sigma) = inputs(model);
    let (noisy, sigma) = (noisy.autodiff().require_grad(), sigma.autodiff());
    let model = model.clone().train();
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let velocity = model.velocity(noisy, sigma, &condition);
    let cotangent = random(velocity.dims(), 4, &Device::flex());
    drop(inject(velocity, cotangent).backward());
    (MEMORY.peak_usage() - before) as f64
}

#[test]
fn recomputed_blocks_take_less_memory_than_kept_ones_and_remembered_evaluations_what_is_said() {
    // The largest share of the memory by family. Of two or three blocks one is whole.
    let shares = [
        ("flux", 0.75),
        ("qwen_image", 0.75),
        ("sd15", 0.75),
        ("sd3", 0.85),
        ("sdxl", 0.75),
        ("wan", 0.85),
        ("zimage", 0.75),
    ];
    for (family, share) in shares {
        let source = ModelSource::from(&golden(&format!("{family}/model")));
        let model = Model::from_pretrained(&source, &LoadOptions::default()).unwrap();
        peak(&model); // what threads allocate once and keep
        let kept = peak(&model);
        let (bytes, said) = remembered(&model, &source);
        let recomputed = peak(&model.recomputing_blocks(true));
        println!("{family}: {:.1} MB kept, {:.1} MB recomputed", kept / 1e6, recomputed / 1e6);
        assert!(recomputed < share * kept, "{family}: {recomputed} of {kept} bytes");
        println!("{family}: {:.2} MB remembered, {:.2} MB by formula", bytes / 1e6, said / 1e6);
        // Modulations are not spoken of; of Stable Diffusion 3 a tenth is unexplained.
        let most = if family == "sd3" { 1.1 } else { 1.05 };
        assert!((0.95..most).contains(&(bytes / said)), "{family}: {bytes} bytes remembered of {said}");
    }
}
