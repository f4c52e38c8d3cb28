//! Whole runs: they learn, repeat to the bit, and continue to the bit.

use std::fs;
use std::sync::atomic::AtomicBool;

use fewstep_kernels::with_plain_twins;

use super::fixtures::{
    Bench, Recorder, SIDE_PX, STUDENT_STEPS, TEACHER_CFG_SCALE, TEACHER_STEPS, fail, file_bytes,
    newest_checkpoint, run, train,
};
use crate::recipe::{RandomNumbers, Recipe, Schedule, Task};
use crate::run_folder::RunFolder;
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
        teacher_num_inference_steps: Some(TEACHER_STEPS),
        teacher_cfg_scale: Some(TEACHER_CFG_SCALE.into()),
        num_inference_steps: STUDENT_STEPS,
        output_path: bench.path("online"),
        ..offline.clone()
    };
    for (stored, made) in train(&offline).0.iter().zip(train(&online).0) {
        assert!((stored - made).abs() < 1e-5 * stored, "stored {stored}, made on the way {made}");
    }
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

/// On other devices, and among the plain twins, moments lie beside their parameters while a run goes on.
#[test]
fn a_run_of_plain_twins_resumes_to_the_bit() {
    let bench = Bench::new().with_teacher_data();
    with_plain_twins(|| assert_resumes_to_the_bit(&lora(resumable(&bench, Task::DirectDistill)), &bench));
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
    let recipe = Recipe { task: Task::Sft, ema_decay: 0.9, save_steps: Some(2), ..bench.recipe() };
    train(&recipe);
    let checkpoints = recipe.output_path.join("checkpoints");
    let expected = newest_checkpoint(&recipe);
    let files =
        ["weights.safetensors", "optimizer.safetensors", "ema.safetensors", "trainer.json", "files.json"];
    for file in files {
        let path = checkpoints.join("step-00000006").join(file);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut recorder = Recorder::default();
        run(&recipe, &mut recorder).unwrap();
        assert!(recorder.messages[0].contains("step-00000006/"), "{file}: {:?}", recorder.messages);
        assert_eq!(recorder.messages[1], "continuing after step 4");
        assert!(newest_checkpoint(&recipe) == expected, "after damage to {file}");
    }

    for step in ["step-00000004", "step-00000006"] {
        fs::write(checkpoints.join(step).join("trainer.json"), "{").unwrap();
    }
    let error = run(&recipe, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Damaged { ref reasons, .. } if reasons.len() == 2), "{error}");
}

/// A recipe whose run was killed while it wrote, at every place where it does.
#[test]
fn what_a_killed_run_left_unfinished_is_removed_and_does_not_disturb() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, ..bench.recipe() };
    // Before the run's own recipe was there.
    let unfinished = [".run.toml.17.0.part", ".lock"];
    for name in unfinished {
        fewstep_data::atomic::write(&recipe.output_path.join(name), b"x").unwrap();
    }
    let (_, result) = train(&recipe);
    let expected = file_bytes(&result);
    for name in [
        "checkpoints/.step-00000006.part/weights.safetensors",
        "tensorboard/.events.17.3.part",
        ".model.part/transformer/config.json",
        ".model.old.part/model_index.json",
    ] {
        fewstep_data::atomic::write(&recipe.output_path.join(name), b"x").unwrap();
    }
    train(&recipe);
    assert!(file_bytes(&result) == expected);
    let left: Vec<_> = file_bytes(&recipe.output_path).into_iter().map(|(path, _)| path).collect();
    assert!(left.iter().all(|path| !path.to_string_lossy().contains(".part")), "{left:?}");
}

#[test]
fn a_run_that_is_stopped_before_its_first_step_does_not_encode_its_data_first() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, dataset_memory_mib: 0, ..bench.recipe() };
    let stop = AtomicBool::new(true);
    let mut recorder = Recorder { stop: Some((u64::MAX, &stop)), ..Recorder::default() };
    assert_eq!(run(&recipe, &mut recorder).unwrap(), Outcome::Stopped(0));
    let encoded = file_bytes(&recipe.output_path.join("cache")).len();
    assert_eq!(encoded, 1, "the key alone");
    train(&recipe);
}

#[test]
fn a_second_process_in_the_same_folder_is_refused() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, ..bench.recipe() };
    let first = RunFolder::claim(&recipe).unwrap();
    let said = fail(&recipe);
    assert!(
        said.contains(&format!("another process works in this folder: {}", std::process::id())),
        "{said}"
    );
    assert!(said.contains("hint:"), "{said}");
    drop(first);
    assert!(!recipe.output_path.exists(), "a folder that was claimed and not used is gone");
    train(&recipe);
}

/// The same numbers from another folder with other ways to get there.
#[test]
fn results_do_not_tell_where_they_were_made() {
    let bench = Bench::new().with_teacher_data();
    let first = lora(bench.recipe());
    let second = Recipe {
        output_path: bench.path("elsewhere"),
        dataset_num_workers: 0,
        dataset_memory_mib: 0,
        save_steps: Some(1),
        log_steps: 3,
        ..first.clone()
    };
    let [first, second] = [first, second].map(|recipe| fs::read(train(&recipe).1).unwrap());
    assert!(first == second);
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
fn the_result_tells_its_origin_and_is_the_averaged_model() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { ema_decay: 0.99, ..bench.recipe() };
    let (_, path) = train(&recipe);
    let info =
        fewstep_models::read_info(&path.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(info["fewstep.base_hash"], fewstep_models::weights_hash(&(&recipe.model).into()).unwrap());
    assert_eq!(info["fewstep.training_steps"], "6");
    assert!(info["fewstep.sigma_grids"].contains("\"num_inference_steps\":3"));
    assert_eq!(toml::from_str::<Recipe>(&info["fewstep.recipe"]).unwrap(), recipe.without_place());

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
        sample_num_inference_steps: Some(2),
        ..bench.recipe()
    };
    train(&recipe);
    let sheet =
        fewstep_data::image::Picture::load(&recipe.output_path.join("samples/step-00000003.png")).unwrap();
    // Three pictures in a grid of two by two, with gaps of 2 px around each.
    assert_eq!((sheet.width, sheet.height), (2 * (SIDE_PX + 2) + 2, 2 * (SIDE_PX + 2) + 2));
}
