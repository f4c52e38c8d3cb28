//! Model folders: their parts, and the memory and time they take.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{Projection, linear};
use fewstep_models::{Footprint, ModelSource, WeightFiles, WeightType, Workload, check_weights};
use serde_json::{Value, json};

use super::InspectArgs;
use super::weights::{merge, summary};

/// A model folder.
pub(super) fn model(path: &Path, args: &InspectArgs) -> Result<Value> {
    ensure!(args.batch_size > 0, "--batch-size 0, expected 1 or more");
    ensure!(args.num_inference_steps > 0, "--num-inference-steps 0, expected 1 or more");
    let source = ModelSource::from(path);
    let footprint = Footprint::of(
        &source,
        &Workload {
            height: args.height,
            width: args.width,
            batch_size: args.batch_size,
            text_tokens: args.text_tokens,
            lora_rank: args.lora_rank,
        },
    )?;
    let index = json(&path.join("model_index.json"))?;
    let parts = index.as_object().into_iter().flatten().filter(|(_, value)| value.is_array());
    let mut components = serde_json::Map::new();
    for (name, classes) in parts {
        components.insert(name.clone(), component(&source, &path.join(name), &classes[1], &footprint)?);
    }
    Ok(json!({
        "kind": "model folder",
        "family": index["_class_name"],
        "components": components,
        "workload": {
            "height": args.height,
            "width": args.width,
            "batch_size": args.batch_size,
            "image_tokens": footprint.image_tokens,
            "text_tokens": args.text_tokens,
            "num_inference_steps": args.num_inference_steps,
            "trained": args.lora_rank.map_or("all of the denoiser".into(), |rank| format!("LoRA of rank {rank}")),
            "trained_parameters": footprint.trained,
        },
        "memory_gib": {
            "f32": memory(&footprint, WeightType::F32),
            "bf16": memory(&footprint, WeightType::BF16),
        },
        "time": time(&footprint, args),
    }))
}

/// One component: its class, and where it has weights, what its files hold and whether they fit the config.
fn component(source: &ModelSource, path: &Path, class: &Value, footprint: &Footprint) -> Result<Value> {
    let mut told = json!({"class": class});
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((component, expected)) = footprint.parameters.get_key_value(&*name) else { return Ok(told) };
    if let Ok(files) = WeightFiles::open(path) {
        merge(&mut told, summary(&files.entries()));
    }
    let weights = match check_weights(source, component) {
        Ok(()) => "as the config says".to_owned(),
        Err(error) => error.to_string(),
    };
    merge(&mut told, json!({"parameters_by_config": expected, "weights": weights}));
    Ok(told)
}

fn json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// What is held in memory, in GiB, where weights, gradients and activations are of a type.
fn memory(footprint: &Footprint, dtype: WeightType) -> Value {
    let gib = |numbers: u64, bytes: usize| (numbers * bytes as u64) as f64 / f64::from(1 << 30);
    let own = |numbers| gib(numbers, dtype.bytes());
    let weights = own(footprint.parameters.values().sum());
    let adapters = if footprint.parameters.values().any(|count| *count == footprint.trained) {
        0.0
    } else {
        own(footprint.trained)
    };
    let activations = footprint.activations;
    let trained = weights + adapters + own(footprint.gradients()) + gib(footprint.moments(), 4);
    json!({
        "weights": rounded(weights),
        "adapters": rounded(adapters),
        "gradients": rounded(own(footprint.gradients())),
        "optimiser": rounded(gib(footprint.moments(), 4)),
        "activations_drawing": rounded(own(activations.drawing)),
        "activations_training": rounded(own(activations.training)),
        "activations_training_with_checkpointing": rounded(own(activations.checkpointed)),
        "drawing_in_all": rounded(weights + own(activations.drawing)),
        "training_in_all": rounded(trained + own(activations.training)),
        "training_with_checkpointing_in_all": rounded(trained + own(activations.checkpointed)),
    })
}

/// Operations, and the time they take at a speed.
fn time(footprint: &Footprint, args: &InspectArgs) -> Value {
    let (speed, source) = match args.tflops {
        Some(tflops) => (1e12 * tflops, "given"),
        None => (measured_speed(), "measured here by a matrix product in f32"),
    };
    let steps = args.num_inference_steps;
    let drawing = steps as u64 * footprint.flops.forward;
    let secs = |operations: u64| rounded(operations as f64 / speed);
    json!({
        "tflops_per_sec": rounded(speed / 1e12),
        "speed": source,
        "tflop_per_evaluation": rounded(footprint.flops.forward as f64 / 1e12),
        "secs_per_evaluation": secs(footprint.flops.forward),
        "secs_per_batch_drawn": secs(drawing),
        "secs_per_batch_drawn_with_guidance": secs(2 * drawing),
        "secs_per_distillation_step": secs(footprint.flops.distillation_step(steps, false)),
        "secs_per_distillation_step_with_checkpointing": secs(footprint.flops.distillation_step(steps, true)),
    })
}

/// Three digits, as JSON.
fn rounded(value: f64) -> Value {
    match format!("{value:.2e}").parse::<f64>() {
        Ok(value) => json!(value),
        Err(_) => Value::Null,
    }
}

/// Operations per second of a projection of 1024 tokens and a width of 1024: the best of a few runs.
fn measured_speed() -> f64 {
    const SIZE: usize = 1024;
    const RUNS: usize = 6;
    let device = Device::flex();
    let x = Tensor::<2>::ones([SIZE, SIZE], &device);
    let weight = Tensor::<2>::ones([SIZE, SIZE], &device);
    let run = || {
        let start = Instant::now();
        let projection = Projection { weight: weight.clone(), bias: None, low_rank: None, rounded_to: None };
        let product = linear(x.clone(), projection);
        // Reading a value waits for the product.
        let _ = product.slice([0..1, 0..1]).into_scalar::<f32>();
        start.elapsed().as_secs_f64()
    };
    let best = (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * (SIZE * SIZE * SIZE) as f64 / best
}
