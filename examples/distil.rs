//! Teacher pictures, a LoRA student, and a picture in four steps: the whole way through the library.
//!
//! `cargo run --release --example distil -- OUTPUT_FOLDER`

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use fewstep::generate::{GenerateArgs, generate};
use fewstep::progress::{Terminal, TrainProgress};
use fewstep::train::version;
use fewstep_models::{LoraFile, Pipeline, PipelineOptions, Request};
use fewstep_train::{Context, Recipe, Task};

const PROMPTS: [&str; 4] =
    ["3d emoji of red apple", "flat emoji of cat face", "noto emoji of rocket", "扁平表情：披萨"];

fn main() -> anyhow::Result<()> {
    let teacher = Path::new("assets/teacher");
    let output = PathBuf::from(std::env::args().nth(1).unwrap_or("runs/example".into()));

    let data = output.join("teacher");
    let pictures = GenerateArgs {
        prompt: PROMPTS.map(String::from).to_vec(),
        images_per_prompt: 4,
        num_inference_steps: Some(20),
        ..GenerateArgs::new(teacher, &data, [64, 64])
    };
    generate(&pictures, &Terminal::new(false))?;

    let recipe = Recipe {
        task: Task::DirectDistill,
        model: teacher.to_owned(),
        dataset_base_path: data,
        output_path: output.join("student"),
        lora_base_model: Some("transformer".into()),
        learning_rate: 1e-3,
        batch_size: 4,
        max_steps: Some(20),
        ..Recipe::default()
    };
    let context =
        Context { model: None, device: Device::flex(), stop: &AtomicBool::new(false), version: &version() };
    fewstep_train::run(&recipe, context, &mut TrainProgress::new(false))?;

    let lora = LoraFile { path: output.join("student/lora.safetensors"), alpha: 1.0 };
    let pipe =
        Pipeline::from_pretrained(teacher, PipelineOptions { lora: Some(lora), ..Default::default() })?;
    let image = pipe.generate(&Request::new("3d emoji of red apple", 64, 64))?;
    image.save(output.join("apple.png"))?;
    Ok(())
}
