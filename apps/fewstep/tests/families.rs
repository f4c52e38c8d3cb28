//! The whole way of a user's data with every family, on the goldens' tiny folders.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_testkit::{Golden, assert_close, copy_folder, golden};
use program::{fails, judge, run};
use tempfile::TempDir;

/// Families with the names of their denoisers.
const FAMILIES: [(&str, &str); 5] = [
    ("flux", "transformer"),
    ("sd15", "unet"),
    ("sd3", "transformer"),
    ("sdxl", "unet"),
    ("zimage", "transformer"),
];
const SIZE: [&str; 4] = ["--height", "64", "--width", "64"];

/// Teacher pictures of a family's tiny model in `data/`.
struct Fixture {
    folder: TempDir,
    model: String,
}

impl Fixture {
    fn new(family: &str) -> Self {
        let model = golden(&format!("{family}/model")).to_string_lossy().into_owned();
        let fixture = Self { folder: tempfile::tempdir().unwrap(), model };
        let prompts = ["--prompt", "a cat", "--prompt", "a red house by the sea"];
        let settings = ["--num-inference-steps", "6", "--cfg-scale", "3", "--batch-size", "2"];
        fixture
            .run("generate", &[&["--output", &fixture.arg("data")], &prompts[..], &settings, &SIZE].concat());
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    fn run(&self, command: &str, args: &[&str]) -> String {
        run(&[&[command, "--model", &self.model], args].concat())
    }

    /// Trains on the teacher's pictures for some steps; gives the run's losses.
    fn train(&self, output: &str, args: &[&str]) -> Vec<f64> {
        let (data, output_arg) = (self.arg("data"), self.arg(output));
        let common = ["--dataset-base-path", &data, "--output-path", &output_arg, "--log-steps", "1"];
        let rates = ["--batch-size", "2", "--max-steps", "3"];
        self.run("train", &[&common[..], &rates, args].concat());
        losses(&self.path(output).join("loss.csv"))
    }

    /// Latents of one picture, drawn with some weights.
    fn latents(&self, output: &str, args: &[&str]) -> Vec<f32> {
        let output_arg = self.arg(output);
        let settings = ["--prompt", "a cat", "--output", &output_arg, "--seed", "5", "--cfg-scale", "1"];
        let steps = ["--num-inference-steps", "4"];
        run(&[&["generate"], args, &settings[..], &steps, &SIZE].concat());
        Golden::open(self.path(output).join("latents/000000.safetensors")).f32s("latents")
    }
}

fn losses(path: &Path) -> Vec<f64> {
    let text = fs::read_to_string(path).unwrap();
    let at = text.lines().next().unwrap().split(',').position(|name| name == "loss").unwrap();
    text.lines().skip(1).map(|line| line.split(',').nth(at).unwrap().parse().unwrap()).collect()
}

const DISTIL: [&str; 2] = ["--task", "direct_distill"];
const LORA: [&str; 6] = ["--lora-base-model", "dit", "--lora-rank", "4", "--learning-rate", "1e-3"];
const FULL: [&str; 4] = ["--trainable-models", "dit", "--learning-rate", "1e-4"];

#[test]
fn students_of_every_family_are_trained_fused_converted_and_reported() {
    for (family, denoiser) in FAMILIES {
        let fixture = Fixture::new(family);
        let lora = fixture.train("lora", &[&DISTIL[..], &LORA].concat());
        let full = fixture.train("full", &[&DISTIL[..], &FULL].concat());
        for losses in [&lora, &full] {
            assert_eq!(losses.len(), 3);
            assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
            assert!(losses[2] < losses[0], "{family}: {losses:?}");
        }
        // Fresh adapters change nothing, so both runs begin at the teacher's loss.
        assert!((lora[0] / full[0] - 1.0).abs() < 1e-5, "{family}: {} and {}", lora[0], full[0]);

        let adapter = fixture.arg("lora/lora.safetensors");
        let (converted, fused) = (fixture.arg("student.safetensors"), fixture.arg("fused"));
        run(&["lora", "convert", "--input", &adapter, "--output", &converted, "--format", "diffusers"]);
        let keys = Golden::open(&converted).keys();
        assert!(keys.iter().all(|key| key.starts_with(&format!("{denoiser}."))), "{keys:?}");
        run(&["lora", "fuse", "--model", &fixture.model, "--lora", &adapter, "--output", &fused]);

        let of = |output: &str, args: &[&str]| fixture.latents(output, args);
        let with_adapter = of("with_adapter", &["--model", &fixture.model, "--lora", &adapter]);
        let with_fused = of("with_fused", &["--model", &fused]);
        let with_converted = of("with_converted", &["--model", &fixture.model, "--lora", &converted]);
        let teacher = of("with_none", &["--model", &fixture.model]);
        // Adapters in one product or two: last bits, passed through four steps.
        let largest = teacher.iter().fold(1.0f32, |most, value| most.max(value.abs()));
        assert_close(&with_adapter, &with_fused, 5e-5 * largest);
        assert_close(&with_adapter, &with_converted, 0.0);
        assert_ne!(with_adapter, teacher);

        let student = format!("LoRA={adapter}");
        let full = format!("full={}", fixture.arg("full/model"));
        let (metadata, report) = (fixture.arg("data/metadata.csv"), fixture.arg("report"));
        let students = ["--student", &student, "--student", &full, "--output", &report];
        let teacher = ["--teacher-num-inference-steps", "6", "--teacher-cfg-scale", "3"];
        let judge = judge();
        let data = [&["--dataset-metadata-path", &metadata, "--judge", &judge], &teacher[..]].concat();
        fixture.run("evaluate", &[&students[..], &data, &SIZE].concat());
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture.path("report/report.json")).unwrap()).unwrap();
        let errors: Vec<f64> =
            json["rows"].as_array().unwrap().iter().filter_map(|row| row["latent_mse"].as_f64()).collect();
        assert!(errors.len() == 4 && errors.iter().all(|error| *error > 0.0), "{json}");
    }
}

#[test]
fn work_split_in_two_gives_the_losses_of_the_whole() {
    for (family, _) in FAMILIES {
        let fixture = Fixture::new(family);
        let whole =
            fixture.train("whole", &[&["--task", "sft", "--guidance-dropout", "0"], &LORA[..]].concat());
        let (data, cache) = (fixture.arg("data"), fixture.arg("cache"));
        let process = ["--task", "sft:data_process", "--dataset-base-path", &data, "--output-path", &cache];
        fixture.run("train", &process);
        let output = fixture.arg("split");
        let train = ["--task", "sft:train", "--dataset-base-path", &cache, "--output-path", &output];
        let rates = ["--batch-size", "2", "--max-steps", "3", "--log-steps", "1"];
        let dropout = ["--guidance-dropout", "0"];
        fixture.run("train", &[&train[..], &rates, &dropout, &LORA].concat());
        let split = losses(&fixture.path("split/loss.csv"));
        assert_eq!(whole, split, "{family}");
    }
}

#[test]
fn inspect_tells_what_a_folder_of_any_family_takes() {
    for (family, denoiser) in FAMILIES {
        let model = golden(&format!("{family}/model"));
        let said = std::process::Command::new(env!("CARGO_BIN_EXE_fewstep"))
            .args(["inspect", &model.to_string_lossy()])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.status.success() && text.contains(denoiser) && text.contains("vae"), "{text}");
    }
}

#[test]
fn a_folder_whose_parts_do_not_fit_is_refused_before_weights_are_read() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("sdxl/model"), folder.path(), &|_| true);
    let index = folder.path().join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("StableDiffusionXLPipeline", "StableDiffusionPipeline")).unwrap();
    let (model, output) = (folder.path().to_string_lossy(), folder.path().join("out"));
    let output = output.to_string_lossy();
    let args = ["generate", "--model", &model, "--output", &output, "--prompt", "x"];
    let said = fails(&[&args[..], &SIZE].concat(), 1);
    assert!(said.contains("cross_attention_dim is 80, expected the width of the text states, 32"), "{said}");
    fs::write(&index, text.replace("StableDiffusionXLPipeline", "KandinskyPipeline")).unwrap();
    let said = fails(&[&args[..], &SIZE].concat(), 1);
    assert!(said.contains("KandinskyPipeline") && said.contains("StableDiffusionXLPipeline"), "{said}");
}

#[test]
fn the_scale_that_a_denoiser_is_told_goes_from_pictures_to_student_and_back() {
    let fixture = Fixture::new("flux");
    let metadata = fs::read_to_string(fixture.path("data/metadata.csv")).unwrap();
    assert!(metadata.lines().next().unwrap().ends_with(",embedded_guidance"), "{metadata}");
    assert!(metadata.lines().nth(1).unwrap().ends_with(",3.5"), "the model's own: {metadata}");
    let (output, told) =
        (fixture.arg("told"), ["--embedded-guidance", "2", "--student-embedded-guidance", "1.5"]);
    let args = ["--prompt", "a cat", "--num-inference-steps", "2", "--output", &output];
    fixture.run("generate", &[&args[..], &told, &SIZE].concat());
    let text = fs::read_to_string(fixture.path("told/metadata.csv")).unwrap();
    assert!(text.trim_end().ends_with(",1.5"), "{text}");
    let provenance = fs::read_to_string(fixture.path("told/provenance.json")).unwrap();
    assert!(provenance.contains("\"embedded_guidance\": 2.0"), "{provenance}");
    let run_folder = fixture.arg("lora");
    let data = ["--dataset-base-path", &output, "--output-path", &run_folder, "--max-steps", "1"];
    fixture.run("train", &[&data[..], &DISTIL, &LORA].concat());
    let (adapter, drawn) = (fixture.arg("lora/lora.safetensors"), fixture.arg("drawn"));
    let args = ["--prompt", "a cat", "--lora", &adapter, "--output", &drawn];
    let said = fixture.run("generate", &[&args[..], &SIZE].concat());
    assert!(
        said.contains("is a student; as it was trained") && said.contains("embedded guidance 1.5"),
        "{said}"
    );
}
