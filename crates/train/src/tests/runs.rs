//! Whole runs: they learn, repeat to the bit, and continue to the bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::fixtures::{
    Bench, ROWS, Recorder, SIDE_PX, STUDENT_STEPS, TEACHER_CFG_SCALE, TEACHER_STEPS, run, train,
};
use crate::recipe::{RandomNumbers, Recipe, Schedule, Task};
use crate::{Outcome, TrainError};

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[track_caller]
fn assert_learns(recipe: &Recipe, factor: f64) {
    let (losses, _) = train(recipe);
    let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() - 5..]));
    assert!(last < factor * first, "the loss went from {first} to {last}");
}

fn lora(recipe: Recipe) -> Recipe {
    Recipe { lora_base_model: Some("transformer".into()), ..recipe }
}

#[test]
fn flow_matching_learns_from_random_weights_with_its_text_encoder() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe {
        task: Task::Sft,
        initial_weights: crate::recipe::InitialWeights::Random,
        trainable_models: vec!["text_encoder".into(), "transformer".into()],
        max_steps: Some(150),
        batch_size: 6,
        learning_rate: 3e-3,
        ..bench.recipe()
    };
    assert_learns(&recipe, 0.7);
}

#[test]
fn flow_matching_learns_with_adapters() {
    let bench = Bench::new().with_pictures();
    let recipe =
        Recipe { task: Task::Sft, max_steps: Some(80), batch_size: 6, learning_rate: 1e-2, ..bench.recipe() };
    // Adapters of rank 4 on a random base learn the mean at best.
    assert_learns(&lora(recipe), 0.93);
}

#[test]
fn direct_distillation_learns_in_full() {
    let bench = Bench::new().with_teacher_data();
    assert_learns(&Recipe { max_steps: Some(30), batch_size: 3, ..bench.recipe() }, 0.5);
}

#[test]
fn direct_distillation_learns_with_adapters() {
    let bench = Bench::new().with_teacher_data();
    assert_learns(
        &lora(Recipe { max_steps: Some(40), batch_size: 3, learning_rate: 3e-3, ..bench.recipe() }),
        0.5,
    );
}

/// Stored targets were drawn by the model that the online teacher is, from the same seeds.
#[test]
fn an_online_teacher_gives_the_stored_targets() {
    let bench = Bench::new().with_teacher_data();
    let offline = lora(Recipe { batch_size: 3, max_steps: Some(4), ..bench.recipe() });
    let online = Recipe {
        online_teacher: true,
        teacher_num_inference_steps: TEACHER_STEPS,
        teacher_cfg_scale: TEACHER_CFG_SCALE.into(),
        num_inference_steps: STUDENT_STEPS,
        output_path: bench.path("online"),
        ..offline.clone()
    };
    for (stored, made) in train(&offline).0.iter().zip(train(&online).0) {
        assert!((stored - made).abs() < 1e-5 * stored, "stored {stored}, made on the way {made}");
    }
}

fn file_bytes(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(file_bytes(&path));
        } else {
            files.push((path.clone(), fs::read(path).unwrap()));
        }
    }
    files.sort();
    files
}

/// Weights, optimiser state and averages of the newest checkpoint.
fn newest_checkpoint(recipe: &Recipe) -> Vec<Vec<u8>> {
    let last = fs::read_dir(recipe.output_path.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max()
        .unwrap();
    file_bytes(&last).into_iter().map(|(_, bytes)| bytes).collect()
}

/// The log without the column that tells the time.
fn log(recipe: &Recipe) -> Vec<String> {
    let csv = fs::read_to_string(recipe.output_path.join("loss.csv")).unwrap();
    csv.lines().map(|line| line.rsplit_once(',').unwrap().0.to_owned()).collect()
}

pub(super) fn resumable(bench: &Bench, task: Task) -> Recipe {
    Recipe {
        task,
        ema_decay: 0.9,
        lr_schedule: Schedule::Cosine,
        warmup_steps: 2,
        gradient_accumulation_steps: 2,
        save_steps: Some(2),
        log_steps: 2,
        max_steps: Some(7),
        ..bench.recipe()
    }
}

#[track_caller]
pub(super) fn assert_resumes_to_the_bit(whole: &Recipe, bench: &Bench) {
    train(whole);
    let parts = Recipe { output_path: bench.path("parts"), ..whole.clone() };
    for last in [1, 4] {
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { stop: Some((last, &stop)), ..Recorder::default() };
        assert_eq!(run(&parts, &mut recorder).unwrap(), Outcome::Stopped(last));
    }
    // As after a kill: what was logged past the last checkpoint is written again.
    fs::remove_dir_all(parts.output_path.join("checkpoints/step-00000004")).unwrap();
    train(&parts);
    assert!(newest_checkpoint(whole) == newest_checkpoint(&parts), "checkpoints differ");
    assert_eq!(log(whole), log(&parts));
}

#[test]
fn a_resumed_flow_matching_run_equals_an_uninterrupted_one_to_the_bit() {
    let bench = Bench::new().with_pictures();
    assert_resumes_to_the_bit(&resumable(&bench, Task::Sft), &bench);
}

#[test]
fn a_resumed_adapter_run_equals_an_uninterrupted_one_to_the_bit() {
    let bench = Bench::new().with_teacher_data();
    assert_resumes_to_the_bit(&lora(resumable(&bench, Task::DirectDistill)), &bench);
}

#[test]
fn a_resumed_run_in_the_peers_order_of_draws_equals_an_uninterrupted_one_to_the_bit() {
    let bench = Bench::new().with_pictures();
    let random_numbers = RandomNumbers::TorchGlobal;
    assert_resumes_to_the_bit(&Recipe { random_numbers, ..resumable(&bench, Task::Sft) }, &bench);
}

#[test]
fn equal_seeds_give_equal_bits_and_others_do_not() {
    let bench = Bench::new().with_pictures();
    let bits = |seed, folder: &str| {
        let recipe = Recipe {
            task: Task::Sft,
            seed,
            output_path: bench.path(folder),
            max_steps: Some(3),
            ..bench.recipe()
        };
        train(&recipe);
        newest_checkpoint(&recipe)
    };
    let first = bits(1, "a");
    assert!(first == bits(1, "b"), "equal seeds differ");
    assert!(first != bits(2, "c"), "other seeds agree");
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, save_steps: Some(2), ..bench.recipe() };
    train(&recipe);
    let checkpoints = recipe.output_path.join("checkpoints");
    let expected = newest_checkpoint(&recipe);
    let weights = checkpoints.join("step-00000006/weights.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();

    let mut recorder = Recorder::default();
    run(&recipe, &mut recorder).unwrap();
    assert!(recorder.messages[0].contains("step-00000006: weights.safetensors"), "{:?}", recorder.messages);
    assert_eq!(recorder.messages[1], "continuing after step 4");
    assert!(newest_checkpoint(&recipe) == expected);

    for step in ["step-00000004", "step-00000006"] {
        fs::write(checkpoints.join(step).join("trainer.json"), "{").unwrap();
    }
    let error = run(&recipe, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Damaged { ref reasons, .. } if reasons.len() == 2), "{error}");
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, save_steps: Some(1), keep: 2, ..bench.recipe() };
    train(&recipe);
    let names =
        fs::read_dir(recipe.output_path.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["step-00000005", "step-00000006"]);
}

#[test]
fn steps_without_a_finite_loss_are_skipped_and_end_the_run_when_they_do_not_stop() {
    let bench = Bench::new().with_teacher_data();
    let shape = vec![48, SIDE_PX / 4, SIDE_PX / 4];
    for row in 0..ROWS {
        let path = bench.path(&format!("data/latents/{row}.safetensors"));
        let latents = ("latents".to_owned(), shape.clone(), vec![f32::NAN; shape.iter().product()]);
        fewstep_models::save_tensors(&path, [latents], fewstep_models::WeightType::F32, &Default::default())
            .unwrap();
    }
    let recipe = Recipe { max_steps: Some(50), ..bench.recipe() };
    let mut recorder = Recorder::default();
    let error = run(&recipe, &mut recorder).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 20, times: 20 }), "{error}");
    assert!(recorder.messages[0].starts_with("step 1 skipped: loss NaN"), "{:?}", recorder.messages);
}

#[test]
fn the_result_tells_its_origin_and_is_the_averaged_model() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { ema_decay: 0.99, ..bench.recipe() };
    let (_, path) = train(&recipe);
    let info =
        fewstep_models::read_info(&path.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(info["fewstep.base_hash"], fewstep_models::weights_hash(&(&recipe.model).into()).unwrap());
    assert_eq!(info["fewstep.training_steps"], "6");
    assert!(info["fewstep.sigma_grids"].contains("\"num_inference_steps\":3"));
    assert_eq!(toml::from_str::<Recipe>(&info["fewstep.recipe"]).unwrap(), recipe);

    let file = |name: &str| fewstep_models::WeightFiles::open(&bench.path(name)).unwrap();
    let (result, averages) =
        (file("run/model/transformer"), file("run/checkpoints/step-00000006/ema.safetensors"));
    let (_, averaged) = averages.read("transformer.img_in.weight").unwrap();
    assert_eq!(result.read("img_in.weight").unwrap().1, averaged);
}

#[test]
fn samples_are_drawn_on_the_way() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe {
        task: Task::Sft,
        sample_steps: 3,
        sample_prompts: vec!["a, b".into(), "c".into(), "d".into()],
        sample_num_inference_steps: 2,
        ..bench.recipe()
    };
    train(&recipe);
    let sheet =
        fewstep_data::image::Picture::load(&recipe.output_path.join("samples/step-00000003.png")).unwrap();
    // Three pictures in a grid of two by two, with gaps of 2 px around each.
    assert_eq!((sheet.width, sheet.height), (2 * (SIDE_PX + 2) + 2, 2 * (SIDE_PX + 2) + 2));
}
