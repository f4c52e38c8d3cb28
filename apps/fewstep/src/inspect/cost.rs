//! Model folders: their parts, and the memory and time they take.

use std::path::Path;

use anyhow::{Result, ensure};
use fewstep_device::DeviceName;
use fewstep_models::{
    Components, Footprint, KeptSteps, ModelSource, WeightFiles, WeightType, Workload, check_weights,
};
use fewstep_train::Recipe;
use serde_json::{Value, json};

use super::InspectArgs;
use super::origin;
use super::weights::{merge, summary};
use crate::machine;

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
            frames: args.num_frames,
            batch_size: args.batch_size,
            text_tokens: args.text_tokens,
            lora_rank: args.lora_rank,
            components: Components::All,
            on_cpu: args.device == DeviceName::Cpu,
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
            "num_frames": args.num_frames,
            "batch_size": args.batch_size,
            "image_tokens": footprint.image_tokens,
            "text_tokens": args.text_tokens,
            "num_inference_steps": args.num_inference_steps,
            "device": args.device.to_string(),
            "trained": args.lora_rank.map_or("all of the denoiser".into(), |rank| format!("LoRA of rank {rank}")),
            "trained_parameters": footprint.trained,
        },
        "memory_gib": {
            "f32": memory(&footprint, WeightType::F32, args),
            "bf16": memory(&footprint, WeightType::BF16, args),
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
    if let Ok(Some((_, info))) = source.info(component) {
        merge(&mut told, json!({"origin": origin::told(&info)["origin"]}));
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

/// What is held in memory, in GiB, where frozen weights are stored in a number type; all else is f32. The optimiser is
/// AdamW.
fn memory(footprint: &Footprint, dtype: WeightType, args: &InspectArgs) -> Value {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let f32 = |numbers: u64| gib(numbers * WeightType::F32.bytes() as u64);
    let weights = |trained: &str| {
        let held = footprint.held.iter();
        let bytes = held
            .map(|(name, count)| count * Footprint::bytes_per_weight(name, dtype, *name == trained))
            .sum();
        gib(bytes)
    };
    let (frozen, adapters, in_training) = match args.lora_rank.is_some() {
        true => (weights(""), f32(footprint.trained), weights("")),
        false => (weights(""), 0.0, weights(footprint.denoiser)),
    };
    let (gradients, moments) = (f32(footprint.gradients()), f32(footprint.moments()));
    let activations = footprint.activations;
    let trained = in_training + adapters + gradients + moments;
    let distillation = activations.of_training(true, kept_steps(true).among(args.num_inference_steps), 1);
    json!({
        "weights": rounded(frozen),
        "weights_training": rounded(in_training),
        "adapters": rounded(adapters),
        "gradients": rounded(gradients),
        "optimiser": rounded(moments),
        "activations_drawing": rounded(f32(activations.drawing)),
        "activations_training": rounded(f32(activations.training)),
        "activations_training_with_checkpointing": rounded(f32(activations.checkpointed)),
        "drawing_in_all": rounded(frozen + f32(activations.drawing)),
        "training_in_all": rounded(trained + f32(activations.training)),
        "training_with_checkpointing_in_all": rounded(trained + f32(activations.checkpointed)),
        "distillation_with_checkpointing_in_all": rounded(trained + f32(distillation)),
    })
}

/// Student steps of which direct distillation keeps something by default.
fn kept_steps(use_gradient_checkpointing: bool) -> KeptSteps {
    Recipe { use_gradient_checkpointing, ..Recipe::default() }.kept_steps()
}

/// Operations, and the time they take at a speed.
fn time(footprint: &Footprint, args: &InspectArgs) -> Value {
    let (speed, source) = match args.tflops {
        Some(tflops) => (1e12 * tflops, "given"),
        None => (machine::measured_speed(), "measured here by a matrix product in f32"),
    };
    let steps = args.num_inference_steps;
    let drawing = steps as u64 * footprint.flops.forward;
    let secs = |operations: u64| rounded(operations as f64 / speed);
    let distilling =
        |checkpointed| secs(footprint.flops.distillation_step(steps, kept_steps(checkpointed), checkpointed));
    json!({
        "tflops_per_sec": rounded(speed / 1e12),
        "speed": source,
        "tflop_per_evaluation": rounded(footprint.flops.forward as f64 / 1e12),
        "secs_per_evaluation": secs(footprint.flops.forward),
        "secs_per_batch_drawn": secs(drawing),
        "secs_per_batch_drawn_with_guidance": secs(2 * drawing),
        "secs_per_distillation_step": distilling(false),
        "secs_per_distillation_step_with_checkpointing": distilling(true),
    })
}

/// Three digits, as JSON.
fn rounded(value: f64) -> Value {
    match format!("{value:.2e}").parse::<f64>() {
        Ok(value) => json!(value),
        Err(_) => Value::Null,
    }
}
