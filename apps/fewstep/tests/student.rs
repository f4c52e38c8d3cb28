//! Weights that tell their origin, and `generate` with a student.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fewstep_models::{Student, WeightFiles, read_info};
use fewstep_testkit::golden;
use program::{fails, run};
use serde_json::Value;
use tempfile::TempDir;

/// A folder of runs with the small Qwen-Image model.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// Distils for one step into `output`.
    fn train(&self, output: &str, flags: &[&str]) {
        let (model, data) = (model(), golden("train_cli/data").to_string_lossy().into_owned());
        let output = self.arg(output);
        let fixed = ["train", "--model", &model, "--dataset_base_path", &data, "--output_path", &output];
        let sizes = ["--height", "64", "--width", "64", "--resized_targets", "allow", "--max_steps", "1"];
        run(&[&fixed[..], &sizes, flags].concat());
    }

    /// Draws a picture into `output`; returns what was said and the data set's provenance.
    fn draw(&self, output: &str, flags: &[&str]) -> (String, Value) {
        let path = self.arg(output);
        let size = ["--height", "64", "--width", "64"];
        let size = if flags.contains(&"--height") { &[][..] } else { &size };
        let said = run(&[&["generate", "--output", &path, "--prompt", "a cat"], size, flags].concat());
        let provenance = fs::read(self.path(output).join("provenance.json")).unwrap();
        (said, serde_json::from_slice(&provenance).unwrap())
    }
}

fn model() -> String {
    golden("qwen_image/model").to_string_lossy().into_owned()
}

const LORA: [&str; 4] = ["--lora_base_model", "dit", "--lora_rank", "2"];

fn drawn_with(provenance: &Value) -> (u64, f64) {
    (provenance["num_inference_steps"].as_u64().unwrap(), provenance["cfg_scale"].as_f64().unwrap())
}

fn inspected(path: &Path) -> Value {
    let output =
        Command::new(env!("CARGO_BIN_EXE_fewstep")).arg("inspect").arg(path).arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_lora_tells_everything_it_was_trained_with() {
    let fixture = Fixture::new();
    fixture.train("run", &LORA);
    let info = read_info(&fixture.path("run/lora.safetensors")).unwrap();
    let told = |name: &str| info[&format!("fewstep.{name}")].as_str();
    assert_eq!((told("task"), told("training_steps")), ("direct_distill", "1"));
    assert_eq!((told("num_inference_steps"), told("cfg_scale")), ("4", "1"));
    assert_eq!((told("noise_generator"), told("data_file")), ("torch-cpu", "metadata.csv"));
    for hash in [told("base_hash"), told("data_hash")] {
        assert!(hash.len() == 64 && hash.chars().all(|digit| digit.is_ascii_hexdigit()), "{hash}");
    }
    assert!(
        told("version").starts_with(concat!("fewstep ", env!("CARGO_PKG_VERSION"))),
        "{}",
        told("version")
    );
    assert!(told("recipe").contains("lora_rank = 2"), "{}", told("recipe"));
    let student = Student::of_file(&fixture.path("run/lora.safetensors")).unwrap().unwrap();
    assert_eq!(student.grids[0].sigmas.steps(), 4);
    assert_eq!(student.rule.unwrap().scheduler.flow_matching().unwrap().shift_terminal, Some(0.02));
    // Small beside any published adapter, whose header alone is as large.
    assert!(info.values().map(String::len).sum::<usize>() < 16_384);

    let origin = &inspected(&fixture.path("run/lora.safetensors"))["origin"];
    assert_eq!(origin["sigma_grids"][0]["num_inference_steps"], 4);
    assert_eq!(origin["base_hash"], told("base_hash"));
    let text = Command::new(env!("CARGO_BIN_EXE_fewstep"))
        .arg("inspect")
        .arg(fixture.path("run/lora.safetensors"))
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("origin:\n  task: direct_distill\n") && text.contains("\n    lora_rank = 2\n"),
        "{text}"
    );
}

#[test]
fn pictures_of_a_student_are_drawn_as_it_was_trained() {
    let fixture = Fixture::new();
    fixture.train("run", &LORA);
    let lora = fixture.arg("run/lora.safetensors");
    let (said, provenance) = fixture.draw("open", &["--model", &model(), "--lora", &lora]);
    assert_eq!(drawn_with(&provenance), (4, 1.0));
    assert!(said.contains("is a student; as it was trained: 4 steps, no guidance"), "{said}");
    assert!(!said.contains("warning"), "{said}");
    let (said, provenance) = fixture.draw("teacher", &["--model", &model(), "--num-inference-steps", "3"]);
    assert_eq!(drawn_with(&provenance), (3, 4.0));
    assert!(!said.contains("student"), "{said}");
}

#[test]
fn a_student_drawn_with_otherwise_is_named_in_one_warning() {
    let fixture = Fixture::new();
    fixture.train("run", &LORA);
    let lora = fixture.arg("run/lora.safetensors");
    let other = ["--num-inference-steps", "2", "--cfg-scale", "3", "--rand-device", "cuda", "--height", "48"];
    let more = ["--width", "64", "--exponential-shift-mu", "0.3"];
    let model = model();
    let flags = [&["--model", &model, "--lora", &lora], &other[..], &more].concat();
    let (said, provenance) = fixture.draw("other", &flags);
    assert_eq!(drawn_with(&provenance), (2, 3.0));
    assert_eq!(said.matches("warning:").count(), 1, "{said}");
    for part in ["2 steps", "guidance 3", "64x48 px", "torch-cuda", "a shift of 0.3"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_student_of_another_grid_is_drawn_on_its_own() {
    let fixture = Fixture::new();
    fixture.train("run", &[&LORA[..], &["--training_grid", "diffsynth"]].concat());
    let lora = fixture.arg("run/lora.safetensors");
    let student = Student::of_file(Path::new(&lora)).unwrap().unwrap();
    let model = model();
    let flags = ["--model", &model, "--lora", &lora];
    let (_, own) = fixture.draw("own", &flags);
    let sigmas =
        |provenance: &Value| serde_json::from_value::<Vec<f32>>(provenance["sigmas"].clone()).unwrap();
    assert_eq!(sigmas(&own), student.grids[0].sigmas.as_slice());
    let (_, models) = fixture.draw("models", &["--model", &model, "--num-inference-steps", "4"]);
    assert_ne!(sigmas(&own), sigmas(&models));
    // The rule holds for other sizes too: the same shift whatever the size.
    let (_, larger) = fixture.draw("larger", &[&flags[..], &["--height", "96", "--width", "96"]].concat());
    assert_eq!(sigmas(&larger), sigmas(&own));
}

#[test]
fn full_converted_fused_and_peer_files_are_students_too() {
    let fixture = Fixture::new();
    fixture.train("full", &["--trainable_models", "dit"]);
    fixture.train("lora", &LORA);
    fixture.train("peer", &[&LORA[..], &["--output_layout", "diffsynth"]].concat());
    let at = |name: &str| fixture.arg(name);
    let lora = at("lora/lora.safetensors");
    run(&["lora", "convert", "--input", &lora, "--output", &at("c.safetensors"), "--format", "diffusers"]);
    run(&["lora", "fuse", "--model", &model(), "--lora", &lora, "--output", &at("fused")]);
    let peer = fs::read_dir(fixture.path("peer")).unwrap().map(|entry| entry.unwrap().path());
    let peer = peer.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).max().unwrap();
    let peer = peer.to_string_lossy().into_owned();
    for (name, flags) in [
        ("a", vec!["--model".to_owned(), at("full/model")]),
        ("b", vec!["--model".to_owned(), model(), "--lora".to_owned(), at("c.safetensors")]),
        ("c", vec!["--model".to_owned(), at("fused")]),
        ("d", vec!["--model".to_owned(), model(), "--lora".to_owned(), peer]),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let (said, provenance) = fixture.draw(name, &flags);
        assert_eq!(drawn_with(&provenance), (4, 1.0), "{flags:?}: {said}");
        assert!(said.contains("is a student"), "{said}");
    }
    let fused = inspected(&fixture.path("fused"));
    let origin = &fused["components"]["transformer"]["origin"];
    assert_eq!(origin["task"], "direct_distill");
    assert!(origin["fused"]["base"].is_string(), "{origin}");
}

#[test]
fn a_model_trained_on_pictures_is_no_student() {
    let fixture = Fixture::new();
    fixture.train("run", &[&LORA[..], &["--task", "sft"]].concat());
    let path = fixture.path("run/lora.safetensors");
    assert_eq!(Student::of_file(&path).unwrap(), None);
    assert_eq!(read_info(&path).unwrap()["fewstep.task"], "sft");
    assert!(WeightFiles::open(&path).unwrap().keys().count() > 0);
}

#[test]
fn a_student_with_damaged_metadata_is_an_error() {
    let fixture = Fixture::new();
    fixture.train("run", &LORA);
    let path = fixture.path("run/lora.safetensors");
    let bytes = fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let grids = text.find("sigma_grids").unwrap();
    let at = grids + text[grids..].find("num_inference_steps").unwrap();
    let mut damaged = bytes;
    damaged[at] = b'x';
    fs::write(&path, damaged).unwrap();
    let said = fails(
        &[
            "generate",
            "--model",
            &model(),
            "--lora",
            &path.to_string_lossy(),
            "--prompt",
            "a",
            "--height",
            "64",
            "--width",
            "64",
            "--output",
            &fixture.arg("out"),
        ],
        1,
    );
    assert!(said.contains("lora.safetensors") && said.contains("fewstep.sigma_grids"), "{said}");
}
