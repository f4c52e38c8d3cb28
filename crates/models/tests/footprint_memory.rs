//! The estimate of a training step's memory against the memory it takes.
//!
//! Alone in its test binary, because it reads the peak resident size of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::path::Path;

use burn::module::Module;
use burn::tensor::Device;
use fewstep_models::{Components, Condition, Denoiser, Footprint, Model, ModelSource, Workload};
use fewstep_testkit::random;

/// The largest resident size so far, in bytes.
fn peak_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")?.trim().parse::<f64>().ok());
    1024.0 * peak.unwrap()
}

#[test]
fn activations_are_those_measured() {
    let device = Device::flex();
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher");
    let workload = Workload {
        height: 256,
        width: 256,
        frames: 1,
        batch_size: 4,
        text_tokens: 32,
        lora_rank: None,
        components: Components::All,
        on_cpu: true,
    };
    let footprint = Footprint::of(&ModelSource::from(&teacher), &workload).unwrap();
    let model = Model::random(&ModelSource::from(&teacher), 1, &device).unwrap().train();
    let [channels, height, width] = model.latent_shape([256, 256]).unwrap();
    let condition = Condition::new(random([4, 32, 256], 2, &device).autodiff(), vec![32; 4]);
    let noisy = random([4, channels, height, width], 1, &device).autodiff();
    let sigma = random::<1>([4], 3, &device).abs().autodiff();
    let before = peak_bytes();
    let gradients = model.velocity(noisy, sigma, &condition).square().sum().backward();
    let measured = peak_bytes() - before;
    drop(gradients);
    let estimated = 4.0 * (footprint.activations.training + footprint.trained) as f64;
    println!("measured {measured:e}, estimated {estimated:e}");
    assert!((0.8..1.25).contains(&(measured / estimated)), "measured {measured:e}, estimated {estimated:e}");
}
