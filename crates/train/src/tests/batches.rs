//! A batch equals its samples one by one, an accumulated step the large batch, and neither depends on who reads the data.

use fewstep_data::image::{Picture, Resize};
use fewstep_models::Model;
use fewstep_testkit::random_values;

use super::fixtures::{Bench, SIDE_PX, dataset, read, train};
use super::methods::{ByName, assert_gradients_close, by_name, lively, prepared};
use crate::batch::{Plan, Planned};
use crate::dataset::Dataset;
use crate::loader::Loader;
use crate::method::{GradientSum, Method};
use crate::recipe::{RandomNumbers, Recipe, Task};

/// f32 sums in another order.
const TOLERANCE: f64 = 1e-5;

fn lora(recipe: Recipe) -> Recipe {
    Recipe { lora_base_model: Some("transformer".into()), ..recipe }
}

/// Recipes of all methods and kinds of weights, each with its data.
fn cases() -> Vec<(&'static str, Bench, Recipe)> {
    let with = |name, bench: Bench, task, adapters| {
        // Captions are dropped in some samples, so that the empty prompt is in the batches too.
        let recipe = Recipe { task, guidance_dropout: 0.4, height: None, width: None, ..bench.recipe() };
        (name, bench, if adapters { lora(recipe) } else { recipe })
    };
    vec![
        with("sft, full", Bench::new().with_pictures(), Task::Sft, false),
        with("sft, adapters", Bench::new().with_pictures(), Task::Sft, true),
        with("direct_distill, full", Bench::new().with_teacher_data(), Task::DirectDistill, false),
        with("direct_distill, adapters", Bench::new().with_teacher_data(), Task::DirectDistill, true),
    ]
}

/// Pictures of two more sizes in place of every second and third one; stored latents do not fit them any more.
fn mix_sizes(bench: &Bench) {
    let _ = std::fs::remove_dir_all(bench.path("data/latents"));
    let files = walk(&bench.path("data"));
    for (at, path) in files.iter().enumerate() {
        let [height, width] = [[SIDE_PX, SIDE_PX], [2 * SIDE_PX, SIDE_PX], [SIDE_PX, 3 * SIDE_PX]][at % 3];
        let rgb = random_values(3 * height * width, at as u64).into_iter().map(|x| (128.0 + 40.0 * x) as u8);
        Picture { width, height, rgb: rgb.collect() }.save_png(path).unwrap();
    }
}

/// The pictures of a data set, sorted.
fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let names = fewstep_testkit::folder_files(folder).into_keys();
    names
        .filter(|name| name.extension().is_some_and(|end| end == "png"))
        .map(|name| folder.join(name))
        .collect()
}

/// A method with its data and a model in which every parameter that can have a gradient has one.
struct Trained {
    data: Dataset,
    method: Method,
    model: Model,
}

impl Trained {
    fn new(recipe: &Recipe, start: Model) -> Self {
        let data = dataset(recipe, &start, Resize::MaxPixels { max_pixels: 1 << 20, division: 8 });
        let method = Method::new(recipe, &start);
        Self { data, method, model: lively(prepared(recipe, start)) }
    }

    /// The mean loss of batches of these positions and its gradient, as a step sums them up.
    fn step(&self, batches: &[Vec<usize>]) -> (f64, ByName) {
        let samples: usize = batches.iter().map(Vec::len).sum();
        let (mut sum, mut loss) = (GradientSum::default(), 0.0);
        for positions in batches {
            let planned = Planned { step: 0, epoch: 1, positions: positions.clone(), generators: None };
            let share = positions.len() as f64 / samples as f64;
            let batch = read(&self.data, planned, 5);
            loss += share * self.method.step(&self.model, &batch, share as f32, &mut sum).unwrap();
        }
        (loss, by_name(&self.model, sum))
    }
}

#[track_caller]
fn assert_same((loss, gradients): (f64, ByName), expected: &(f64, ByName), what: &str) {
    let error = (loss - expected.0).abs() / expected.0;
    assert!(error <= TOLERANCE, "{what}: loss {loss}, one by one {}", expected.0);
    assert_gradients_close(&gradients, &expected.1, TOLERANCE);
}

/// The six prompts have six lengths, one of them none at all.
#[test]
fn a_batch_equals_its_samples_one_by_one() {
    for (name, bench, recipe) in cases() {
        let trained = Trained::new(&recipe, bench.model());
        let one_by_one = trained.step(&(0..6).map(|row| vec![row]).collect::<Vec<_>>());
        assert_same(trained.step(&[(0..6).collect()]), &one_by_one, name);
    }
}

#[test]
fn batches_of_mixed_sizes_equal_their_samples_one_by_one() {
    for (name, bench, recipe) in cases() {
        mix_sizes(&bench);
        let recipe = Recipe { batch_size: 3, gradient_accumulation_steps: 3, dataset_repeat: 2, ..recipe };
        let trained = Trained::new(&recipe, bench.model());
        let step = Plan::new(&recipe, &trained.data).step(0);
        let batches: Vec<Vec<usize>> = step.into_iter().map(|planned| planned.positions).collect();
        let sizes = |batch: &Vec<usize>| -> Vec<_> {
            batch.iter().map(|position| trained.data.sample_at(*position).group.extent).collect()
        };
        assert!(batches.iter().all(|batch| sizes(batch).windows(2).all(|pair| pair[0] == pair[1])));
        assert!(batches.iter().any(|batch| sizes(batch)[0] != sizes(&batches[0])[0]), "{name}: one size");
        let alone: Vec<Vec<usize>> = batches.concat().into_iter().map(|position| vec![position]).collect();
        assert_same(trained.step(&batches), &trained.step(&alone), name);
    }
}

/// The trained weights of a run by their keys, and how far from each other they may be: a small part of the way they
/// went. AdamW divides by the gradient's size, so what is rounding in a gradient near zero is none in its step.
#[test]
fn accumulated_batches_train_the_weights_that_the_large_batch_trains() {
    for (name, bench, recipe) in cases() {
        let weights = |batch_size, gradient_accumulation_steps| {
            let output_path = bench.path(&format!("run-{batch_size}-{gradient_accumulation_steps}"));
            let recipe = Recipe {
                batch_size,
                gradient_accumulation_steps,
                output_path: output_path.clone(),
                adam_epsilon: 1e-4,
                ..recipe.clone()
            };
            train(&recipe);
            let path = output_path.join("checkpoints/step-00000006/weights.safetensors");
            let files = fewstep_models::WeightFiles::open(&path).unwrap();
            files.keys().flat_map(|key| files.read(key).unwrap().1).collect::<Vec<f32>>()
        };
        let start: Vec<f32> = crate::host::trainable_values(&prepared(&recipe, bench.model()))
            .into_values()
            .flat_map(|tensor| tensor.values)
            .collect();
        let large = weights(6, 1);
        let distance =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let way = distance(&large, &start);
        for parts in [weights(3, 2), weights(2, 3), weights(1, 6)] {
            let error = distance(&parts, &large);
            assert!(way > 0.0 && error < 1e-3 * way, "{name}: {error:e} apart after a way of {way:e}");
        }
    }
}

/// Without threads, with many, from memory and from files: the same bits.
#[test]
fn results_do_not_depend_on_who_reads_the_data_or_where_it_is_kept() {
    for (name, bench, recipe) in cases() {
        mix_sizes(&bench);
        let mut results = Vec::new();
        for (dataset_num_workers, dataset_memory_mib) in [(0, 512), (1, 0), (5, 0), (3, 512)] {
            let recipe = Recipe {
                dataset_num_workers,
                dataset_memory_mib,
                output_path: bench.path(&format!("run-{dataset_num_workers}-{dataset_memory_mib}")),
                gradient_accumulation_steps: 2,
                ..recipe.clone()
            };
            let (losses, result) = train(&recipe);
            let cached = fewstep_testkit::folder_files(&recipe.output_path)
                .into_keys()
                .filter(|path| path.starts_with("cache") && path.extension().is_some())
                .count();
            // Six pictures and six prompts.
            assert_eq!(cached, if dataset_memory_mib == 0 { 12 } else { 0 }, "{name}");
            results.push((losses, file_or_folder(&result)));
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{name}");
    }
}

fn file_or_folder(path: &std::path::Path) -> Vec<Vec<u8>> {
    match path.is_dir() {
        true => fewstep_testkit::folder_files(path).into_values().collect(),
        false => vec![std::fs::read(path).unwrap()],
    }
}

/// Also in the peers' order of draws, where every number depends on those before it.
#[test]
fn a_run_that_goes_back_to_an_earlier_step_sees_the_same_batches_again() {
    let bench = Bench::new().with_pictures();
    for random_numbers in [RandomNumbers::PerPosition, RandomNumbers::TorchGlobal] {
        let recipe = Recipe {
            task: Task::Sft,
            random_numbers,
            gradient_accumulation_steps: 2,
            max_steps: Some(9),
            ..bench.recipe()
        };
        let data = dataset(&recipe, &bench.model(), Resize::Exact { height: SIDE_PX, width: SIDE_PX });
        let mut loader = Loader::new(&recipe, &data);
        let mut draws = |step, batches: usize| -> Vec<Vec<f32>> {
            let sizes = loader.begin(step, &data);
            let of_batch = |_: &usize| -> Vec<f32> {
                let batch = loader.next(&data).unwrap();
                batch.generators().iter_mut().flat_map(|generator| generator.randn(2)).collect()
            };
            sizes.iter().take(batches).map(of_batch).collect()
        };
        let all: Vec<_> = (0..9).map(|step| draws(step, 2)).collect();
        assert_ne!(all[0], all[3], "two epochs of three batches in two steps");
        assert_eq!(draws(4, 2), all[4]);
        // Left in the middle of a step.
        assert_eq!(draws(5, 1), all[5][..1]);
        for step in [5, 1, 2, 7] {
            assert_eq!(draws(step, 2), all[step as usize], "step {step}");
        }
    }
}
