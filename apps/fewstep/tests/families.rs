//! The whole way of a user's data with every family, on the goldens' tiny folders.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_data::image::Size;
use fewstep_data::video::{Clip, Video};
use fewstep_testkit::{Golden, assert_close, copy_folder, golden};
use program::{fails, judge, run};
use tempfile::TempDir;

/// Families with the names of their denoisers.
const FAMILIES: [(&str, &str); 6] = [
    ("flux", "transformer"),
    ("sd15", "unet"),
    ("sd3", "transformer"),
    ("sdxl", "unet"),
    ("wan", "transformer"),
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
fn students_of_videos_are_trained_from_generated_ones_and_from_files_alone() {
    let fixture = Fixture::new("wan");
    let (videos, few) = (fixture.arg("videos"), ["--num-frames", "5"]);
    let prompts = ["--prompt", "a cat", "--prompt", "a red house by the sea"];
    let settings = ["--num-inference-steps", "4", "--cfg-scale", "3", "--output", &videos];
    fixture.run("generate", &[&settings[..], &prompts, &few, &SIZE].concat());
    let metadata = fs::read_to_string(fixture.path("videos/metadata.csv")).unwrap();
    assert!(metadata.starts_with("video,prompt,seed,"), "{metadata}");
    assert!(metadata.contains("\nvideos/000000.webp,a cat,0,cpu,4,1"), "{metadata}");
    let video = Video::load(&fixture.path("videos/videos/000000.webp"), Clip::WHOLE).unwrap();
    assert_eq!((video.frames().len(), video.size()), (5, Size { height: 64, width: 64 }));
    let stored = Golden::open(fixture.path("videos/latents/000000.safetensors"));
    assert_eq!(stored.shape("latents"), [16, 2 * 8, 8]);

    let train = |output: &str, args: &[&str]| -> Vec<f64> {
        let output_arg = fixture.arg(output);
        let common =
            ["--output-path", &output_arg, "--batch-size", "2", "--max-steps", "3", "--log-steps", "1"];
        fixture.run("train", &[&common[..], args].concat());
        losses(&fixture.path(output).join("loss.csv"))
    };
    let distil = train("student", &[&["--dataset-base-path", &videos], &DISTIL[..], &LORA].concat());
    assert!(distil[2] < distil[0], "{distil:?}");

    // Without what is stored beside them the videos are read and encoded, whole or in part; in two halves the same.
    let plain = fixture.path("plain");
    fs::create_dir_all(plain.join("videos")).unwrap();
    for name in ["videos/000000.webp", "videos/000001.webp"] {
        fs::copy(fixture.path("videos").join(name), plain.join(name)).unwrap();
    }
    fs::write(
        plain.join("metadata.csv"),
        "video,prompt\nvideos/000000.webp,a cat\nvideos/000001.webp,a house\n",
    )
    .unwrap();
    let sft = ["--task", "sft", "--guidance-dropout", "0", "--dataset-base-path", &fixture.arg("plain")]
        .map(str::to_owned);
    let sft: Vec<&str> = sft.iter().map(String::as_str).collect();
    let whole = train("sft", &[&sft[..], &LORA].concat());
    assert!(whole.iter().all(|loss| loss.is_finite()), "{whole:?}");
    let (cache, data) = (fixture.arg("cache"), fixture.arg("plain"));
    let process = ["--task", "sft:data_process", "--dataset-base-path", &data, "--output-path", &cache];
    fixture.run("train", &process);
    let half = ["--task", "sft:train", "--guidance-dropout", "0", "--dataset-base-path", &cache];
    assert_eq!(train("split", &[&half[..], &LORA].concat()), whole);
    let pictures = train("first_frames", &[&sft[..], &LORA, &["--num-frames", "1"]].concat());
    assert_ne!(pictures, whole);

    let (adapter, metadata) = (fixture.arg("student/lora.safetensors"), fixture.arg("videos/metadata.csv"));
    let (student, report) = (format!("LoRA={adapter}"), fixture.arg("report"));
    let judge = judge();
    let args =
        ["--student", &student, "--dataset-metadata-path", &metadata, "--output", &report, "--judge", &judge];
    let teacher = ["--teacher-num-inference-steps", "6", "--teacher-cfg-scale", "3"];
    fixture.run("evaluate", &[&args[..], &teacher, &few, &SIZE].concat());
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture.path("report/report.json")).unwrap()).unwrap();
    let errors: Vec<f64> =
        json["rows"].as_array().unwrap().iter().filter_map(|row| row["latent_mse"].as_f64()).collect();
    assert!(errors.len() == 3 && errors.iter().all(|error| *error > 0.0), "{json}");

    // A student tells how many frames it was trained on.
    let drawn = fixture.arg("drawn");
    let args = ["--prompt", "a cat", "--lora", &adapter, "--output", &drawn];
    let said =
        fixture.run("generate", &[&args[..], &["--num-frames", "9", "--solver", "unipc"], &SIZE].concat());
    assert!(said.contains("64x64 px, 9 frames instead of 64x64 px, 5 frames"), "{said}");
    assert!(said.contains("solver unipc instead of euler"), "{said}");
}

#[test]
fn frames_that_a_model_does_not_draw_are_an_error_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out").to_string_lossy().into_owned();
    for (family, frames, expected) in [
        ("wan", "6", "num_frames is 6, expected 4n + 1"),
        ("flux", "5", "num_frames is 5, expected 1: the model draws pictures, no videos"),
    ] {
        let model = golden(&format!("{family}/model")).to_string_lossy().into_owned();
        let args =
            ["generate", "--model", &model, "--output", &output, "--prompt", "x", "--num-frames", frames];
        let said = fails(&[&args[..], &SIZE].concat(), 1);
        assert!(said.contains(expected) && said.contains("hint: "), "{said}");
        assert!(!Path::new(&output).exists());
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

#[test]
fn a_scale_for_a_denoiser_that_is_told_none_is_an_error_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out").to_string_lossy().into_owned();
    let model = golden("sd15/model").to_string_lossy().into_owned();
    let args = ["generate", "--model", &model, "--output", &output, "--prompt", "x"];
    for flag in ["--embedded-guidance", "--student-embedded-guidance"] {
        let said = fails(&[&args[..], &[flag, "3.5"], &SIZE].concat(), 1);
        let expected = "embedded_guidance is 3.5, expected none: StableDiffusionPipeline has no input for it";
        assert!(said.contains(expected) && said.contains("hint: "), "{said}");
        assert!(!Path::new(&output).exists());
    }
}
