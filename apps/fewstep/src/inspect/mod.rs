//! `fewstep inspect`: tells what a file or folder is.
//!
//! Everything told is one JSON value; without `--json` it is printed as indented lines.

mod cost;
mod folders;
mod origin;
mod weights;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use clap::Args;
use fewstep_data::provenance;
use fewstep_device::DeviceName;
use fewstep_models::ModelError;
use fewstep_models::lora::LoraWeights;
use serde_json::Value;

/// Flags of `inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// A safetensors file, a LoRA, a model folder, a data set made by `generate`, or a run folder
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Model folder: picture height in pixels to state memory and time for
    #[arg(long, default_value_t = 1024)]
    pub height: usize,
    /// Model folder: picture width in pixels
    #[arg(long, default_value_t = 1024)]
    pub width: usize,
    /// Model folder: frames, of models that draw videos; 1 is a picture
    #[arg(long, default_value_t = 1)]
    pub num_frames: usize,
    /// Model folder: pictures at once
    #[arg(long, default_value_t = 1)]
    pub batch_size: usize,
    /// Model folder: sampling steps, of the student where training is meant
    #[arg(long, default_value_t = 4)]
    pub num_inference_steps: usize,
    /// Model folder: tokens of a prompt
    #[arg(long, default_value_t = 128)]
    pub text_tokens: usize,
    /// Model folder: rank of the adapters trained [default: the whole denoiser is trained]
    #[arg(long)]
    pub lora_rank: Option<usize>,
    /// Model folder: device whose memory is stated, cpu, cuda:N or wgpu; it need not be here
    #[arg(long, default_value = "cpu")]
    pub device: DeviceName,
    /// Model folder: speed of the machine in 10¹² operations per second [default: measured here by a matrix product]
    #[arg(long)]
    pub tflops: Option<f64>,
}

/// Prints what the path is.
///
/// # Errors
/// If it is none of the things that are known, or one of them and damaged.
pub fn run(args: &InspectArgs) -> Result<()> {
    let told = inspect(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&told)?);
    } else {
        print!("{}", lines(&told, 0));
    }
    Ok(())
}

fn inspect(args: &InspectArgs) -> Result<Value> {
    let path = args.path.as_path();
    ensure!(path.exists(), "{}: not found", path.display());
    let holds = |name: &str| path.join(name).exists();
    if path.is_file() {
        file(path)
    } else if holds("model_index.json") {
        cost::model(path, args)
    } else if holds("run.toml") {
        folders::run(path)
    } else if holds(provenance::FILE_NAME) {
        folders::data_set(path)
    } else if let Ok(told) = weights::tensors(path) {
        Ok(told)
    } else {
        bail!(
            "{}: not known\nhint: expected a safetensors file, or a folder with model_index.json, run.toml, {} or \
             *.safetensors",
            path.display(),
            provenance::FILE_NAME
        )
    }
}

/// A LoRA where the keys are those of one, else tensors.
fn file(path: &Path) -> Result<Value> {
    match LoraWeights::open(path) {
        Ok(lora) => weights::lora(&lora),
        Err(ModelError::LoraKeys { .. }) => weights::tensors(path),
        Err(error) => Err(error.into()),
    }
}

/// A value as lines `name: value`, what is inside another indented.
fn lines(value: &Value, depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let entry = |(name, value): (String, &Value)| match plain(value) {
        Some(text) if text.contains('\n') => {
            let inner: String = text.lines().map(|line| format!("{indent}  {line}\n")).collect();
            format!("{indent}{name}:\n{inner}")
        }
        Some(text) => format!("{indent}{name}: {text}\n"),
        None => format!("{indent}{name}:\n{}", lines(value, depth + 1)),
    };
    match value {
        Value::Object(entries) => entries.iter().map(|(name, value)| entry((name.clone(), value))).collect(),
        Value::Array(items) => {
            items.iter().enumerate().map(|(index, value)| entry((index.to_string(), value))).collect()
        }
        other => format!("{indent}{}\n", plain(other).unwrap_or_default()),
    }
}

/// A value that fits behind its name: no object, and no list but of plain values.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Object(_) => None,
        Value::Array(items) => {
            let parts = items.iter().map(|item| if item.is_array() { None } else { plain(item) });
            Some(format!("[{}]", parts.collect::<Option<Vec<_>>>()?.join(", ")))
        }
        Value::Null => Some("none".into()),
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_indent_what_is_inside_another() {
        let value =
            json!({"kind": "x", "inner": {"list": [1, 2], "none": null}, "rows": [{"a": 1}], "text": "b\nc"});
        let expected =
            "kind: x\ninner:\n  list: [1, 2]\n  none: none\nrows:\n  0:\n    a: 1\ntext:\n  b\n  c\n";
        assert_eq!(lines(&value, 0), expected);
    }
}
