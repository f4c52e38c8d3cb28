//! Wrong recipes, data and folders: each is named with where, found, expected and a way out.

use std::fs;

use clap::{Args, Command, FromArgMatches};
use fewstep_data::provenance::Provenance;

use super::fixtures::{Bench, SIDE_PX, fail, train};
use crate::recipe::{Recipe, Task};

#[track_caller]
fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

fn sft(bench: &Bench) -> Recipe {
    Recipe { task: Task::Sft, max_steps: Some(1), ..bench.recipe() }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, "batch_size = 7\nseed = 3\ntrainable_models = \"a, b\"\n").unwrap();
    let command = Recipe::augment_args(Command::new("train"));
    let matches = command.get_matches_from(["train", "--seed", "9", "--max-steps", "2"]);
    let flags = Recipe::from_arg_matches(&matches).unwrap();
    let recipe = flags.resolve(&matches, Some(&path)).unwrap();
    let expected = Recipe {
        batch_size: 7,
        seed: 9,
        max_steps: Some(2),
        trainable_models: vec!["a".into(), "b".into()],
        ..Recipe::default()
    };
    assert_eq!(recipe, expected);
    assert_eq!(toml::from_str::<Recipe>(&recipe.to_toml()).unwrap(), recipe);
}

#[test]
fn an_unknown_recipe_key_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, "seed = 3\nlearning_rat = 1e-4\n").unwrap();
    let error = Recipe::read(&path).unwrap_err().to_string();
    assert_says(&error, &["run.toml", "line 2", "learning_rat", "hint:"]);
}

#[test]
fn values_out_of_range_are_named() {
    let bench = Bench::new().with_pictures();
    assert_says(&fail(&Recipe { batch_size: 0, ..sft(&bench) }), &["batch_size is 0", "1 or more"]);
    assert_says(
        &fail(&Recipe { guidance_dropout: 1.5, ..sft(&bench) }),
        &["guidance_dropout is 1.5", "from 0 to 1"],
    );
    assert_says(&fail(&Recipe { learning_rate: f64::NAN, ..sft(&bench) }), &["learning_rate is NaN"]);
    assert_says(&fail(&Recipe { width: None, ..sft(&bench) }), &["height is given without width"]);
}

#[test]
fn a_component_that_cannot_be_trained_is_named() {
    let bench = Bench::new().with_pictures();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let error = fail(&Recipe { trainable_models: names(&["transfomer"]), ..sft(&bench) });
    assert_says(&error, &["trainable_models", "transfomer", "text_encoder, transformer"]);
    let error = fail(&Recipe {
        trainable_models: names(&["text_encoder"]),
        task: Task::DirectDistill,
        ..sft(&bench)
    });
    assert_says(&error, &["text_encoder", "expected one of transformer"]);
}

#[test]
fn a_folder_that_holds_another_run_is_refused_with_both_values() {
    let bench = Bench::new().with_pictures();
    train(&sft(&bench));
    let error = fail(&Recipe { learning_rate: 5e-4, ..sft(&bench) });
    assert_says(&error, &["holds another run", "learning_rate is 0.001 there, 0.0005 here", "hint:"]);
    // How long it runs is no part of which run it is.
    train(&Recipe { max_steps: Some(2), save_steps: 1, ..sft(&bench) });
}

#[test]
fn a_folder_with_foreign_files_is_refused() {
    let bench = Bench::new().with_pictures();
    fs::create_dir(bench.path("run")).unwrap();
    fs::write(bench.path("run/thesis.tex"), "x").unwrap();
    assert_says(&fail(&sft(&bench)), &["without a run.toml", "hint:"]);
    assert_eq!(fs::read_dir(bench.path("run")).unwrap().count(), 1);
}

#[test]
fn a_missing_column_is_named_and_no_run_folder_stays() {
    let bench = Bench::new().with_pictures();
    let error = fail(&Recipe { task: Task::DirectDistill, ..sft(&bench) });
    assert_says(&error, &["metadata.csv, row 1", "`seed` is missing", "hint:"]);
    assert!(!bench.path("run").exists());
}

#[test]
fn a_missing_picture_and_missing_metadata_are_named() {
    let bench = Bench::new().with_pictures();
    fs::remove_file(bench.path("data/3.png")).unwrap();
    assert_says(&fail(&sft(&bench)), &["metadata.csv, row 4", "3.png"]);
    fs::remove_file(bench.path("data/metadata.csv")).unwrap();
    let error = fail(&Recipe { task: Task::DirectDistill, ..sft(&bench) });
    assert_says(&error, &["found no metadata.csv", "`generate`"]);
}

#[test]
fn a_teacher_picture_of_another_size_is_refused() {
    let bench = Bench::new().with_teacher_data();
    let error = fail(&Recipe { height: Some(2 * SIDE_PX), width: Some(2 * SIDE_PX), ..bench.recipe() });
    assert_says(&error, &["row 1", "16x16", "32x32", "hint:"]);
}

#[test]
fn noise_of_another_device_is_refused() {
    let bench = Bench::new().with_teacher_data();
    let path = bench.path("data/metadata.csv");
    fs::write(&path, fs::read_to_string(&path).unwrap().replacen(",cpu,", ",cuda,", 1)).unwrap();
    assert_says(&fail(&bench.recipe()), &["row 1", "found cuda, expected cpu"]);
}

#[test]
fn stored_latents_of_another_model_are_refused() {
    let bench = Bench::new().with_teacher_data();
    let latents = ("latents".to_owned(), vec![16, 4, 4], vec![0.0; 256]);
    let path = bench.path("data/latents/2.safetensors");
    fewstep_models::save_tensors(&path, [latents], fewstep_models::WeightType::F32, &Default::default())
        .unwrap();
    assert_says(&fail(&bench.recipe()), &["2.safetensors", "[16, 4, 4]", "[48, 4, 4]", "hint:"]);
}

fn provenance(bench: &Bench) -> Provenance {
    let grid = |steps| bench.model().sigma_grid(steps, SIDE_PX, SIDE_PX).unwrap().as_slice().to_vec();
    Provenance {
        teacher: "model".into(),
        teacher_hash: fewstep_models::weights_hash(&(&bench.path("model")).into()).unwrap(),
        lora: None,
        num_inference_steps: 8,
        cfg_scale: 2.0,
        negative_prompt: String::new(),
        solver: "euler".into(),
        sigmas: grid(8),
        student_num_inference_steps: 3,
        student_cfg_scale: 1.0,
        student_sigmas: grid(3),
        noise_generator: "torch-cpu".into(),
        dtype: "f32".into(),
        height: SIDE_PX,
        width: SIDE_PX,
        batch_size: 6,
        requests_hash: String::new(),
    }
}

#[test]
fn data_of_another_grid_or_teacher_is_refused_and_of_this_one_taken() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { max_steps: Some(1), ..bench.recipe() };
    let mut found = provenance(&bench);
    found.student_sigmas[1] += 0.01;
    found.write(&bench.path("data")).unwrap();
    assert_says(
        &fail(&recipe),
        &["provenance.json", "sigma grid", "in the data set", "in this run", "hint:"],
    );

    let foreign = Provenance { teacher_hash: "abc".into(), ..provenance(&bench) };
    foreign.write(&bench.path("data")).unwrap();
    assert_says(&fail(&recipe), &["the teacher's hash is abc in the data set", "hint:"]);

    let foreign = Provenance { noise_generator: "torch-cuda".into(), ..provenance(&bench) };
    foreign.write(&bench.path("data")).unwrap();
    assert_says(&fail(&recipe), &["noise generator is torch-cuda"]);

    provenance(&bench).write(&bench.path("data")).unwrap();
    train(&recipe);
}
