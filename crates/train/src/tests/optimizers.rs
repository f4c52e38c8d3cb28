//! Runs with each optimiser, and in number types of two bytes.

use std::sync::atomic::AtomicBool;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use fewstep_models::{Model, NamedVisitor, visit_named};

use super::fixtures::{Bench, Recorder, run, train};
use super::runs::{assert_resumes_to_the_bit, resumable};
use crate::recipe::{Dtype, OptimizerName, Recipe, StateNumbers, Task};
use crate::{Outcome, TrainError, Trainable};

use OptimizerName::{Adafactor, Adamw8bit, Muon, Prodigy};

#[track_caller]
fn assert_learns(optimizer: OptimizerName, learning_rate: f64, steps: u64) {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { optimizer, learning_rate, max_steps: Some(steps), batch_size: 3, ..bench.recipe() };
    let (losses, _) = train(&recipe);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() - 5..]));
    assert!(last < 0.6 * first, "{optimizer:?}: the loss went from {first} to {last}");
}

#[test]
fn adamw8bit_learns() {
    assert_learns(Adamw8bit, 1e-3, 30);
}

#[test]
fn adafactor_learns() {
    assert_learns(Adafactor, 1e-3, 30);
}

/// From an estimate of 1e-6, which has to grow by itself.
#[test]
fn prodigy_learns_without_being_told_a_rate() {
    assert_learns(Prodigy, 1.0, 120);
}

#[test]
fn muon_learns_with_adamws_rate() {
    assert_learns(Muon, 1e-3, 30);
}

#[test]
fn resumed_runs_of_every_optimiser_equal_uninterrupted_ones_to_the_bit() {
    for optimizer in [Adamw8bit, Adafactor, Prodigy, Muon] {
        let bench = Bench::new().with_teacher_data();
        let learning_rate = if optimizer == Prodigy { 1.0 } else { 1e-3 };
        let recipe = Recipe { optimizer, learning_rate, ..resumable(&bench, Task::DirectDistill) };
        assert_resumes_to_the_bit(&recipe, &bench);
    }
}

#[test]
fn resumed_mixed_precision_equals_an_uninterrupted_run_to_the_bit() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { dtype: Dtype::Bf16, ..resumable(&bench, Task::DirectDistill) };
    assert_resumes_to_the_bit(&recipe, &bench);
}

/// The checkpoint of a run after one step.
fn stopped(recipe: &Recipe) {
    let stop = AtomicBool::new(false);
    let mut recorder = Recorder { stop: Some((1, &stop)), ..Recorder::default() };
    assert_eq!(run(recipe, &mut recorder).unwrap(), Outcome::Stopped(1));
}

#[test]
fn a_run_is_not_continued_with_another_optimiser() {
    let bench = Bench::new().with_teacher_data();
    let recipe = bench.recipe();
    stopped(&recipe);
    let other = Recipe { optimizer: Muon, ..recipe.clone() };
    let error = run(&other, &mut Recorder::default()).unwrap_err().to_string();
    assert!(error.contains("optimizer is \"adamw\" there, \"muon\" here"), "{error}");

    // The same with a recipe that was edited to hide it.
    std::fs::write(recipe.output_path.join("run.toml"), other.to_toml()).unwrap();
    let error = run(&other, &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::OptimizerState { .. }), "{error}");
}

#[test]
fn an_optimiser_that_cannot_round_its_state_is_refused() {
    let recipe = Recipe {
        dtype: Dtype::Bf16,
        state_numbers: StateNumbers::Dtype,
        optimizer: Adafactor,
        ..Recipe::default()
    };
    let error = recipe.validate().unwrap_err().to_string();
    assert!(error.contains("state_numbers is dtype"), "{error}");
    let error = Recipe { lr_end: 1.0, ..Recipe::default() }.validate().unwrap_err().to_string();
    assert!(error.contains("lr_end is 1"), "{error}");
}

/// Types of the denoiser's parameters: frozen matrices, other frozen ones, and those that learn.
fn types(model: &Model) -> [Vec<DType>; 3] {
    struct Types([Vec<DType>; 3]);
    impl NamedVisitor for Types {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if name.starts_with("transformer") {
                let kind = if parameter.is_require_grad() { 2 } else { usize::from(D != 2) };
                self.0[kind].push(parameter.val().dtype());
            }
        }
    }
    let mut types = Types(Default::default());
    visit_named(model, &mut types);
    types.0.map(|mut types| {
        types.dedup();
        types
    })
}

#[test]
fn frozen_matrices_are_stored_in_two_bytes_and_what_learns_in_four() {
    let bench = Bench::new();
    let prepared = |recipe: &Recipe| {
        let options = fewstep_models::LoadOptions { dtype: recipe.dtype.into(), ..Default::default() };
        let model = Model::from_pretrained(&(&recipe.model).into(), &options).unwrap();
        Trainable::new(recipe, &model).unwrap().prepare(model, recipe).unwrap()
    };
    for (dtype, stored) in [(Dtype::Bf16, DType::BF16), (Dtype::F16, DType::F16)] {
        let full = Recipe { dtype, ..bench.recipe() };
        let adapters = Recipe { lora_base_model: Some("transformer".into()), ..full.clone() };
        let [matrices, others, learning] = types(&prepared(&adapters));
        assert_eq!((matrices, others, learning), (vec![stored], vec![DType::F32], vec![DType::F32]));
        let [matrices, others, learning] = types(&prepared(&full));
        assert_eq!((matrices, others, learning), (vec![], vec![], vec![DType::F32]));
    }
}

/// A rate that moves weights by less than half the spacing of bf16 in every step, but not in all of them.
#[test]
fn small_steps_add_up_in_f32_weights_that_compute_in_bf16() {
    let bench = Bench::new().with_teacher_data();
    let losses = |state_numbers, folder| {
        train(&Recipe {
            dtype: Dtype::Bf16,
            state_numbers,
            learning_rate: 2e-5,
            weight_decay: 0.0,
            max_steps: Some(60),
            batch_size: 6,
            shuffle: false,
            output_path: bench.path(folder),
            ..bench.recipe()
        })
        .0
    };
    let gain = |losses: Vec<f64>| losses[0] - losses[59];
    let (kept, rounded) =
        (gain(losses(StateNumbers::F32, "kept")), gain(losses(StateNumbers::Dtype, "rounded")));
    assert!(
        kept > 1.5 * rounded.max(0.0) && kept > 0.0,
        "gain {kept} with f32 weights, {rounded} with bf16 ones"
    );
}
