//! `inspect` and `lora` from outside.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fewstep_data::metadata::{DistillRow, Media, RandDevice, write_distill_csv};
use fewstep_data::provenance::{Provenance, TORCH_CPU};
use fewstep_testkit::golden;
use fewstep_train::Recipe;
use serde_json::Value;

fn fewstep(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fewstep")).args(args).output().unwrap()
}

fn inspect(path: &Path, flags: &[&str]) -> Value {
    let path = path.to_string_lossy();
    let output = fewstep(&[&["inspect", &path, "--json"], flags].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher")
}

const LORA: &str = "training/lora_tanh_constantlr.safetensors";

#[test]
fn loras_are_converted_fused_and_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let arg = |name: &str| path(name).to_string_lossy().into_owned();
    let lora = golden(LORA).to_string_lossy().into_owned();
    let convert =
        ["lora", "convert", "--input", &lora, "--output", &arg("a.safetensors"), "--format", "diffusers"];
    assert!(fewstep(&convert).status.success());
    let told = inspect(&path("a.safetensors"), &[]);
    assert_eq!((told["kind"].as_str(), told["format"].as_str()), (Some("LoRA"), Some("diffusers")));
    assert_eq!(told["layers"].as_object().unwrap().len(), 36);
    assert_eq!(told["layers"]["transformer_blocks.0.img_mod.1"], "rank 4, alpha 4, 72 → 432");

    let model = golden("qwen_image/model").to_string_lossy().into_owned();
    let adapter = format!("{}:0.5", arg("a.safetensors"));
    let fuse = |lora: &str| {
        fewstep(&[
            "lora",
            "fuse",
            "--model",
            &model,
            "--lora",
            lora,
            "--output",
            &arg("fused"),
            "--dtype",
            "bf16",
        ])
    };
    for _ in 0..2 {
        let output = fuse(&adapter);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let told = inspect(&path("fused/transformer"), &[]);
    assert_eq!(told["dtypes"], serde_json::json!(["BF16"]));
    let output = fuse(&arg("a.safetensors"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("something else already") && said.contains("hint:"), "{said}");
}

#[test]
fn a_weight_file_is_told_with_its_tensors_and_metadata() {
    let told = inspect(&golden("judge/judge.safetensors"), &[]);
    assert_eq!(told["kind"], "weight file");
    let tensors = told["keys"].as_object().unwrap();
    assert_eq!(told["tensors"].as_u64().unwrap() as usize, tensors.len());
    assert!(tensors.values().all(|told| told.as_str().unwrap().starts_with("F32 [")), "{tensors:?}");
}

#[test]
fn a_model_folder_is_told_with_what_it_takes() {
    let flags = ["--height", "64", "--width", "64", "--tflops", "1", "--batch_size", "2", "--lora-rank", "8"];
    let told = inspect(&teacher(), &flags);
    assert_eq!(told["family"], "QwenImagePipeline");
    let transformer = &told["components"]["transformer"];
    assert_eq!(transformer["class"], "QwenImageTransformer2DModel");
    assert_eq!(transformer["parameters"], transformer["parameters_by_config"]);
    assert_eq!(told["workload"]["image_tokens"], 64);
    let (exact, half) = (&told["memory_gib"]["f32"], &told["memory_gib"]["bf16"]);
    let ratio = |name: &str| exact[name].as_f64().unwrap() / half[name].as_f64().unwrap();
    // Numbers are told in three digits.
    assert!((ratio("weights") - 2.0).abs() < 0.02 && (ratio("optimiser") - 1.0).abs() < 0.02, "{told}");
    // Trained weights stay in f32; adapters leave the model as it is.
    assert_eq!(half["weights_training"], half["weights"]);
    let whole = inspect(&teacher(), &["--height", "64", "--width", "64", "--tflops", "1"]);
    let in_training = |dtype: &str| whole["memory_gib"][dtype]["weights_training"].as_f64().unwrap();
    let frozen = |dtype: &str| whole["memory_gib"][dtype]["weights"].as_f64().unwrap();
    assert!(in_training("bf16") > 1.5 * frozen("bf16") && in_training("f32") == frozen("f32"), "{whole}");
    let time = &told["time"];
    let secs = |name: &str| time[name].as_f64().unwrap();
    assert!((secs("secs_per_evaluation") - secs("tflop_per_evaluation")).abs() < 1e-9, "{time}");
    let drawn = secs("secs_per_batch_drawn") / secs("secs_per_evaluation");
    assert!((drawn - 4.0).abs() < 0.05, "{time}");
    // Four steps: with frozen weights four backwards of about the work of an evaluation each, and seven evaluations, three
    // of which take over a third of their work, the second half of each MLP.
    let distilled = secs("secs_per_distillation_step") / secs("secs_per_evaluation");
    assert!((10.4..10.6).contains(&distilled), "{time}");
    // Other devices keep nothing inside of blocks that are computed again, and more inside of those that are not.
    let on_gpu = inspect(&teacher(), &[&flags[..], &["--device", "cuda:0"]].concat());
    let held = |told: &Value, name: &str| told["memory_gib"]["f32"][name].as_f64().unwrap();
    for name in ["activations_drawing", "activations_training"] {
        assert!(held(&on_gpu, name) > held(&told, name), "{name}: {on_gpu}");
    }
    let secs = |told: &Value, name: &str| told["time"][name].as_f64().unwrap();
    let plain = "secs_per_distillation_step";
    let again = "secs_per_distillation_step_with_checkpointing";
    // All four steps are recorded then, which saves what is left of three evaluations; on other devices four are computed
    // again, and nothing is taken over.
    let saved = (secs(&told, plain) - secs(&told, again)) / secs(&told, "secs_per_evaluation");
    assert!((1.7..1.9).contains(&saved) && secs(&on_gpu, again) > secs(&on_gpu, plain), "{told}");
    assert!(
        (11.0..12.0).contains(&(secs(&on_gpu, plain) / secs(&on_gpu, "secs_per_evaluation"))),
        "{on_gpu}"
    );
    let four = "distillation_with_checkpointing_in_all";
    assert!(held(&told, four) > held(&told, "training_with_checkpointing_in_all"), "{told}");
    let text = fewstep(&["inspect", &teacher().to_string_lossy(), "--height", "64", "--width", "64"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.starts_with("kind: model folder\n") && text.contains("\n  transformer:\n"), "{text}");
    assert!(text.contains("speed: measured here"), "{text}");
}

#[test]
fn a_data_set_is_told_with_its_rows_and_origin() {
    let folder = tempfile::tempdir().unwrap();
    let provenance = Provenance {
        teacher: "assets/teacher".into(),
        num_inference_steps: 50,
        noise_generator: TORCH_CPU.into(),
        ..Provenance::default()
    };
    provenance.write(folder.path()).unwrap();
    assert_eq!(inspect(folder.path(), &[])["rows"], Value::Null, "nothing has been drawn yet");
    let row = |index: usize| DistillRow {
        media: Media::Image,
        file: format!("images/{index:06}.png"),
        prompt: "a cat".into(),
        seed: index as u64,
        rand_device: RandDevice::Cpu,
        num_inference_steps: 4,
        cfg_scale: 1.0,
        embedded_guidance: None,
        num_frames: None,
    };
    write_distill_csv(&folder.path().join("metadata.csv"), &[row(0), row(1)]).unwrap();
    let told = inspect(folder.path(), &[]);
    assert_eq!((told["kind"].as_str(), told["rows"].as_u64()), (Some("data set"), Some(2)));
    assert_eq!(told["provenance"]["num_inference_steps"], 50);
}

#[test]
fn a_run_is_told_with_its_step_losses_and_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let recipe = Recipe { task: fewstep_train::Task::DirectDistill, ..Recipe::default() };
    fs::write(path("run.toml"), recipe.to_toml()).unwrap();
    let header = "step,epoch,loss,gradient_norm,learning_rate,samples_per_sec\n";
    fs::write(path("loss.csv"), format!("{header}10,0,5e-1,2,1e-4,7\n20,1,2.5e-1,2,1e-4,7\n")).unwrap();
    for name in ["checkpoints/step-00000020", "checkpoints/.step-00000030.part"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    let told = inspect(folder.path(), &[]);
    assert_eq!((told["task"].as_str(), told["step"].as_u64()), (Some("direct_distill"), Some(20)));
    assert_eq!((told["first_loss"].as_f64(), told["last_loss"].as_f64()), (Some(0.5), Some(0.25)));
    assert_eq!(told["checkpoints"], serde_json::json!(["step-00000020"]));
}

#[test]
fn what_is_not_known_says_what_would_be() {
    let folder = tempfile::tempdir().unwrap();
    let output = fewstep(&["inspect", &folder.path().to_string_lossy()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("model_index.json") && said.contains("hint:"), "{said}");
}
