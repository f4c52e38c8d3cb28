//! Times a forward and a backward of a denoiser, all of its weights learning, and tells the most memory the process had.
//!
//! `denoiser_step FOLDER SIDE BATCH RUNS [recomputed]`: a model folder, the pictures' sides in px, pictures at once, and
//! whether blocks are computed again in the backward. Where the folder has configs alone, random weights are written.

use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{TunedAllocator, inject};
use fewstep_models::{Condition, Denoiser, LoadOptions, Model, ModelSource, write_random_weights};
use fewstep_testkit::random;

/// Tokens of each prompt.
const TEXT: usize = 77;

#[global_allocator]
static ALLOCATOR: TunedAllocator = TunedAllocator;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, side, batch, runs, switch @ ..] = arguments.as_slice() else {
        return Err("denoiser_step FOLDER SIDE BATCH RUNS [recomputed]".into());
    };
    let (folder, side, batch, runs): (_, usize, usize, usize) =
        (Path::new(folder), side.parse()?, batch.parse()?, runs.parse()?);
    if !folder.join("vae/model.safetensors").exists() {
        write_random_weights(folder, 1)?;
    }
    // Text encoders and autoencoder would be most of the memory of a small model.
    let options = LoadOptions { components: fewstep_models::Components::Denoiser, ..LoadOptions::default() };
    let model =
        Model::from_pretrained(&ModelSource::from(folder), &options)?.recomputing_blocks(!switch.is_empty());
    let [channels, height, width] = model.latent_shape([side, side])?;
    let device = Device::flex();
    let text = random([batch, TEXT, model.text_width()], 1, &device);
    let condition = Condition::new(text, vec![TEXT; batch]);
    let condition = match model.pooled_width() {
        Some(pooled) => condition.with_pooled(random([batch, pooled], 2, &device)),
        None => condition,
    };
    let (model, condition) = (model.train(), condition.autodiff());
    let noisy = random::<4>([batch, channels, height, width], 3, &device);
    let sigma = Tensor::<1>::full([batch], 0.7, &device).autodiff();
    let loaded = status_mb("VmRSS:");
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let start = Instant::now();
        let velocity = model.velocity(noisy.clone().autodiff().require_grad(), sigma.clone(), &condition);
        forward.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let cotangent = random(velocity.dims(), 4, &device);
        drop(inject(velocity, cotangent).backward());
        backward.push(start.elapsed().as_secs_f64());
    }
    println!(
        "forward {:.3} s, backward {:.3} s; {loaded:.0} MB with the weights, at most {:.0} MB",
        median(forward),
        median(backward),
        status_mb("VmHWM:")
    );
    Ok(())
}

fn median(mut secs: Vec<f64>) -> f64 {
    secs.sort_by(f64::total_cmp);
    secs[secs.len() / 2]
}

/// What Linux tells of this process; NaN elsewhere.
fn status_mb(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| 1024.0 * kib / 1e6)
}
