//! DiffSynth-Studio's own script by its own arguments (goldens/train_cli): losses and weights of its whole run.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::Path;

use fewstep_testkit::{Golden, golden};
use program::{fails, run};

const LORA: &str = "--lora_base_model dit --lora_rank 4 --lora_checkpoint {cli}/lora_init.safetensors --lora_target_modules \
     to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1";
const FULL: &str = "--trainable_models dit";

/// How far a run may be from the peer's.
struct Tolerance {
    /// Of a loss, relative.
    loss: f64,
    /// Of the trained weights, as a share of the way they went.
    weights: f64,
}

/// Losses meet the bound of f32. AdamW divides gradients by their size, the smallest ones included, whose last bits differ.
const F32: Tolerance = Tolerance { loss: 2e-6, weights: 5e-3 };
/// The peer's activations are bf16 too, which is not repeated.
const BF16: Tolerance = Tolerance { loss: 2e-3, weights: 0.12 };

/// Weight files of the golden model as the script is given them: a list per component, or its one file.
fn model_paths(model: &Path) -> String {
    let of_component = |name: &str| {
        let entries = fs::read_dir(model.join(name)).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect();
        files.sort();
        match files.as_slice() {
            [file] => serde_json::json!(file),
            files => serde_json::json!(files),
        }
    };
    serde_json::json!(["transformer", "text_encoder", "vae"].map(of_component)).to_string()
}

fn losses(folder: &Path) -> Vec<f64> {
    let csv = fs::read_to_string(folder.join("loss.csv")).unwrap();
    csv.lines().skip(1).map(|line| line.rsplit(',').next().unwrap().parse().unwrap()).collect()
}

/// Distance of what was trained from the peer's file, as a share of the way from the start.
fn distance(found: &Path, expected: &Path, start: &[Golden]) -> f64 {
    let [found, expected] = [found, expected].map(Golden::open);
    assert_eq!(found.keys(), expected.keys());
    let (mut error, mut way) = (0.0, 0.0);
    for key in expected.keys() {
        let start = start.iter().find(|file| file.keys().contains(&key)).unwrap();
        let values = found.f64s(&key).into_iter().zip(expected.f64s(&key)).zip(start.f64s(&key));
        for ((found, expected), start) in values {
            error += (found - expected).powi(2);
            way += (expected - start).powi(2);
        }
    }
    (error / way).sqrt()
}

#[track_caller]
fn assert_same_run(name: &str, what: &str, start: &[Golden], tolerance: &Tolerance) {
    let folder = tempfile::tempdir().unwrap();
    let (output, cli, model) = (folder.path().join("run"), golden("train_cli"), golden("qwen_image/model"));
    let paths = model_paths(&model);
    let arguments = format!(
        "train --compat diffsynth --tokenizer_path {model}/tokenizer --dataset_base_path {cli}/data \
         --dataset_metadata_path {cli}/data/metadata.csv --data_file_keys image \
         --extra_inputs seed,rand_device,num_inference_steps,cfg_scale --height 64 --width 64 --dataset_repeat 2 \
         --learning_rate 1e-3 --num_epochs 2 --remove_prefix_in_ckpt pipe.dit. --output_path {output} \
         --use_gradient_checkpointing --dataset_num_workers 0 --find_unused_parameters --task direct_distill \
         --enable_csv_log {what}",
        model = model.display(),
        cli = cli.display(),
        output = output.display(),
        what = what.replace("{cli}", &cli.to_string_lossy()),
    );
    let mut arguments: Vec<&str> = arguments.split_whitespace().collect();
    arguments.extend(["--model_paths", &paths]);
    let said = run(&arguments);
    assert_eq!(said.matches("find_unused_parameters has no effect").count(), 1, "{said}");
    let (found, expected) = (losses(&output), losses(&cli.join(name)));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found / expected - 1.0).abs() < tolerance.loss, "{name}: {found}, expected {expected}");
    }
    for epoch in ["epoch-0.safetensors", "epoch-1.safetensors"] {
        let (found, expected) = (output.join(epoch), cli.join(name).join(epoch));
        assert!(found.exists(), "{name}: no {epoch}");
        if expected.exists() {
            let distance = distance(&found, &expected, start);
            assert!(distance < tolerance.weights, "{name}, {epoch}: off by {distance} of the way");
        }
    }
}

fn adapters() -> [Golden; 1] {
    [Golden::open(golden("train_cli/lora_init.safetensors"))]
}

#[test]
fn the_peers_script_trains_its_adapters() {
    assert_same_run("lora_float32", LORA, &adapters(), &F32);
}

#[test]
fn the_peers_script_trains_its_adapters_with_the_published_activation() {
    assert_same_run("lora_float32_tanh", &format!("{LORA} --activation gelu-tanh"), &adapters(), &F32);
}

#[test]
fn the_peers_script_trains_its_adapters_in_bf16() {
    assert_same_run("lora_bfloat16", &format!("{LORA} --dtype bf16"), &adapters(), &BF16);
}

#[test]
fn the_peers_script_trains_its_full_weights() {
    let entries = fs::read_dir(golden("qwen_image/model/transformer")).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
    let start: Vec<Golden> = files.map(Golden::open).collect();
    assert_same_run("full_float32", FULL, &start, &F32);
}

#[test]
fn what_the_peers_script_has_and_this_program_lacks_is_refused() {
    let said = fails(&["train", "--zero_cond_t"], 2);
    assert!(said.contains("zero_cond_t is not supported"), "{said}");
}
