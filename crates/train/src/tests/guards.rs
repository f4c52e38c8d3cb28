//! Runs that go wrong: bad steps are skipped, and too many of them send a run back, with a lower rate, to what was good.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use fewstep_models::{WeightFiles, WeightType, save_tensors};

use super::fixtures::{Bench, ROWS, Recorder, SIDE_PX, newest_checkpoint, run, train};
use crate::recipe::Recipe;
use crate::{Outcome, TrainError};

/// Replaces the stored latents of rows by one number.
fn poison(bench: &Bench, rows: impl IntoIterator<Item = usize>, value: f32) {
    let shape = vec![48, SIDE_PX / 4, SIDE_PX / 4];
    for row in rows {
        let path = bench.path(&format!("data/latents/{row}.safetensors"));
        let latents = ("latents".to_owned(), shape.clone(), vec![value; shape.iter().product()]);
        save_tensors(&path, [latents], WeightType::F32, &Default::default()).unwrap();
    }
}

/// One row per step, in the order of the metadata.
fn in_order(bench: &Bench) -> Recipe {
    Recipe { batch_size: 1, shuffle: false, save_steps: Some(2), max_skipped_steps: 3, ..bench.recipe() }
}

/// The second half of the rows cannot be trained on: with three skipped steps a run goes back once an epoch.
fn half_poisoned() -> (Bench, Recipe) {
    let bench = Bench::new().with_teacher_data();
    poison(&bench, ROWS / 2..ROWS, f32::MAX);
    let recipe = Recipe { max_steps: Some(2 * ROWS as u64 + 2), keep: 1, ema_decay: 0.5, ..in_order(&bench) };
    (bench, recipe)
}

fn weights(checkpoint: &Path) -> Vec<(String, Vec<f32>)> {
    let files = WeightFiles::open(&checkpoint.join("weights.safetensors")).unwrap();
    files.keys().map(|key| (key.to_owned(), files.read(key).unwrap().1)).collect()
}

fn is_finite(weights: &[(String, Vec<f32>)]) -> bool {
    weights.iter().all(|(_, values)| values.iter().all(|value| value.is_finite()))
}

#[test]
fn a_poisoned_row_costs_its_steps_and_nothing_else() {
    let bench = Bench::new().with_teacher_data();
    poison(&bench, [2], f32::MAX);
    let recipe = Recipe { max_steps: Some(2 * ROWS as u64), ..in_order(&bench) };
    let mut recorder = Recorder::default();
    run(&recipe, &mut recorder).unwrap();
    let skipped: Vec<&String> = recorder.messages.iter().filter(|line| line.contains("skipped")).collect();
    assert_eq!(skipped.len(), 2, "{skipped:?}");
    assert!(skipped[1].starts_with("step 9 skipped: loss inf"), "{skipped:?}");
    let losses: Vec<bool> = recorder.losses.iter().map(|loss| loss.is_finite()).collect();
    assert_eq!(losses.iter().filter(|finite| !**finite).count(), 2);
    assert!(is_finite(&weights(&recipe.output_path.join("checkpoints/step-00000012"))));
}

#[test]
fn a_run_goes_back_to_what_was_good_with_a_lower_rate_and_further_data() {
    let (bench, recipe) = half_poisoned();
    let stop = AtomicBool::new(false);
    let mut recorder = Recorder { stop: Some((ROWS as u64, &stop)), ..Recorder::default() };
    assert_eq!(run(&recipe, &mut recorder).unwrap(), Outcome::Stopped(6));
    let told = recorder.messages.last().unwrap();
    assert!(told.contains("3 steps in a row") && told.contains("of step 2 and 0.5 times"), "{told}");

    // The newest checkpoint before the failure is that of step 4, in the middle of it.
    let good = Recipe { max_steps: Some(2), output_path: bench.path("good"), ..recipe.clone() };
    train(&good);
    let found = weights(&recipe.output_path.join("checkpoints/step-00000006"));
    assert!(found == weights(&good.output_path.join("checkpoints/step-00000002")), "not the good weights");

    let mut recorder = Recorder::default();
    run(&recipe, &mut recorder).unwrap();
    let rate = recipe.learning_rate;
    // Steps 7 to 9 see the first rows again at half the rate; the second failure halves it once more.
    assert_eq!(recorder.rates[..6], [rate / 2.0; 6]);
    assert_eq!(recorder.rates[6..], [rate / 4.0; 2]);
    assert!(recorder.losses[..3].iter().all(|loss| loss.is_finite()), "{:?}", recorder.losses);
}

#[test]
fn a_resumed_run_that_went_back_equals_an_uninterrupted_one_to_the_bit() {
    let (bench, whole) = half_poisoned();
    train(&whole);
    let expected = newest_checkpoint(&whole);
    // Before the failure, in it, at the step that goes back, and after it; and at all of them.
    for stops in [vec![3], vec![5], vec![6], vec![7], vec![1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13]] {
        let parts = Recipe { output_path: bench.path(&format!("parts-{stops:?}")), ..whole.clone() };
        for last in stops {
            let stop = AtomicBool::new(false);
            let mut recorder = Recorder { stop: Some((last, &stop)), ..Recorder::default() };
            assert_eq!(run(&parts, &mut recorder).unwrap(), Outcome::Stopped(last));
        }
        train(&parts);
        assert!(newest_checkpoint(&parts) == expected, "{}", parts.output_path.display());
    }
}

#[test]
fn weights_that_burst_before_the_first_checkpoint_go_back_to_the_start() {
    let bench = Bench::new().with_teacher_data();
    // The first step throws the weights to where no loss is finite; the rate after it is an ordinary one.
    let recipe = Recipe {
        learning_rate: 1e30,
        rollback_lr_factor: 1e-33,
        max_steps: Some(12),
        save_steps: Some(1),
        ..in_order(&bench)
    };
    let mut recorder = Recorder::default();
    run(&recipe, &mut recorder).unwrap();
    let back: Vec<&String> = recorder.messages.iter().filter(|line| line.contains("in a row")).collect();
    assert_eq!(back.len(), 1, "{back:?}");
    assert!(back[0].contains("going on at step 4 with those of step 0"), "{back:?}");
    assert!(recorder.losses[4..].iter().all(|loss| loss.is_finite()), "{:?}", recorder.losses);
    assert!(is_finite(&weights(&recipe.output_path.join("checkpoints/step-00000012"))));
}

#[test]
fn a_run_that_cannot_be_helped_ends_with_its_good_checkpoints() {
    let bench = Bench::new().with_teacher_data();
    poison(&bench, 2..ROWS, f32::MAX);
    let recipe = Recipe { max_rollbacks: 0, max_steps: Some(50), ..in_order(&bench) };
    let error = run(&recipe, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 5, times: 3, rollbacks: 0 }), "{error}");
    assert!(is_finite(&weights(&recipe.output_path.join("checkpoints/step-00000002"))));

    poison(&bench, 0..2, f32::MAX);
    let recipe = Recipe { max_rollbacks: 2, output_path: bench.path("hopeless"), ..recipe };
    let error = run(&recipe, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 9, times: 3, rollbacks: 2 }), "{error}");
    assert!(error.to_string().contains("hint: lower learning_rate"), "{error}");
    // Asked again it says the same again, and with more patience goes on from there.
    assert_eq!(run(&recipe, &mut Recorder::default()).unwrap_err().to_string(), error.to_string());
    let patient = Recipe { max_rollbacks: 3, ..recipe };
    let error = run(&patient, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 12, rollbacks: 3, .. }), "{error}");
}

#[test]
fn a_spike_is_skipped_as_if_it_were_not_finite() {
    let bench = Bench::new().with_teacher_data();
    let calm = Recipe { max_steps: Some(3 * ROWS as u64), ..in_order(&bench) };
    train(&calm);
    let before = fs::read(calm.output_path.join("checkpoints/step-00000018/weights.safetensors")).unwrap();
    poison(&bench, [0], 1e3);
    let spiky = Recipe { max_steps: Some(19), ..calm };
    let mut recorder = Recorder::default();
    run(&spiky, &mut recorder).unwrap();
    let told = recorder.messages.iter().find(|line| line.contains("skipped")).unwrap();
    assert!(
        told.starts_with("step 19 skipped: loss ") && told.contains("times the median of the last 18"),
        "{told}"
    );
    let after = fs::read(spiky.output_path.join("checkpoints/step-00000019/weights.safetensors")).unwrap();
    assert!(before == after, "the spike moved the weights");
}
