//! Methods against hand computation, against the plain tape, and against themselves in other batches.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::Resize;
use fewstep_flow::SigmaGrid;
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::schedule::TrainingLevels;
use fewstep_models::{Denoiser, KeptSteps, Model, NamedVisitor, visit_named};

use super::fixtures::{Bench, SIDE_PX, all_values, prompt, read};
use crate::batch::{Batch, Plan, Planned};
use crate::dataset::Dataset;
use crate::host::to_vec;
use crate::method::{Direct, FlowMatching, GradientSum};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::random::{Draw, Purpose};
use crate::recipe::{Distance, Recipe, Task, TimestepSampling};
use crate::trainable::Trainable;

fn dataset(recipe: &Recipe, model: &Model) -> Dataset {
    super::fixtures::dataset(recipe, model, Resize::Exact { height: SIDE_PX, width: SIDE_PX })
}

pub(super) fn prepared(recipe: &Recipe, model: Model) -> Model {
    Trainable::new(recipe, &model).unwrap().prepare(model, recipe).unwrap()
}

fn batch<'a>(data: &'a Dataset, positions: &[usize]) -> Batch<'a> {
    read(data, Planned { step: 0, epoch: 2, positions: positions.to_vec(), generators: None }, 5)
}

fn rows(planned: Vec<Planned>) -> Vec<usize> {
    planned.into_iter().flat_map(|planned| planned.positions).collect()
}

pub(super) type ByName = BTreeMap<String, Vec<f32>>;

pub(super) fn by_name(model: &Model, sum: GradientSum) -> ByName {
    struct Reader(GradientsParams, ByName);
    impl NamedVisitor for Reader {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(parameter.id) {
                self.1.insert(name.to_owned(), to_vec(gradient));
            }
        }
    }
    let mut reader = Reader(sum.finish(), BTreeMap::new());
    visit_named(model, &mut reader);
    reader.1
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Compares tensor by tensor, relative to each tensor's norm.
#[track_caller]
pub(super) fn assert_gradients_close(found: &ByName, expected: &ByName, relative: f64) {
    assert!(!expected.is_empty());
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in expected {
        let difference = norm(found[name].iter().zip(expected).map(|(found, expected)| found - expected));
        let scale = norm(expected.iter().copied());
        // Some gradients are zero in exact arithmetic (biases before a softmax): both are rounding then.
        assert!(
            difference <= relative * scale.max(1e-4),
            "{name}: differs by {difference:e}, norm {scale:e}"
        );
    }
}

fn adjoint_equals_tape(recipe: &Recipe, bench: &Bench) {
    let start = bench.model();
    let data = dataset(recipe, &start);
    let direct = Direct::new(recipe, &start);
    let model = lively(prepared(recipe, start));
    let (mut adjoint, mut tape) = (GradientSum::default(), GradientSum::default());
    let batch = batch(&data, &[0, 1, 3]);
    let loss = direct.step(&model, &batch, 0.5, &mut adjoint).unwrap();
    let kept = model.clone().recomputing_blocks(false);
    let expected = direct.step_on_tape(&kept, &batch, 0.5, &mut tape).unwrap();
    assert!((loss - expected).abs() < 1e-6 * expected, "loss {loss}, on the tape {expected}");
    assert_gradients_close(&by_name(&model, adjoint), &by_name(&model, tape), 1e-5);
}

/// Gives zero parameters values: a fresh adapter's zero half would hide the other half's gradient.
pub(super) fn lively(model: Model) -> Model {
    let filled: ByName = all_values(&model)
        .into_iter()
        .filter(|(_, values)| values.iter().all(|value| *value == 0.0))
        .enumerate()
        .map(|(at, (name, values))| {
            (name, fewstep_testkit::random_values(values.len(), at as u64).iter().map(|x| 0.1 * x).collect())
        })
        .collect();
    crate::host::with_parameters(model, |name| filled.get(name).map(Vec::as_slice))
}

#[test]
fn the_adjoint_gradient_of_full_weights_equals_the_tape() {
    let bench = Bench::new().with_teacher_data();
    adjoint_equals_tape(&bench.recipe(), &bench);
}

#[test]
fn the_adjoint_gradient_of_adapters_equals_the_tape() {
    let bench = Bench::new().with_teacher_data();
    adjoint_equals_tape(&Recipe { lora_base_model: Some("transformer".into()), ..bench.recipe() }, &bench);
}

#[test]
fn the_adjoint_gradient_of_recomputed_blocks_equals_the_tape() {
    let bench = Bench::new().with_teacher_data();
    for recorded_steps in [None, Some(1)] {
        let recipe = Recipe { use_gradient_checkpointing: true, recorded_steps, ..bench.recipe() };
        adjoint_equals_tape(&recipe, &bench);
        adjoint_equals_tape(&Recipe { lora_base_model: Some("transformer".into()), ..recipe }, &bench);
    }
}

#[test]
fn four_steps_are_kept_and_all_recorded_where_blocks_are_computed_again() {
    let recipe = |use_gradient_checkpointing, recorded_steps| Recipe {
        use_gradient_checkpointing,
        recorded_steps,
        ..Recipe::default()
    };
    for (recipe, recorded, remembered) in [
        (recipe(false, None), 1, 3),
        (recipe(true, None), 4, 0),
        (recipe(true, Some(2)), 2, 2),
        (recipe(false, Some(0)), 0, 4),
        (recipe(false, Some(9)), 9, 0),
    ] {
        assert_eq!(recipe.kept_steps(), KeptSteps { recorded, remembered });
    }
}

#[test]
fn the_adjoint_gradient_is_the_same_whatever_is_kept() {
    let bench = Bench::new().with_teacher_data();
    let path = bench.path("data/metadata.csv");
    let three_steps = std::fs::read_to_string(&path).unwrap();
    // Of six steps some are neither recorded nor remembered.
    for (steps, recorded_steps) in [(3, 0), (3, 2), (3, 3), (3, 9), (6, 0), (6, 1), (6, 5)] {
        std::fs::write(&path, three_steps.replace(",cpu,3,", &format!(",cpu,{steps},"))).unwrap();
        let recorded_steps = Some(recorded_steps);
        adjoint_equals_tape(&Recipe { recorded_steps, ..bench.recipe() }, &bench);
    }
}

#[test]
fn the_adjoint_gradient_of_a_guided_student_equals_the_tape() {
    let bench = Bench::new().with_teacher_data();
    let path = bench.path("data/metadata.csv");
    let guided = std::fs::read_to_string(&path).unwrap().replace(",cpu,3,1.0", ",cpu,3,2.5");
    std::fs::write(&path, guided).unwrap();
    let recipe = Recipe { loss: Distance::PseudoHuber, huber_c: 0.1, ..bench.recipe() };
    adjoint_equals_tape(&recipe, &bench);
}

/// An adapter's base weights get no gradient at all, so they cost none.
#[test]
fn only_adapters_have_gradients() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { lora_base_model: Some("transformer".into()), ..bench.recipe() };
    let start = bench.model();
    let data = dataset(&recipe, &start);
    let direct = Direct::new(&recipe, &start);
    let model = prepared(&recipe, start);
    let mut sum = GradientSum::default();
    direct.step(&model, &batch(&data, &[0, 1]), 1.0, &mut sum).unwrap();
    let gradients = by_name(&model, sum);
    assert!(gradients.len() > 20);
    assert!(gradients.keys().all(|name| name.contains(".lora.")));
}

#[test]
fn batches_accumulate_to_the_large_batch() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, ..bench.recipe() };
    let start = bench.model();
    let data = dataset(&recipe, &start);
    let method = FlowMatching::new(&recipe);
    let model = prepared(&recipe, start);
    let (mut parts, mut whole) = (GradientSum::default(), GradientSum::default());
    let first = method.step(&model, &batch(&data, &[0, 1, 2, 3]), 0.8, &mut parts).unwrap();
    let second = method.step(&model, &batch(&data, &[4]), 0.2, &mut parts).unwrap();
    let loss = method.step(&model, &batch(&data, &[0, 1, 2, 3, 4]), 1.0, &mut whole).unwrap();
    assert!((0.8 * first + 0.2 * second - loss).abs() < 1e-6 * loss);
    assert_gradients_close(&by_name(&model, parts), &by_name(&model, whole), 1e-5);
}

/// Nothing that goes into the first block has a gradient there, only what is in it.
#[test]
fn the_flow_matching_gradient_of_recomputed_blocks_is_that_of_kept_ones() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, lora_base_model: Some("transformer".into()), ..bench.recipe() };
    let start = bench.model();
    let data = dataset(&recipe, &start);
    let method = FlowMatching::new(&recipe);
    let model = lively(prepared(&recipe, start));
    let gradients = |recomputes: bool| {
        let model = model.clone().recomputing_blocks(recomputes);
        let mut sum = GradientSum::default();
        let loss = method.step(&model, &batch(&data, &[0, 1, 2]), 1.0, &mut sum).unwrap();
        (loss, by_name(&model, sum))
    };
    let ((loss, found), (expected_loss, expected)) = (gradients(true), gradients(false));
    assert_eq!(loss, expected_loss);
    assert_gradients_close(&found, &expected, 1e-5);
}

/// L = mean (v(x_s, s, c) − (e − x0))² with x_s = (1 − s)·x0 + s·e, from the same draws in plain numbers.
#[test]
fn the_flow_matching_loss_is_the_one_computed_by_hand() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, guidance_dropout: 0.0, ..bench.recipe() };
    let plain = bench.model();
    let data = dataset(&recipe, &plain);
    let model = prepared(&recipe, plain.clone());
    let method = FlowMatching::new(&recipe);
    let loss = method.step(&model, &batch(&data, &[4]), 1.0, &mut GradientSum::default()).unwrap();

    let mut generator = TorchGenerator::new(Draw { seed: 5, epoch: 2, row: 4 }.seed(Purpose::Sample));
    let sigma = 1.0 / (1.0 + (-generator.randn(1)[0]).exp());
    let latents = batch(&data, &[4]).latents();
    let (shape, clean) = (latents.dims(), to_vec(latents));
    let noise = generator.randn(clean.len());
    let noisy: Vec<f32> =
        clean.iter().zip(&noise).map(|(clean, noise)| (1.0 - sigma) * clean + sigma * noise).collect();
    let tensor = |values: Vec<f32>| Tensor::<1>::from_floats(values.as_slice(), &Device::flex());
    let condition = plain.encode_prompts(&[prompt(4)]).unwrap();
    let velocity = to_vec(plain.velocity(tensor(noisy).reshape(shape), tensor(vec![sigma]), &condition));
    let errors = velocity
        .iter()
        .zip(noise.iter().zip(&clean))
        .map(|(v, (noise, clean))| f64::from(v - (noise - clean)));
    let expected = errors.map(|error| error * error).sum::<f64>() / clean.len() as f64;
    assert!((loss - expected).abs() < 1e-5 * expected, "found {loss}, expected {expected}");
}

#[test]
fn sigma_and_dropped_captions_have_the_asked_for_shares() {
    let bench = Bench::new().with_pictures();
    let base = Recipe { guidance_dropout: 0.25, ..bench.recipe() };
    // P(logit-normal < 1/4) = Φ(ln(1/3)); one in five of the levels below.
    let grid = SigmaGrid::new(vec![0.9, 0.7, 0.5, 0.3, 0.1, 0.0]).unwrap();
    let levels = TrainingLevels::of(&grid);
    let cases = [
        (TimestepSampling::Uniform, 0.25),
        (TimestepSampling::LogitNormal, 0.136),
        (TimestepSampling::Schedule, 0.2),
    ];
    for (timestep_sampling, below_quarter) in cases {
        let method = FlowMatching::new(&Recipe { timestep_sampling, ..base.clone() });
        let drawn: Vec<_> = (0..4000)
            .map(|row| Draw { seed: 1, epoch: 0, row }.generator(Purpose::Sample))
            .map(|mut generator| method.draw_level(&mut generator, &levels, 1.0))
            .collect();
        let share = |count: usize| count as f64 / drawn.len() as f64;
        // Four standard errors of a share near a quarter.
        let (dropped, small) =
            (drawn.iter().filter(|d| d.0).count(), drawn.iter().filter(|d| d.1 < 0.25).count());
        assert!((share(dropped) - 0.25).abs() < 0.028, "{}", share(dropped));
        assert!((share(small) - below_quarter).abs() < 0.028, "{}", share(small));
    }
}

#[test]
fn frozen_weights_stay_bit_equal_and_the_others_move() {
    let bench = Bench::new().with_pictures();
    let full = Recipe { task: Task::Sft, ..bench.recipe() };
    let lora = Recipe { lora_base_model: Some("transformer".into()), ..full.clone() };
    for (recipe, learns) in [(full, "transformer."), (lora, ".lora.")] {
        let start = bench.model();
        let data = dataset(&recipe, &start);
        let method = FlowMatching::new(&recipe);
        let mut model = prepared(&recipe, start);
        let before = all_values(&model);
        let mut optimizer = Optimizer::new(&recipe);
        for _ in 0..3 {
            let mut sum = GradientSum::default();
            method.step(&model, &batch(&data, &[0, 1]), 1.0, &mut sum).unwrap();
            model = optimizer.step(model, sum.finish(), 1.0, 1e-3);
        }
        for ((name, before), (_, after)) in before.iter().zip(&all_values(&model)) {
            // The last block's text queries and all behind them reach no output; their matrices would only decay.
            let no_output =
                ["to_add_out", "txt_mlp", "add_q_proj.bias", "add_q_proj.lora.up", "norm_added_q"];
            let unused = name.contains("blocks.1.") && no_output.iter().any(|part| name.contains(part));
            assert_eq!(before != after, name.contains(learns) && !unused, "{name}");
        }
    }
}

#[test]
fn parameters_are_updated_in_their_own_memory() {
    struct Addresses(Vec<usize>);
    impl NamedVisitor for Addresses {
        fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
            crate::host::with_values(parameter.val(), |values| self.0.push(values.as_ptr() as usize));
        }
    }
    let addresses = |model: &Model| {
        let mut visitor = Addresses(Vec::new());
        visit_named(model, &mut visitor);
        visitor.0
    };
    let bench = Bench::new().with_teacher_data();
    let recipe = bench.recipe();
    let start = bench.model();
    let data = dataset(&recipe, &start);
    let direct = Direct::new(&recipe, &start);
    let mut model = prepared(&recipe, start);
    let before = addresses(&model);
    let mut sum = GradientSum::default();
    direct.step(&model, &batch(&data, &[0, 1]), 1.0, &mut sum).unwrap();
    let gradients = sum.finish();
    let norm = gradient_norm(&model, &gradients);
    model = Optimizer::new(&recipe).step(model, gradients, norm, 1e-3);
    assert_eq!(addresses(&model), before);
}

#[test]
fn accumulated_batches_hold_the_rows_of_the_large_batch() {
    let bench = Bench::new().with_pictures();
    let large = Recipe { task: Task::Sft, batch_size: 6, ..bench.recipe() };
    let parts = Recipe { batch_size: 2, gradient_accumulation_steps: 3, ..large.clone() };
    let data = dataset(&large, &bench.model());
    let step = |recipe| Plan::new(recipe, &data).step(7);
    assert_eq!(step(&parts).len(), 3);
    assert_eq!(rows(step(&parts)), rows(step(&large)));
}

#[test]
fn the_bundled_set_gives_both_captions_of_every_picture_that_is_not_held_out() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji");
    let recipe = Recipe { task: Task::Sft, dataset_base_path: folder.clone(), ..Recipe::default() };
    let rows = super::fixtures::rows(&recipe, Resize::MaxPixels { max_pixels: 4096, division: 8 }).unwrap();
    let set = fewstep_data::emoji::EmojiSet::open(&folder).unwrap();
    assert_eq!(rows.len(), 2 * set.training().count());
    let prompts: std::collections::HashSet<&str> = rows.iter().map(|row| row.prompt.as_str()).collect();
    // Two concepts may share a label, so a held-out caption can stand for a trained picture, rarely.
    let leaked = set.held_out().filter(|item| prompts.contains(item.caption_en.as_str())).count();
    assert!(leaked * 20 < set.held_out().count(), "{leaked} held-out captions are trained on");
}

#[test]
fn an_epoch_has_every_row_once_and_the_next_another_order() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe {
        task: Task::Sft,
        dataset_repeat: 3,
        gradient_accumulation_steps: 2,
        batch_size: 4,
        ..bench.recipe()
    };
    let data = dataset(&recipe, &bench.model());
    let mut plan = Plan::new(&recipe, &data);
    // 18 positions in batches of 4 are 5 batches, in steps of 2 batches 3 steps.
    assert_eq!(plan.steps_per_epoch, 3);
    let epoch = |plan: &mut Plan, first: u64| -> Vec<usize> {
        (first..first + 3).flat_map(|step| rows(plan.step(step))).collect()
    };
    let (first, second) = (epoch(&mut plan, 0), epoch(&mut plan, 3));
    assert_ne!(first, second);
    for mut positions in [first, second] {
        positions.sort_unstable();
        assert_eq!(positions, (0..18).collect::<Vec<_>>());
    }
}
