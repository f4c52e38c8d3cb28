//! The program from outside: the way of a user's data, and what wrong input is told.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_testkit::{folder_files, write_tiny_configs};
use program::{fails, judge, run, strs};
use tempfile::TempDir;

/// A folder with a small teacher, `teacher/`, trained for a few steps on two pictures, `pictures/`.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { folder: tempfile::tempdir().unwrap() };
        write_tiny_configs(&fixture.path("configs"));
        fixture.write_pictures();
        let (model, data, output) = (fixture.arg("configs"), fixture.arg("pictures"), fixture.arg("run"));
        run(&[
            "train",
            "--task",
            "sft",
            "--initial-weights",
            "random",
            "--model",
            &model,
            "--dataset_base_path",
            &data,
            "--output_path",
            &output,
            "--trainable-models",
            "text_encoder,transformer",
            "--batch-size",
            "2",
            "--max-steps",
            "4",
            "--learning-rate",
            "0.02",
            "--warmup-steps",
            "0",
        ]);
        fs::rename(fixture.path("run/model"), fixture.path("teacher")).unwrap();
        fixture
    }

    fn write_pictures(&self) {
        let folder = self.path("pictures");
        fs::create_dir_all(&folder).unwrap();
        for (name, level) in [("dark.png", 40u8), ("light.png", 200)] {
            image::RgbImage::from_pixel(16, 16, image::Rgb([level; 3])).save(folder.join(name)).unwrap();
        }
        fs::write(
            folder.join("metadata.csv"),
            "image,prompt\ndark.png,a dark square\nlight.png,a light square\n",
        )
        .unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// Draws six teacher pictures in three batches into `output`.
    fn generate(&self, output: &str) -> Vec<String> {
        let list =
            ["generate", "--model", &self.arg("teacher"), "--output", &self.arg(output)].map(String::from);
        let prompts = ["--prompt", "a dark square", "--prompt", "a light square", "--images-per-prompt", "3"];
        let settings = ["--width", "16", "--num_inference_steps", "3", "--batch-size", "2", "--height", "16"];
        list.into_iter().chain(prompts.map(String::from)).chain(settings.map(String::from)).collect()
    }

    fn distil(&self, data: &str, output: &str) -> Vec<String> {
        [
            "train",
            "--task",
            "direct_distill",
            "--model",
            &self.arg("teacher"),
            "--dataset_base_path",
            &self.arg(data),
            "--output_path",
            &self.arg(output),
            "--lora_base_model",
            "transformer",
            "--lora-rank",
            "4",
            "--batch-size",
            "2",
            "--max-steps",
            "3",
            "--learning-rate",
            "0.01",
        ]
        .map(String::from)
        .to_vec()
    }
}

#[test]
fn pictures_become_a_student_and_a_report() {
    let fixture = Fixture::new();
    run(&strs(&fixture.generate("data")));
    let metadata = fs::read_to_string(fixture.path("data/metadata.csv")).unwrap();
    let mut lines = metadata.lines();
    assert_eq!(lines.next(), Some("image,prompt,seed,rand_device,num_inference_steps,cfg_scale"));
    assert_eq!(lines.next(), Some("images/000000.png,a dark square,0,cpu,4,1.0"));
    assert_eq!(lines.count(), 5);

    let said = run(&strs(&fixture.distil("data", "student")));
    let last = said.lines().find(|line| line.starts_with("step 3/3")).unwrap_or_else(|| panic!("{said}"));
    assert!(last.contains("/s, ") && last.contains(" left ") && last.contains("loss 0."), "{said}");
    if cfg!(target_os = "linux") {
        assert!(last.ends_with("B memory") && said.contains("peak memory: "), "{said}");
    }
    let lora = fixture.arg("student/lora.safetensors");
    let student = format!("student={lora}");
    let report = fixture.arg("report");
    let (teacher, pictures) = (fixture.arg("teacher"), fixture.arg("pictures/metadata.csv"));
    let judge = judge();
    let evaluate = |flags: &[&str]| {
        let data = ["evaluate", "--model", &teacher, "--dataset-metadata-path", &pictures, "--judge", &judge];
        let usual = ["--height", "16", "--width", "16", "--teacher-num-inference-steps", "5"];
        run(&[&data[..], &usual, &["--student", &student, "--output", &report], flags].concat());
        let json = fs::read(fixture.path("report/report.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let rows = json["rows"].as_array().unwrap().clone();
        for row in &rows[1..] {
            assert!(row["latent_mse"].as_f64().is_some_and(|error| error > 0.0), "{row}");
        }
        let setting = |row: &serde_json::Value| {
            (row["name"].as_str().unwrap().to_owned(), row["num_inference_steps"].as_u64().unwrap())
        };
        rows.iter().map(setting).collect::<Vec<_>>()
    };
    let shown = |students: &[u64]| {
        let fixed = [("teacher", 5), ("undistilled", 4), ("undistilled", 4)];
        let students = students.iter().map(|steps| ("student", *steps));
        fixed.into_iter().chain(students).map(|(name, steps)| (name.to_owned(), steps)).collect::<Vec<_>>()
    };
    // The student is shown at the steps it was trained for unless flags name others, and the undistilled model at the same.
    assert_eq!(evaluate(&["--student-num-inference-steps", "1,4"]), shown(&[1, 4]));
    assert_eq!(evaluate(&[]), shown(&[4]));
    assert!(fs::read_to_string(fixture.path("report/report.html")).unwrap().contains("a dark square"));

    let drawn = |lora: &str, output: &str| {
        let (model, output_arg) = (fixture.arg("teacher"), fixture.arg(output));
        let sizes = ["--height", "16", "--width", "16", "--num-inference-steps", "2", "--cfg-scale", "1"];
        let args = ["generate", "--model", &model, "--output", &output_arg, "--prompt", "x", "--lora", lora];
        run(&[&args[..], &sizes[..]].concat());
        fs::read(fixture.path(output).join("latents/000000.safetensors")).unwrap()
    };
    let (whole, none) = (drawn(&lora, "whole"), drawn(&format!("{lora}:0"), "none"));
    assert_ne!(whole, none, "the student's alpha has an effect");
}

#[test]
fn an_interrupted_generation_continues_to_the_same_files() {
    let fixture = Fixture::new();
    let args = fixture.generate("data");
    run(&strs(&args));
    let complete = folder_files(&fixture.path("data"));
    assert_eq!(complete.len(), 2 * 6 + 2, "a picture and its latents per request, metadata and provenance");
    // As a kill in the second batch leaves it: one picture of the batch is there, the other is not.
    for lost in [
        "metadata.csv",
        "images/000003.png",
        "images/000004.png",
        "images/000005.png",
        "latents/000005.safetensors",
    ] {
        fs::remove_file(fixture.path("data").join(lost)).unwrap();
    }
    run(&strs(&args));
    assert_eq!(folder_files(&fixture.path("data")), complete);
}

#[test]
fn a_folder_with_another_generation_is_left_alone() {
    let fixture = Fixture::new();
    let mut args = fixture.generate("data");
    run(&strs(&args));
    let before = folder_files(&fixture.path("data"));
    args.extend(["--cfg-scale".into(), "2".into()]);
    let said = fails(&strs(&args), 1);
    assert!(said.contains("cfg_scale is 4.0 there, 2.0 here") && said.contains("hint:"), "{said}");
    assert_eq!(folder_files(&fixture.path("data")), before);
}

#[test]
fn wrong_usage_exits_with_2_and_names_the_flag() {
    let said = fails(&["generate", "--model", "m", "--output", "o", "--heigth", "64"], 2);
    assert!(said.contains("--heigth") && said.contains("--height"), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("run.toml");
    fs::write(&recipe, "learning_rat = 1e-4\n").unwrap();
    let said = fails(&["train", "--config", &recipe.to_string_lossy()], 2);
    assert!(said.contains("learning_rat"), "{said}");
}

#[test]
fn damaged_data_and_weights_are_named() {
    let fixture = Fixture::new();
    run(&strs(&fixture.generate("data")));
    let metadata = fixture.path("data/metadata.csv");
    let intact = fs::read_to_string(&metadata).unwrap();
    fs::write(&metadata, intact.replace("square,1,cpu", "square,one,cpu")).unwrap();
    let said = fails(&strs(&fixture.distil("data", "student")), 1);
    assert!(said.contains("metadata.csv") && said.contains("row 2") && said.contains("seed"), "{said}");
    fs::write(&metadata, &intact).unwrap();

    let mut odd = fixture.generate("odd");
    *odd.last_mut().unwrap() = "20".into();
    let said = fails(&strs(&odd), 1);
    assert!(said.contains("height 20 px is not divisible by 8"), "{said}");
    assert!(!fixture.path("odd").exists());

    let weights = fixture.path("teacher/transformer/diffusion_pytorch_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let said = fails(&strs(&fixture.generate("other")), 1);
    assert!(said.contains("diffusion_pytorch_model.safetensors") && said.contains("hint:"), "{said}");
    assert!(!fixture.path("other/metadata.csv").exists());
}

#[test]
fn every_recipe_is_read_and_names_things_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut read = 0;
    for entry in fs::read_dir(root.join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        let recipe = fewstep_train::Recipe::read(&path).unwrap_or_else(|error| panic!("{error}"));
        recipe.validate().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // What is under runs/ is made by the commands at the top of the recipe.
        let model = root.join(&recipe.model).join("model_index.json");
        assert!(recipe.model.starts_with("runs") || model.exists(), "{}", path.display());
        read += 1;
    }
    assert_eq!(read, 6);
}
