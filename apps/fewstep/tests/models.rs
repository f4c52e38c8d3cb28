//! Which model a command works with: a folder, weight files, files to download.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use burn::tensor::Device;
use fewstep_models::{Model, ModelSource, WeightType};
use fewstep_testkit::{ModelServer, folder_files, write_tiny_configs};
use tempfile::TempDir;

/// A small model folder `model/`, and the server that offers its files.
struct Fixture {
    folder: TempDir,
    server: ModelServer,
}

/// Variables that would change where models come from.
const VARIABLES: [&str; 7] = [
    "FEWSTEP_MODEL_BASE_PATH",
    "FEWSTEP_DOWNLOAD_SOURCE",
    "FEWSTEP_SKIP_DOWNLOAD",
    "FEWSTEP_HF_ENDPOINT",
    "DIFFSYNTH_SKIP_DOWNLOAD",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
];

const ORIGINS: &str =
    "owner/name:transformer/*.safetensors,owner/name:text_encoder/model*.safetensors,owner/name:vae/";

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (configs, model) = (folder.path().join("configs"), folder.path().join("model"));
        write_tiny_configs(&configs);
        let source = ModelSource::from(&configs);
        let random = Model::random(&source, 1, &Device::flex()).unwrap();
        random.save_pretrained(&source, &model, WeightType::F32, &Default::default()).unwrap();
        let name = |path: &Path| path.to_string_lossy().replace('\\', "/");
        let files: Vec<_> =
            folder_files(&model).into_iter().map(|(path, bytes)| (name(&path), bytes)).collect();
        let served: Vec<(&str, &[u8])> =
            files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        Self { server: ModelServer::start(&served), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
        for name in VARIABLES {
            command.env_remove(name);
        }
        command
            .args(args)
            .env("HF_ENDPOINT", self.server.endpoint())
            .env("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
            .env("DIFFSYNTH_MODEL_BASE_PATH", self.path("models"));
        command
    }

    /// Draws one picture with the model that the flags name; returns its latents' file.
    fn draw(&self, name: &str, model: &[&str]) -> Vec<u8> {
        let output = self.path(name);
        let rest = ["--prompt", "a cat", "--num-inference-steps", "2", "--height", "16", "--width", "16"];
        let mut command = self.command(&["generate"]);
        succeeds(command.args(model).args(rest).arg("--output").arg(&output));
        fs::read(output.join("latents/000000.safetensors")).unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    said(&output)
}

fn fails(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {}", said(&output));
    said(&output)
}

#[test]
fn the_same_run_learns_the_same_wherever_its_files_come_from() {
    let fixture = Fixture::new();
    let model = fixture.path("model");
    let folder = model.display().to_string();
    fixture.draw("data", &["--model", &folder]);
    let losses = |name: &str, task: &str, data: &str, model: &[&str]| {
        let output = fixture.path(name);
        let mut command = fixture.command(&["train", "--task", task, "--max_steps", "2", "--log_steps", "1"]);
        command.args(model).args(["--lora_base_model", "dit", "--lora_rank", "2"]);
        succeeds(
            command.arg("--dataset_base_path").arg(fixture.path(data)).arg("--output_path").arg(&output),
        );
        fs::read_to_string(output.join("loss.csv")).ok()
    };
    let expected = losses("folder", "direct_distill", "data", &["--model", &folder]);
    let text_encoder = model.join("text_encoder/model.safetensors");
    let transformer = model.join("transformer/diffusion_pytorch_model.safetensors");
    let given = format!("[{text_encoder:?}, {transformer:?}]");
    let columns = |losses: &Option<String>| -> Vec<(String, String)> {
        let lines = losses.as_deref().expect("a log was written").lines();
        lines
            .map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>())
            .map(|c| (c[0].clone(), c[2].clone()))
            .collect()
    };
    let expected = columns(&expected);
    assert_eq!(expected.len(), 3);
    assert_eq!(columns(&losses("files", "direct_distill", "data", &["--model_paths", &given])), expected);
    let origins = ["--model_id_with_origin_paths", ORIGINS];
    assert_eq!(columns(&losses("origins", "direct_distill", "data", &origins)), expected);
    // Each half reads its own components alone.
    let first = format!("[{text_encoder:?}]");
    losses("processed", "direct_distill:data_process", "data", &["--model_paths", &first]);
    let second = format!("[{transformer:?}]");
    let split = losses("split", "direct_distill:train", "processed", &["--model_paths", &second]);
    assert_eq!(columns(&split), expected);
}

#[test]
fn the_same_model_draws_the_same_picture_wherever_its_files_come_from() {
    let fixture = Fixture::new();
    let model = fixture.path("model");
    let folder = fixture.draw("a", &["--model", &model.display().to_string()]);
    let given = format!(
        "[{:?}, [{:?}]]",
        model.join("text_encoder/model.safetensors"),
        model.join("transformer/diffusion_pytorch_model.safetensors")
    );
    assert_eq!(fixture.draw("b", &["--model_paths", &given]), folder);
    assert_eq!(fixture.draw("c", &["--model_id_with_origin_paths", ORIGINS]), folder);
    let weights = fixture.path("models/owner/name/transformer/diffusion_pytorch_model.safetensors");
    assert_eq!(
        fs::read(weights).unwrap(),
        fs::read(model.join("transformer/diffusion_pytorch_model.safetensors")).unwrap()
    );
    // Everything is there now, also for a program that is told to stay offline.
    let requests = fixture.server.file_requests().len();
    let mut offline = fixture.command(&["generate", "--model-id-with-origin-paths", ORIGINS]);
    offline.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", "http://127.0.0.1:1").args(["--prompt", "a cat"]);
    offline.args(["--num-inference-steps", "2", "--height", "16", "--width", "16", "--output"]);
    succeeds(offline.arg(fixture.path("d")));
    assert_eq!(fs::read(fixture.path("d/latents/000000.safetensors")).unwrap(), folder);
    assert_eq!(fixture.server.file_requests().len(), requests);
}

#[test]
fn a_dry_run_says_what_would_be_downloaded_and_downloads_nothing() {
    let fixture = Fixture::new();
    fixture.draw("data", &["--model", &fixture.path("model").display().to_string()]);
    let dry = || {
        let mut command = fixture.command(&["train", "--dry_run", "--json", "--lora_base_model", "dit"]);
        command
            .args(["--model_id_with_origin_paths", ORIGINS, "--dataset_base_path"])
            .arg(fixture.path("data"));
        let output = command.arg("--output_path").arg(fixture.path("run")).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let told = dry();
    let missing: std::collections::BTreeMap<String, u64> = told["download"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| (file[0].as_str().unwrap().to_owned(), file[1].as_u64().unwrap()))
        .collect();
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    let path = fixture.path("models/owner/name").join(weights).display().to_string();
    let expected = fs::metadata(fixture.path("model").join(weights)).unwrap().len();
    assert_eq!(missing.get(&path), Some(&expected), "{missing:?}");
    assert_eq!((told["model"].is_null(), told["starts"].as_bool()), (true, Some(true)), "{told}");
    assert!(fixture.server.file_requests().is_empty() && !fixture.path("models").exists());
    // Once the files are there, everything is told.
    fixture.draw("other", &["--model_id_with_origin_paths", ORIGINS]);
    let told = dry();
    assert_eq!(told["download"], serde_json::json!([]));
    assert!(told["peak_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{told}");
    assert!(!fixture.path("run").exists());
}

#[test]
fn download_fetches_a_repository_or_a_pattern_and_names_the_files() {
    let fixture = Fixture::new();
    let base = fixture.path("elsewhere").display().to_string();
    let args = ["download", "--model-id", "owner/name", "--local-dir", &base];
    let text = succeeds(&mut fixture.command(&[&args[..], &["--pattern", "tokenizer/"]].concat()));
    let merges = fixture.path("elsewhere/owner/name/tokenizer/merges.txt");
    assert!(merges.is_file() && text.contains(&merges.display().to_string()), "{text}");
    assert!(!fixture.path("elsewhere/owner/name/transformer").exists());
    succeeds(&mut fixture.command(&args));
    let [found, expected] = ["elsewhere/owner/name", "model"].map(|name| folder_files(&fixture.path(name)));
    assert!(found == expected, "the downloaded folder differs from the served one");
    let modelscope = ["download", "--model_id_with_origin_paths", ORIGINS, "--source", "modelscope"];
    succeeds(fixture.command(&modelscope).env("MODELSCOPE_ENDPOINT", fixture.server.endpoint()));
    for name in ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"] {
        assert!(fixture.path("models/owner/name").join(name).is_file(), "{name}");
    }
}

#[test]
fn what_cannot_be_had_is_named() {
    let fixture = Fixture::new();
    let generate = |flags: &[&str]| {
        let rest = ["--prompt", "a", "--height", "16", "--width", "16", "--output", "never"];
        fixture.command(&[&["generate"], flags, &rest].concat())
    };
    let mut offline = generate(&["--model-id-with-origin-paths", ORIGINS]);
    let text = fails(offline.env("DIFFSYNTH_SKIP_DOWNLOAD", "True"), 1);
    assert!(text.contains("DIFFSYNTH_SKIP_DOWNLOAD") && text.contains("models/owner/name"), "{text}");
    let text = fails(&mut generate(&["--model-id-with-origin-paths", "owner/none:x"]), 1);
    assert!(text.contains("owner/none") && text.contains("404"), "{text}");
    let encoder = fixture.path("model/text_encoder/model.safetensors");
    let text = fails(&mut generate(&["--model-paths", &format!("[{encoder:?}]")]), 1);
    assert!(text.contains("component transformer") && text.contains("model.safetensors"), "{text}");
    fails(&mut generate(&[]), 2);
    fails(&mut generate(&["--model", "x", "--model-paths", "[]"]), 2);
}
