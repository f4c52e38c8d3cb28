//! Times steps of direct distillation at full size, with weights that are drawn on the device: nothing is downloaded, and
//! no weight passes through the host.
//!
//! `distillation_step --model FOLDER --device cuda:0 …`: of the folder only configs are read. Prints one JSON object: the
//! seconds of each step, its loss, and the most memory that burn's pools had on the device. Losses are those of random
//! weights and say nothing but that every number is finite.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::module::Param;
use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::Parser;
use fewstep::parse::named;
use fewstep_device::DeviceName;
use fewstep_models::sampling::Guidance;
use fewstep_models::{
    Components, Condition, DTYPES, KeptSteps, LoadOptions, Model, ModelSource, NamedMapper, WeightType,
    map_named,
};
use fewstep_train::method::{GradientSum, Rollout};
use fewstep_train::{Optimizer, Recipe, Trainable, gradient_norm};

/// What is timed.
#[derive(Parser)]
struct Flags {
    /// Model folder; configs alone suffice
    #[arg(long, default_value = "benches/cuda/qwen_image")]
    model: PathBuf,
    /// cpu, cuda:N or wgpu
    #[arg(long, default_value = "cuda:0")]
    device: DeviceName,
    /// Number type of the frozen weights
    #[arg(long, default_value = "bf16", value_parser = named(&DTYPES))]
    dtype: WeightType,
    /// Sides of the pictures in px
    #[arg(long, default_value_t = 1024)]
    side: usize,
    /// Pictures at once
    #[arg(long, default_value_t = 1)]
    batch_size: usize,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 128)]
    text_tokens: usize,
    /// Sampling steps of the student
    #[arg(long, default_value_t = 4)]
    num_inference_steps: usize,
    /// Rank of the adapters
    #[arg(long, default_value_t = 32)]
    lora_rank: usize,
    /// Keep everything a backward needs instead of computing blocks again
    #[arg(long)]
    keep_blocks: bool,
    /// Sampling steps whose graphs are kept on the way to the picture [default: as `train` has it]
    #[arg(long)]
    recorded_steps: Option<usize>,
    /// Optimiser steps; the first compiles kernels
    #[arg(long, default_value_t = 3)]
    steps: usize,
}

#[global_allocator]
static ALLOCATOR: fewstep_kernels::TunedAllocator = fewstep_kernels::TunedAllocator;

fn main() -> Result<()> {
    let flags = Flags::parse();
    let device = flags.device.open()?;
    let recipe = Recipe {
        lora_base_model: Some("dit".into()),
        lora_rank: flags.lora_rank,
        use_gradient_checkpointing: !flags.keep_blocks,
        recorded_steps: flags.recorded_steps,
        ..Recipe::default()
    };
    let mut model = model(&flags, &recipe, &device)?;
    let problem = Problem::new(&flags, &model, &device)?;
    let mut optimizer = Optimizer::new(&recipe);
    let (mut secs, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..flags.steps {
        let start = Instant::now();
        let (loss, gradients) = problem.step(&model, &flags, recipe.kept_steps())?;
        let gradients = gradients.finish();
        let norm = gradient_norm(&model, &gradients);
        model = optimizer.step(model, gradients, norm, recipe.learning_rate);
        device.sync()?;
        secs.push(start.elapsed().as_secs_f64());
        losses.push(loss);
    }
    let pools = device.memory_pool_usage();
    println!(
        "{}",
        serde_json::json!({
            "device": flags.device.to_string(),
            "secs": secs,
            "losses": losses,
            "bytes_in_use": pools.as_ref().map(|pools| pools.bytes_in_use),
            "bytes_reserved": pools.as_ref().map(|pools| pools.bytes_reserved),
        })
    );
    ensure!(losses.iter().all(|loss| loss.is_finite()), "a loss is not finite: {losses:?}");
    Ok(())
}

/// The denoiser with random weights and adapters that learn.
fn model(flags: &Flags, recipe: &Recipe, device: &Device) -> Result<Model> {
    let options = LoadOptions {
        device: device.clone(),
        dtype: flags.dtype,
        components: Components::Denoiser,
        ..LoadOptions::default()
    };
    let outline = Model::outline(&ModelSource::from(&flags.model), &options)?;
    let model = map_named(outline, &mut Drawn { device: device.clone(), dtype: flags.dtype });
    Ok(Trainable::new(recipe, &model)?.prepare(model, recipe)?)
}

/// Gives parameters random numbers of the device's own generator.
struct Drawn {
    device: Device,
    dtype: WeightType,
}

impl NamedMapper for Drawn {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = parameter.lazy_shape().dims::<D>();
        let dtype = if D == 2 { self.dtype.dtype() } else { DType::F32 };
        let spread = if D == 1 { 0.02 } else { f64::from(shape[D - 1] as u32).sqrt().recip() };
        let values = Tensor::random(shape, Distribution::Normal(0.0, spread), (&self.device, dtype));
        let id = parameter.id;
        parameter.transform_for_load(values, id)
    }
}

/// From this noise, under this text, to that picture.
struct Problem {
    noise: Tensor<4>,
    target: Tensor<4>,
    guidance: Guidance,
}

impl Problem {
    fn new(flags: &Flags, model: &Model, device: &Device) -> Result<Self> {
        let [channels, height, width] = model.latent_shape([flags.side; 2])?;
        let normal = Distribution::Normal(0.0, 1.0);
        let latents = || Tensor::random([flags.batch_size, channels, height, width], normal, device);
        let text = Tensor::random([flags.batch_size, flags.text_tokens, model.text_width()], normal, device);
        let condition = Condition::new(text, vec![flags.text_tokens; flags.batch_size]);
        let condition = match model.pooled_width() {
            Some(pooled) => condition.with_pooled(Tensor::random([flags.batch_size, pooled], normal, device)),
            None => condition,
        };
        let guidance = Guidance::off(condition.with_frames(1));
        Ok(Self { noise: latents(), target: latents(), guidance })
    }

    /// Loss and gradients, as the method of direct distillation has them.
    fn step(&self, model: &Model, flags: &Flags, kept: KeptSteps) -> Result<(f64, GradientSum)> {
        let grid = model.sigma_grid(flags.num_inference_steps, [flags.side; 2])?;
        let rollout = Rollout { grid, start: self.noise.clone(), guidance: self.guidance.clone() };
        let mut sum = GradientSum::default();
        let target = self.target.clone().autodiff();
        let loss = |drawn: Tensor<4>| (drawn - target).square().mean();
        Ok((rollout.add_gradient(model, kept, (1.0, &mut sum), loss), sum))
    }
}
