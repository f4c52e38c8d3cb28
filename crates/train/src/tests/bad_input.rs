//! Wrong recipes, data and folders: each is named with where, found, expected and a way out.

use std::fs;

use clap::{Args, Command, FromArgMatches};
use fewstep_data::image::Resize;
use fewstep_data::provenance::Provenance;
use fewstep_testkit::golden;

use super::fixtures::{Bench, SIDE_PX, fail, train};
use crate::recipe::{Compat, OptimizerName, PeerFlags, Recipe, Schedule, Task};

#[track_caller]
pub(super) fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

pub(super) fn sft(bench: &Bench) -> Recipe {
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
fn a_peers_choices_lie_under_the_file_and_the_flags() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, "compat = \"diffsynth\"\nmax_grad_norm = 0.5\n").unwrap();
    let command = Recipe::augment_args(Command::new("train"));
    let matches = command.get_matches_from(["train", "--lr-schedule", "cosine"]);
    let flags = Recipe::from_arg_matches(&matches).unwrap();
    let recipe = flags.resolve(&matches, Some(&path)).unwrap();
    let expected =
        Recipe { max_grad_norm: 0.5, lr_schedule: Schedule::Cosine, ..Recipe::compatible(Compat::Diffsynth) };
    assert_eq!(recipe, expected);
    assert_ne!(recipe.training_grid, Recipe::default().training_grid);
    // A run's own record gives the same run again.
    fs::write(&path, recipe.to_toml()).unwrap();
    assert_eq!(Recipe::read(&path).unwrap(), recipe);
}

#[test]
fn prodigys_learning_rate_is_one_unless_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        Recipe::read(&path).unwrap()
    };
    assert_eq!(read("optimizer = \"prodigy\"").learning_rate, 1.0);
    let slow = read("optimizer = \"prodigy\"\nlearning_rate = 1e-4");
    assert_eq!(slow.learning_rate, 1e-4);
    assert_says(slow.notes()[0], &["prodigy finds", "1 is usual"]);
    assert_eq!(read("optimizer = \"muon\"").learning_rate, Recipe::default().learning_rate);
}

#[test]
fn the_peers_arguments_are_taken_with_their_meaning() {
    let command = Recipe::augment_args(PeerFlags::augment_args(Command::new("train")));
    let arguments = [
        "train --task direct_distill:train --data-file-keys image --extra-inputs seed,cfg_scale",
        "--dataset-num-workers 8 --find-unused-parameters --use-gradient-checkpointing --shuffle false",
        "--lora-base-model dit --save-steps 7 --dtype bfloat16 --initialize-model-on-cpu",
        "--customized-optimizer bitsandbytes.optim.AdamW8bit",
    ];
    let matches = command.get_matches_from(arguments.join(" ").split(' '));
    PeerFlags::from_arg_matches(&matches).unwrap().check().unwrap();
    let recipe = Recipe::from_arg_matches(&matches).unwrap();
    recipe.validate().unwrap();
    assert_eq!((recipe.task, recipe.shuffle, recipe.save_steps), (Task::DirectDistillTrain, false, Some(7)));
    assert_eq!((recipe.notes().len(), recipe.optimizer), (1, OptimizerName::Adamw8bit));
    assert!(recipe.checkpoints_gradients());
}

#[test]
fn what_does_not_exist_here_is_refused_with_a_reason() {
    let command = || PeerFlags::augment_args(Command::new("train"));
    for (flag, reason) in
        [("--zero-cond-t", "editing"), ("--quant-options=x:nf4", "f32"), ("--wandb-project=x", "sent")]
    {
        let matches = command().get_matches_from(["train", flag]);
        let error = PeerFlags::from_arg_matches(&matches).unwrap().check().unwrap_err();
        assert!(error.is_usage());
        assert_says(&error.to_string(), &["is not supported", reason, "hint:"]);
    }
    let bench = Bench::new().with_pictures();
    let names = |name: &str| vec![name.to_owned()];
    assert_says(
        &fail(&Recipe { extra_inputs: names("edit_image"), ..sft(&bench) }),
        &["extra_inputs is edit_image"],
    );
    assert_says(
        &fail(&Recipe { data_file_keys: names("audio"), ..sft(&bench) }),
        &["data_file_keys is audio"],
    );
    let half = Recipe { preset_lora_path: Some("x.safetensors".into()), ..sft(&bench) };
    assert_says(&fail(&half), &["preset_lora_path is given without preset_lora_model"]);
}

#[test]
fn lora_targets_are_names_an_expression_or_found() {
    let bench = Bench::new().with_pictures();
    let keys = |name: &str, targets: &str| {
        let recipe = Recipe {
            lora_base_model: Some("dit".into()),
            lora_target_modules: Some(targets.split(',').map(str::to_owned).collect()),
            output_path: bench.path(name),
            ..sft(&bench)
        };
        let (_, path) = train(&recipe);
        fewstep_models::WeightFiles::open(&path).unwrap().keys().count() / 2
    };
    assert_eq!(keys("names", "to_q,img_mod.1"), 4);
    assert_eq!(keys("expression", r".*\.0\.attn\.to_(q|out\.0)"), 2);
    // All fourteen projections of both blocks.
    assert_eq!(keys("found", ""), 28);
    let targets = |pattern: &str| Recipe {
        lora_base_model: Some("dit".into()),
        lora_target_modules: Some(vec![pattern.to_owned()]),
        ..sft(&bench)
    };
    assert_says(&fail(&targets("to_(q")), &["lora_target_modules", "to_(q", "no regular expression"]);
    assert_says(&fail(&targets("to_[xy]")), &["to_[xy]", "to_q"]);
}

#[test]
fn a_lora_of_another_model_and_weights_of_another_model_are_refused() {
    let bench = Bench::new().with_pictures();
    let other = golden("train_cli/lora_init.safetensors");
    let lora =
        Recipe { lora_base_model: Some("dit".into()), lora_checkpoint: Some(other.clone()), ..sft(&bench) };
    assert_says(&fail(&lora), &["lora_init.safetensors", "transformer_blocks.2."]);
    let full = Recipe { resume_from_checkpoint: Some(other), ..sft(&bench) };
    assert_says(&fail(&full), &["lora_init.safetensors", "belong to nothing", "hint:"]);
    let preset = Recipe {
        preset_lora_path: Some("x.safetensors".into()),
        preset_lora_model: Some("vae".into()),
        ..sft(&bench)
    };
    assert_says(&fail(&preset), &["preset_lora_model", "vae", "expected one of transformer"]);
}

#[test]
fn a_size_that_does_not_fit_the_model_is_refused() {
    let bench = Bench::new().with_pictures();
    let error = fail(&Recipe { height: Some(SIDE_PX + 4), width: Some(SIDE_PX), ..sft(&bench) });
    assert_says(&error, &["height", "20", "8"]);
}

#[test]
fn metadata_as_spreadsheets_write_it_is_read() {
    let bench = Bench::new().with_pictures();
    fs::rename(bench.path("data/0.png"), bench.path("data/猫 1.png")).unwrap();
    let text = "\u{feff}image,prompt\r\n猫 1.png,\"a, \"\"quoted\"\"\r\nprompt\"\r\n1.png,plain\r\n";
    fs::write(bench.path("data/metadata.csv"), text).unwrap();
    let rows =
        super::fixtures::rows(&sft(&bench), Resize::Exact { height: SIDE_PX, width: SIDE_PX }).unwrap();
    let prompts: Vec<&str> = rows.iter().map(|row| row.prompt.as_str()).collect();
    assert_eq!(prompts, ["a, \"quoted\"\r\nprompt", "plain"]);
    train(&sft(&bench));
}

#[test]
fn a_picture_outside_the_base_folder_is_refused() {
    let bench = Bench::new().with_pictures();
    fs::copy(bench.path("data/0.png"), bench.path("0.png")).unwrap();
    fs::write(bench.path("data/metadata.csv"), "image,prompt\n../0.png,x\n").unwrap();
    assert_says(&fail(&sft(&bench)), &["row 1", "../0.png", "does not leave", "hint:"]);
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
    assert_says(&fail(&Recipe { max_steps: Some(0), ..sft(&bench) }), &["max_steps is 0", "1 or more"]);
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
    train(&Recipe { max_steps: Some(2), save_steps: Some(1), ..sft(&bench) });
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
fn stored_latents_of_another_model_are_refused() {
    let bench = Bench::new().with_teacher_data();
    let latents = ("latents".to_owned(), vec![16, 4, 4], vec![0.0; 256]);
    let path = bench.path("data/latents/2.safetensors");
    fewstep_models::save_tensors(&path, [latents], fewstep_models::WeightType::F32, &Default::default())
        .unwrap();
    assert_says(&fail(&bench.recipe()), &["2.safetensors", "[16, 4, 4]", "[48, 4, 4]", "hint:"]);
}

fn provenance(bench: &Bench) -> Provenance {
    let grid = |steps| bench.model().sigma_grid(steps, [SIDE_PX; 2]).unwrap().as_slice().to_vec();
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
        ..Provenance::default()
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

    let foreign = Provenance { noise_generator: "numpy".into(), ..provenance(&bench) };
    foreign.write(&bench.path("data")).unwrap();
    assert_says(&fail(&recipe), &["noise generator is numpy"]);

    provenance(&bench).write(&bench.path("data")).unwrap();
    train(&recipe);
}
