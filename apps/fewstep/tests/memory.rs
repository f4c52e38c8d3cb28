//! The memory that `train --dry-run` expects against the memory that the same run takes.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fewstep_testkit::golden;
use program::{run, strs};
use serde_json::Value;
use tempfile::TempDir;

/// Largest error of the estimate.
const TOLERANCE: f64 = 0.25;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fewstep(args: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
    command.args(args).current_dir(root());
    command
}

/// The largest resident size of a run, read while it lasts; its last milliseconds free memory.
fn measured_bytes(args: &[String]) -> f64 {
    let mut child = fewstep(args).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0_f64;
    let ended = loop {
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        peak = peak.max(kib.unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(ended.success(), "{args:?}");
    1024.0 * peak
}

fn told(args: &[String]) -> Value {
    let output = fewstep(args).args(["--dry-run", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Compares expected and measured peak of a run.
fn assert_expected(name: &str, flags: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run").to_string_lossy().into_owned();
    let args: Vec<String> =
        [&["train"], flags, &["--output_path", &output]].concat().into_iter().map(str::to_owned).collect();
    let told = told(&args);
    let (expected, measured) = (told["peak_bytes"].as_f64().unwrap(), measured_bytes(&args));
    let ratio = expected / measured;
    println!(
        "{name}: expected {:.1} MB, measured {:.1} MB, ratio {ratio:.3}",
        expected / 1e6,
        measured / 1e6
    );
    let phases = serde_json::to_string_pretty(&told["memory"]).unwrap();
    assert!(
        (1.0 - TOLERANCE..=1.0 + TOLERANCE).contains(&ratio),
        "{name}: expected {expected}, measured {measured}, ratio {ratio:.3}: {phases}"
    );
}

/// Pictures as the demo draws them, but fewer and in fewer steps.
fn demo_data() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (root().join("assets/teacher"), folder.path().join("data"));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let prompts = (0..24).flat_map(|number| ["--prompt".to_owned(), format!("3d emoji of apple {number}")]);
    let fixed =
        ["generate", "--model", &text(&model), "--output", &text(&output), "--height", "64", "--width", "64"];
    let steps = ["--num-inference-steps", "2", "--cfg-scale", "1"];
    let args: Vec<String> =
        fixed.iter().chain(&steps).map(|flag| (*flag).to_owned()).chain(prompts).collect();
    run(&strs(&args));
    folder
}

#[test]
fn the_demos_runs_take_the_memory_that_was_expected() {
    let folder = demo_data();
    let data = folder.path().join("data").to_string_lossy().into_owned();
    for recipe in ["recipes/demo_lora.toml", "recipes/demo_full.toml"] {
        let more = ["--dataset_base_path", &data, "--max_steps", "6", "--save_steps", "3"];
        assert_expected(recipe, &[&["--config", recipe], &more[..]].concat());
    }
}

#[test]
fn the_tiny_qwen_images_runs_take_the_memory_that_was_expected() {
    let (model, data) = (golden("qwen_image/model"), golden("train_cli/data"));
    let (model, data) = (model.to_string_lossy().into_owned(), data.to_string_lossy().into_owned());
    let sizes = ["--height", "64", "--width", "64", "--resized_targets", "allow"];
    let common = ["--model", &model, "--dataset_base_path", &data, "--batch_size", "2", "--max_steps", "6"];
    for task in ["sft", "direct_distill"] {
        for (name, trained) in [
            ("full", &["--trainable_models", "transformer"][..]),
            ("LoRA", &["--lora_base_model", "transformer", "--lora_rank", "8"]),
        ] {
            let flags = [&common[..], &sizes, &["--task", task], trained].concat();
            assert_expected(&format!("tiny Qwen-Image, {task}, {name}"), &flags);
        }
    }
}
