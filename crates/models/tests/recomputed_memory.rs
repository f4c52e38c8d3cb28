//! Gradient checkpointing's promise: a backward pass holds the whole inside of one block alone, and of the others what is
//! dear to compute, whatever the family.
//!
//! Alone in its test binary, because it counts what the whole process allocates.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::inject;
use fewstep_models::{Denoiser, LoadOptions, Model, ModelSource};
use fewstep_testkit::{golden, random};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Side of the picture in px: activations outweigh the tiny models' weights and gradients.
const SIDE: usize = 512;

/// Bytes allocated at the worst moment of a forward and backward of the denoiser, beside what was there before.
fn peak(model: &Model) -> f64 {
    let condition = model.encode_prompts(&["a red apple".to_owned()]).unwrap().with_frames(1).autodiff();
    let [channels, height, width] = model.latent_shape([SIDE, SIDE]).unwrap();
    let model = model.clone().train();
    let noisy = random::<4>([1, channels, height, width], 3, &Device::flex()).autodiff().require_grad();
    let sigma = Tensor::<1>::from_floats([0.7], &Device::flex()).autodiff();
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let velocity = model.velocity(noisy, sigma, &condition);
    let cotangent = random(velocity.dims(), 4, &Device::flex());
    drop(inject(velocity, cotangent).backward());
    (MEMORY.peak_usage() - before) as f64
}

#[test]
fn recomputed_blocks_take_less_memory_than_kept_ones() {
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
        let recomputed = peak(&model.recomputing_blocks(true));
        println!("{family}: {:.1} MB kept, {:.1} MB recomputed", kept / 1e6, recomputed / 1e6);
        assert!(recomputed < share * kept, "{family}: {recomputed} of {kept} bytes");
    }
}
