//! `train --dry-run` from outside: what it tells, what it finds wrong, and that it leaves nothing behind.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use burn::tensor::Device;
use fewstep_models::{Model, ModelSource, WeightType};
use fewstep_testkit::{folder_files, write_tiny_configs};
use program::{run, strs};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with a small model, `model/`, and pictures of two sizes, `data/`.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let fixture = Self { folder: tempfile::tempdir().unwrap() };
        write_tiny_configs(&fixture.path("configs"));
        let source = ModelSource::from(&fixture.path("configs"));
        let model = Model::random(&source, 1, &Device::flex()).unwrap();
        model.save_pretrained(&source, &fixture.path("model"), WeightType::F32, &Default::default()).unwrap();
        let mut metadata = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale\n".to_owned();
        for row in 0..7 {
            let side = if row < 4 { 16 } else { 32 };
            fixture.write_picture(&format!("{row}.png"), side);
            metadata += &format!("{row}.png,picture {row},{row},cpu,2,1\n");
        }
        fixture.write("data/metadata.csv", &metadata);
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn write_picture(&self, name: &str, side: u32) {
        fs::create_dir_all(self.path("data")).unwrap();
        let picture = image::RgbImage::from_pixel(side, side, image::Rgb([90; 3]));
        picture.save(self.path("data").join(name)).unwrap();
    }

    /// `train` on the fixture's model and data with adapters; `flags` win.
    fn train(&self, flags: &[&str]) -> Vec<String> {
        let at = |name: &str| self.path(name).to_string_lossy().into_owned();
        let usual = [
            ["--model", &at("model")],
            ["--dataset_base_path", &at("data")],
            ["--output_path", &at("run")],
            ["--batch_size", "2"],
            ["--lora_base_model", "transformer"],
            ["--lora_rank", "4"],
        ];
        let usual = usual.iter().filter(|[name, _]| !flags.contains(name)).flatten();
        ["train"].iter().chain(usual).chain(flags).map(|flag| (*flag).to_owned()).collect()
    }

    /// Runs dry and checks that nothing was written.
    fn dry(&self, flags: &[&str]) -> Output {
        let before = folder_files(self.folder.path());
        let output = Command::new(env!("CARGO_BIN_EXE_fewstep"))
            .args(self.train(&[flags, &["--dry_run"]].concat()))
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        assert!(folder_files(self.folder.path()) == before, "the dry run wrote something");
        output
    }

    /// What a dry run tells as JSON, and whether it would start.
    fn told(&self, flags: &[&str]) -> (Value, bool) {
        let output = self.dry(&[flags, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let told = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {text}"));
        (told, output.status.success())
    }

    /// The problems of a dry run that ends with exit code 1.
    fn problems(&self, flags: &[&str]) -> Vec<String> {
        let (told, starts) = self.told(flags);
        assert!(!starts && told["starts"] == false, "{told}");
        told["problems"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    }
}

#[track_caller]
fn assert_named(problems: &[String], parts: &[&str]) {
    let found = problems.iter().any(|problem| parts.iter().all(|part| problem.contains(part)));
    assert!(found, "{parts:?} in {problems:#?}");
}

#[test]
fn a_dry_run_tells_what_the_run_then_does() {
    let fixture = Fixture::new();
    let flags = ["--num_epochs", "3", "--save_steps", "2", "--warmup_steps", "2", "--learning_rate", "0.5"];
    let (told, starts) = fixture.told(&flags);
    assert!(starts && told["starts"] == true && told["problems"] == serde_json::json!([]), "{told}");
    let counts = |name: &str| told["data"][name].as_u64().unwrap();
    assert_eq!((counts("rows"), counts("pictures"), counts("prompts")), (7, 7, 8));
    let batches = told["data"]["batches"].as_array().unwrap();
    let bucket = |at: usize, name: &str| batches[at][name].as_u64().unwrap();
    assert_eq!(batches.len(), 2);
    assert_eq!((bucket(0, "width"), bucket(0, "rows"), bucket(0, "batches")), (16, 4, 2));
    assert_eq!((bucket(1, "width"), bucket(1, "rows"), bucket(1, "batches")), (32, 3, 2));
    let course = &told["course"];
    assert_eq!((course["steps_per_epoch"].as_u64(), course["total_steps"].as_u64()), (Some(4), Some(12)));
    assert_eq!(course["learning_rates"][0], serde_json::json!([1, 0.25]));
    assert_eq!(course["learning_rates"][1], serde_json::json!([2, 0.5]));
    assert!(told["time"]["secs"].as_f64().is_some_and(|secs| secs > 0.0), "{told}");

    let said = run(&strs(&fixture.train(&flags)));
    let trained = told["model"]["trained_parameters"].as_u64().unwrap();
    let parameters: u64 =
        told["model"]["parameters"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    let expected = format!("training {trained} of {} parameters on 7 rows", parameters + trained);
    assert!(said.contains(&expected), "{expected}: {said}");
    for file in told["files"].as_array().unwrap() {
        let path = PathBuf::from(file["path"].as_str().unwrap());
        assert!(path.exists(), "{} was announced", path.display());
        let found: u64 = match path.is_dir() {
            true => folder_files(&path).values().map(|bytes| bytes.len() as u64).sum(),
            false => fs::metadata(&path).unwrap().len(),
        };
        let each = file["bytes"].as_u64().unwrap() / file["count"].as_u64().unwrap();
        // Headers, which are not counted, are large beside these tensors.
        assert!(
            each <= 2 * found + 4096 && found <= 2 * each + 65_536,
            "{}: {each}, {found}",
            path.display()
        );
    }
}

#[test]
fn a_run_that_would_be_continued_says_where() {
    let fixture = Fixture::new();
    run(&strs(&fixture.train(&["--max_steps", "3", "--save_steps", "2"])));
    let (told, starts) = fixture.told(&["--max_steps", "5", "--save_steps", "2"]);
    assert!(starts && told["course"]["first_step"] == 3, "{told}");
    let text = String::from_utf8(fixture.dry(&["--max_steps", "5", "--save_steps", "2"]).stdout).unwrap();
    assert!(text.contains("2 of 5 steps") && text.contains("continued after step 3"), "{text}");
    let problems = fixture.problems(&["--max_steps", "5", "--learning_rate", "0.5"]);
    assert_named(&problems, &["holds another run", "learning_rate is 0.0001 there, 0.5 here"]);
}

#[test]
fn every_wrong_row_is_named_by_its_own_reason() {
    let fixture = Fixture::new();
    fixture.write("data/text.png", "no picture");
    fixture.write(
        "data/metadata.csv",
        "image,prompt,seed,rand_device,num_inference_steps,cfg_scale\n\
         0.png,right,1,cpu,2,1\n\
         none.png,missing,2,cpu,2,1\n\
         1.png,word,three,cpu,2,1\n\
         text.png,text,4,cpu,2,1\n\
         2.png,short,5\n\
         ../3.png,outside,6,cpu,2,1\n\
         3.png,no steps,7,cpu,0,1\n",
    );
    let problems = fixture.problems(&[]);
    assert_eq!(problems.len(), 6, "{problems:#?}");
    for parts in [
        ["row 2", "none.png"],
        ["row 3", "three"],
        ["text.png", "no readable picture"],
        ["row 5", "3 values, expected 6"],
        ["row 6", "../3.png"],
        ["row 7", "num_inference_steps"],
    ] {
        assert_named(&problems, &parts);
    }
    let (told, _) = fixture.told(&[]);
    assert_eq!((told["data"]["rows"].as_u64(), told["data"]["wrong_rows"].as_u64()), (Some(1), Some(6)));
    let output = fixture.dry(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("the run would not start: 6 problems"), "{said}");
}

#[test]
fn many_wrong_rows_are_counted() {
    let fixture = Fixture::new();
    let rows: String = (0..57).map(|row| format!("none{row}.png,x,1,cpu,2,1\n")).collect();
    fixture.write(
        "data/metadata.csv",
        &format!("image,prompt,seed,rand_device,num_inference_steps,cfg_scale\n0.png,x,1,cpu,2,1\n{rows}"),
    );
    let said = String::from_utf8_lossy(&fixture.dry(&[]).stderr).into_owned();
    assert_eq!(said.matches("found no file").count(), 20, "{said}");
    assert!(said.contains("and 37 more of 57 problems"), "{said}");
}

#[test]
fn problems_of_model_data_and_folder_are_told_together() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("run")).unwrap();
    fixture.write("run/notes.txt", "mine");
    fixture.write("data/provenance.json", "{}");
    let config = fixture.path("model/transformer/config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"num_layers\":2"), "{text}");
    fs::write(&config, text.replace("\"num_layers\":2", "\"num_layers\":3")).unwrap();
    let problems =
        fixture.problems(&["--lora_target_modules", "to_q,to_nowhere", "--height", "16", "--width", "16"]);
    assert_named(&problems, &["without a run.toml"]);
    assert_named(&problems, &["transformer", "missing (transformer_blocks.2."]);
    assert_named(&problems, &["provenance.json", "no valid provenance"]);
    assert_named(&problems, &["to_nowhere", "no layer matches"]);
    assert_named(&problems, &["row 5", "32x32 px", "16x16 px"]);
    assert_eq!(problems.len(), 4 + 3, "{problems:#?}");
}

#[test]
fn weights_to_start_from_are_checked_by_their_headers() {
    let fixture = Fixture::new();
    run(&strs(&fixture.train(&["--max_steps", "1"])));
    let lora = fixture.path("run/lora.safetensors").to_string_lossy().into_owned();
    let other = fixture.path("other").to_string_lossy().into_owned();
    let given = ["--lora_checkpoint", &lora, "--output_path", &other];
    assert!(fixture.told(&given).1);
    let full = ["--output_path", &other, "--resume_from_checkpoint", &lora];
    let train = Command::new(env!("CARGO_BIN_EXE_fewstep"))
        .args(["train", "--dry_run", "--json", "--model", &fixture.path("model").to_string_lossy()])
        .arg("--dataset_base_path")
        .arg(fixture.path("data"))
        .args(full)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&train.stdout).into_owned();
    assert!(text.contains("tensors belong to nothing that is trained here"), "{text}");
}

#[test]
fn a_split_task_holds_only_what_its_half_needs() {
    let fixture = Fixture::new();
    let first = ["--task", "direct_distill:data_process"];
    let (told, starts) = fixture.told(&first);
    assert!(starts && told["course"].is_null(), "{told}");
    let names = |told: &Value| -> Vec<String> {
        told["model"]["parameters"].as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(names(&told), ["text_encoder"]);
    assert!(told["files"].to_string().contains("latents.safetensors"), "{told}");

    let processed = fixture.path("processed").to_string_lossy().into_owned();
    run(&strs(&fixture.train(&[&first[..], &["--output_path", &processed]].concat())));
    let second = ["--task", "direct_distill:train", "--dataset_base_path", &processed];
    let (told, starts) = fixture.told(&second);
    assert!(starts && names(&told) == ["transformer"], "{told}");
    assert_eq!((told["data"]["rows"].as_u64(), told["data"]["prompts"].as_u64()), (Some(7), Some(8)));
    let (whole, _) = fixture.told(&[]);
    let held = |told: &Value| told["memory"]["phases"][0]["parts"].to_string();
    assert!(held(&whole).contains("text_encoder") && !held(&told).contains("text_encoder"), "{told}");
    let problems = fixture.problems(&["--task", "direct_distill:train"]);
    assert_named(&problems, &["processed.json", "not found"]);
}

#[test]
fn a_run_too_large_for_the_machine_says_what_would_fit() {
    let fixture = Fixture::new();
    // Twenty billion parameters, none of them there.
    for (part, name, value) in
        [("transformer", "num_layers", 60), ("transformer", "num_attention_heads", 192)]
    {
        let path = fixture.path("model").join(part).join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[name] = value.into();
        fs::write(&path, config.to_string()).unwrap();
    }
    let (told, starts) = fixture.told(&[]);
    assert!(!starts, "the weights are not those of the config");
    let bytes = |name: &str| told[name].as_u64().unwrap();
    assert!(bytes("needed_bytes") > 60_000_000_000, "{}", bytes("needed_bytes"));
    let alternatives = told["alternatives"].as_array().unwrap();
    let needed = |at: &Value| at["needed_bytes"].as_u64().unwrap();
    assert!(alternatives.iter().all(|other| needed(other) <= bytes("needed_bytes")), "{alternatives:?}");
    // Where several student steps are recorded, one would take less; it is no choice where there is one already.
    let step = |told: &Value| -> u64 {
        let parts = told["memory"]["phases"][1]["parts"].as_array().unwrap();
        parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum()
    };
    let checkpointing = ["--use_gradient_checkpointing", "--recorded_steps", "1"];
    let [(four, _), (one, _)] = [&checkpointing[..1], &checkpointing].map(|flags| fixture.told(flags));
    assert!(step(&one) < step(&four), "{one}");
    let of_one = "--recorded-steps 1";
    assert!(four["alternatives"].to_string().contains(of_one), "{four}");
    assert!(!one["alternatives"].to_string().contains(of_one) && !told.to_string().contains(of_one), "{one}");
    if bytes("free_memory_bytes") < bytes("needed_bytes") {
        let said = String::from_utf8_lossy(&fixture.dry(&[]).stderr).into_owned();
        assert!(said.contains("warning: the run needs") && said.contains("hint: "), "{said}");
    }
}

#[test]
fn wrong_usage_stays_wrong_usage() {
    let fixture = Fixture::new();
    assert_eq!(fixture.dry(&["--lora_rank", "0"]).status.code(), Some(2));
    let output = Command::new(env!("CARGO_BIN_EXE_fewstep")).args(["train", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
