//! The monitor sees the known failures of few-step students when they are really made, and is silent where there is
//! none; it marks the best weights and resumes to the bit.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, Tensor};
use fewstep_data::image::{Picture, Resize, Size};
use fewstep_models::{Denoiser, LoadOptions, Model, Pipeline, Request, WeightFiles};
use fewstep_report::{Appearance, latent_mse};
use tempfile::TempDir;

use super::fixtures::{
    Bench, ROWS, Recorder, STUDENT_STEPS, TEACHER_CFG_SCALE, TEACHER_STEPS, file_bytes, newest_checkpoint,
    prompt, run, teacher_request, train, write_teacher_data,
};
use crate::Outcome;
use crate::host::to_vec;
use crate::random::{Draw, Purpose};
use crate::recipe::{Recipe, ResultWeights, Task};
use crate::source::SourceRow;

/// Side of the pictures, in px: 4 × 4 tokens of the bundled teacher.
const SIDE_PX: usize = 32;
/// Pictures of each prompt.
const SEEDS: usize = 3;

/// The bundled teacher with a training set, and another for the monitor.
struct Studio(TempDir);

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher")
}

const TRAINED: [&str; 8] = [
    "3d emoji of red apple",
    "flat emoji of cat face",
    "noto emoji of frog",
    "flat emoji of watermelon",
    "noto emoji of pizza",
    "3d emoji of octopus",
    "3d emoji of banana",
    "flat emoji of tiger face",
];
const HELD_OUT: [&str; 4] =
    ["noto emoji of red apple", "3d emoji of dog face", "flat emoji of frog", "3d emoji of pizza"];

impl Studio {
    fn new() -> Self {
        let studio = Self(tempfile::tempdir().unwrap());
        let model = Model::from_pretrained(&(&teacher()).into(), &LoadOptions::default()).unwrap();
        for (name, prompts, first_seed) in [("data", &TRAINED[..], 0), ("held_out", &HELD_OUT, 1000)] {
            let request = |at: usize| Request {
                seed: first_seed + at as u64,
                num_inference_steps: 8,
                cfg_scale: 4.0,
                ..Request::new(prompts[at / SEEDS], SIDE_PX, SIDE_PX)
            };
            let requests: Vec<Request> = (0..SEEDS * prompts.len()).map(request).collect();
            write_teacher_data(&studio.path(name), model.clone(), &requests);
        }
        studio
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn recipe(&self) -> Recipe {
        Recipe {
            model: teacher(),
            dataset_base_path: self.path("data"),
            output_path: self.path("run"),
            batch_size: 6,
            learning_rate: 2e-4,
            max_steps: Some(15),
            monitor_steps: 5,
            monitor_metadata_path: Some(self.path("held_out/metadata.csv")),
            ..Recipe::default()
        }
    }

    /// Replaces each picture to be learned, of which there are no latents then.
    fn retouched(self, change: impl Fn(&Picture) -> Picture) -> Self {
        for row in 0..SEEDS * TRAINED.len() {
            let path = self.path(&format!("data/images/{row}.png"));
            change(&Picture::load(&path).unwrap()).save_png(&path).unwrap();
        }
        fs::remove_dir_all(self.path("data/latents")).unwrap();
        self
    }
}

/// Runs a recipe to its end; returns why it stopped early, if it did.
#[track_caller]
fn stopped_early(recipe: &Recipe) -> Option<String> {
    let mut recorder = Recorder::default();
    assert!(matches!(run(recipe, &mut recorder).unwrap(), Outcome::Finished(_)));
    recorder.messages.into_iter().find(|line| line.starts_with("stopped early"))
}

/// The table of a run's looks without its header, `None` where a cell is empty.
fn looks(recipe: &Recipe) -> Vec<Vec<Option<f64>>> {
    let csv = fs::read_to_string(recipe.output_path.join("monitor.csv")).unwrap();
    let header = "step,paired_error,saturation_ratio,contrast_ratio,sharpness_ratio,diversity_ratio,best\n";
    let rows = csv.strip_prefix(header).unwrap();
    rows.lines().map(|line| line.split(',').map(|cell| cell.parse().ok()).collect()).collect()
}

#[track_caller]
fn assert_stops(studio: &Studio, sign: &str) {
    let reason = stopped_early(&studio.recipe());
    assert!(
        reason.as_ref().is_some_and(|reason| reason.contains(sign)),
        "{reason:?}\n{:?}",
        looks(&studio.recipe())
    );
}

#[test]
fn a_healthy_student_is_left_alone() {
    let studio = Studio::new();
    assert_eq!(stopped_early(&studio.recipe()), None, "{:?}", looks(&studio.recipe()));
}

#[test]
fn a_student_of_one_picture_is_seen_to_collapse() {
    let studio = Studio::new();
    let first = Picture::load(&studio.path("data/images/0.png")).unwrap();
    assert_stops(&studio.retouched(|_| first.clone()), "pictures collapse into one");
}

#[test]
fn a_student_of_gaudy_pictures_is_seen_to_be_over_saturated() {
    let gaudy = |picture: &Picture| {
        let mut gaudy = picture.clone();
        for pixel in gaudy.rgb.chunks_exact_mut(3) {
            let mean = pixel.iter().map(|level| f32::from(*level)).sum::<f32>() / 3.0;
            pixel.iter_mut().for_each(|level| *level = (mean + 4.0 * (f32::from(*level) - mean)) as u8);
        }
        gaudy
    };
    assert_stops(&Studio::new().retouched(gaudy), "colours are over-saturated");
}

/// What a student draws that cannot resolve its targets: their local means.
#[test]
fn a_student_of_averaged_pictures_is_seen_to_blur() {
    let averaged = |picture: &Picture| {
        picture.crop_and_resize(Size { height: 8, width: 8 }).crop_and_resize(picture.size())
    };
    assert_stops(&Studio::new().retouched(averaged), "pictures are blurred");
}

/// Six rows to train on and prompts of their own for the monitor, whose teacher draws all but the first seed.
fn watched(bench: &Bench) -> Recipe {
    let requests: Vec<Request> = ["green pear", "a cat"]
        .iter()
        .zip(1000..)
        .map(|(prompt, seed)| Request { prompt: (*prompt).into(), seed, ..teacher_request(0) })
        .collect();
    write_teacher_data(&bench.path("held_out"), bench.model(), &requests);
    Recipe {
        monitor_steps: 2,
        monitor_metadata_path: Some(bench.path("held_out/metadata.csv")),
        teacher_num_inference_steps: Some(TEACHER_STEPS),
        teacher_cfg_scale: Some(TEACHER_CFG_SCALE.into()),
        keep: 1,
        ..bench.recipe()
    }
}

/// The first look is at the untrained student: the same model, noise and prompts as in the pipeline.
#[test]
fn a_look_compares_the_students_pictures_with_the_teachers_of_the_same_noise() {
    let bench = Bench::new().with_teacher_data();
    let recipe = watched(&bench);
    train(&recipe);
    let drawn = WeightFiles::open(&recipe.output_path.join("monitor/teacher.safetensors")).unwrap();
    assert_eq!(drawn.keys().count(), 2 * (recipe.monitor_seeds - 1));
    let mut seeds: Vec<(String, u64)> = vec![("green pear".into(), 1000), ("a cat".into(), 1001)];
    for key in drawn.keys() {
        let (place, prompt) = key.split_once(": ").unwrap();
        seeds.push((prompt.into(), place.rsplit_once(' ').unwrap().1.parse().unwrap()));
    }

    let pipeline = Pipeline::new(bench.model(), Device::flex());
    let request = |(prompt, seed): &(String, u64)| Request {
        prompt: prompt.clone(),
        seed: *seed,
        ..teacher_request(0)
    };
    let teacher: Vec<Request> = seeds.iter().map(request).collect();
    let few =
        |request: &Request| Request { num_inference_steps: STUDENT_STEPS, cfg_scale: 1.0, ..request.clone() };
    let student: Vec<Request> = teacher.iter().map(few).collect();
    let [teacher, student] = [teacher, student].map(|requests| pipeline.generate_batch(&requests).unwrap());
    let errors = teacher.iter().zip(&student).map(|(teacher, student)| {
        latent_mse(&to_vec(student.latents.clone()), &to_vec(teacher.latents.clone()))
    });
    let expected = errors.sum::<f64>() / seeds.len() as f64;
    let [sharpness, reference] = [student, teacher].map(|drawn| {
        let pictures: Vec<Picture> = drawn.into_iter().map(|drawn| drawn.picture().clone()).collect();
        Appearance::of(&pictures).unwrap().sharpness
    });
    let first = looks(&recipe)[0].clone();
    assert_eq!(first[0], Some(0.0));
    let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-3 * expected;
    assert!(close(first[1], expected), "paired error {:?}, expected {expected}", first[1]);
    // The monitor adds half a level to both, against pictures without any.
    assert!(
        close(first[4], sharpness / reference),
        "sharpness {:?}, expected {}",
        first[4],
        sharpness / reference
    );
}

#[test]
fn a_resumed_monitor_equals_an_uninterrupted_one_to_the_bit() {
    let bench = Bench::new().with_teacher_data();
    let whole = Recipe { max_steps: Some(7), ema_decay: 0.5, save_steps: Some(3), ..watched(&bench) };
    train(&whole);
    let parts = Recipe { output_path: bench.path("parts"), ..whole.clone() };
    for last in [1, 2, 5] {
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { stop: Some((last, &stop)), ..Recorder::default() };
        assert_eq!(run(&parts, &mut recorder).unwrap(), Outcome::Stopped(last));
    }
    // As after a kill: a look that no checkpoint knows of is made again.
    fs::write(parts.output_path.join("monitor.csv"), "step\n6,").unwrap();
    train(&parts);
    assert!(newest_checkpoint(&whole) == newest_checkpoint(&parts), "checkpoints differ");
    for name in ["monitor.csv", "monitor/teacher.safetensors", "checkpoints/best.json"] {
        let bytes = |recipe: &Recipe| fs::read(recipe.output_path.join(name)).unwrap();
        assert!(bytes(&whole) == bytes(&parts), "{name} differs");
    }
    let events = |recipe: &Recipe| file_bytes(&recipe.output_path.join("tensorboard/monitor"))[0].1.len();
    assert_eq!(events(&whole), events(&parts));
    let steps: Vec<_> = looks(&whole).iter().map(|look| look[0].unwrap()).collect();
    assert_eq!(steps, [0.0, 2.0, 4.0, 6.0]);
}

#[test]
fn a_run_that_turns_bad_ends_early_with_its_best_weights() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe { max_steps: Some(4), monitor_patience: 2, ..watched(&bench) };
    train(&recipe);
    // From here on the targets are others, and the looks get worse.
    fs::remove_dir_all(bench.path("data/latents")).unwrap();
    for row in 0..ROWS {
        let (side, level) = (super::fixtures::SIDE_PX, 255 * (row % 2) as u8);
        let picture = Picture { width: side, height: side, rgb: vec![level; 3 * side * side] };
        picture.save_png(&bench.path(&format!("data/images/{row}.png"))).unwrap();
    }
    let longer = Recipe { max_steps: Some(100), ..recipe.clone() };
    let reason = stopped_early(&longer).unwrap();
    let best: serde_json::Value =
        serde_json::from_slice(&fs::read(recipe.output_path.join("checkpoints/best.json")).unwrap()).unwrap();
    let step = best["step"].as_u64().unwrap();
    assert!(
        reason.starts_with(&format!("stopped early at step {}: no better pictures", step + 4)),
        "{reason}"
    );
    let marked: Vec<Option<f64>> =
        looks(&longer).iter().filter(|look| look[6] == Some(1.0)).map(|look| look[0]).collect();
    assert_eq!(marked.last(), Some(&Some(step as f64)));

    let result = recipe.output_path.join("model/transformer");
    let values = |path: &Path, key: &str| WeightFiles::open(path).unwrap().read(key).unwrap().1;
    let checkpoint = |step: u64| {
        let path = recipe.output_path.join(format!("checkpoints/step-{step:08}/weights.safetensors"));
        values(&path, "transformer.img_in.weight")
    };
    assert!(values(&result, "img_in.weight") == checkpoint(step), "not the best weights");
    let info = fewstep_models::read_info(&result.join("diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(info["fewstep.training_steps"], step.to_string());

    // Asked again it stays stopped; asked for the last weights it gives those.
    assert_eq!(stopped_early(&longer), Some(reason));
    stopped_early(&Recipe { result: ResultWeights::Last, ..longer });
    assert!(values(&result, "img_in.weight") == checkpoint(step + 4), "not the last weights");
}

/// L = mean over levels of mean (v − (e − x0))², from the same draws in plain numbers; pictures against the real ones.
#[test]
fn without_a_teacher_the_error_is_that_of_the_velocity_on_held_out_pictures() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe {
        task: Task::Sft,
        monitor_steps: 1,
        monitor_rows: 1,
        max_steps: Some(1),
        sample_num_inference_steps: Some(2),
        ..bench.recipe()
    };
    train(&recipe);
    let rows = super::fixtures::rows(&recipe, RESIZE).unwrap();
    let kept = crate::monitor::training_rows(&recipe, rows.clone()).unwrap();
    let held_out = (0..ROWS).find(|row| !kept.iter().any(|kept| kept.prompt == prompt(*row))).unwrap();

    let model = bench.model();
    let picture = Picture::load(&bench.path(&format!("data/{held_out}.png"))).unwrap();
    let pixels = Tensor::<1>::from_floats(picture.to_pixels().as_slice(), &Device::flex());
    let clean = model.encode_images(pixels.reshape([1, 3, picture.height, picture.width]), 1);
    let shape = clean.dims();
    let seed = Draw { seed: recipe.seed, epoch: 0, row: 0 }.seed(Purpose::Picture);
    let noise = fewstep_flow::noise::latent_noise(seed, shape, &Device::flex());
    let condition = model.encode_prompts(&[prompt(held_out)]).unwrap();
    let (clean, noise) = (to_vec(clean), to_vec(noise));
    let mut expected = 0.0;
    for sigma in [0.125_f32, 0.375, 0.625, 0.875] {
        let mixed: Vec<f32> = clean.iter().zip(&noise).map(|(x, e)| (1.0 - sigma) * x + sigma * e).collect();
        let tensor = |values: &[f32]| Tensor::<1>::from_floats(values, &Device::flex());
        let velocity = model.velocity(tensor(&mixed).reshape(shape), tensor(&[sigma]), &condition);
        let target: Vec<f32> = clean.iter().zip(&noise).map(|(x, e)| e - x).collect();
        expected += latent_mse(&to_vec(velocity), &target) / 4.0;
    }
    let first = looks(&recipe)[0].clone();
    assert!(
        (first[1].unwrap() - expected).abs() < 1e-4 * expected,
        "found {:?}, expected {expected}",
        first[1]
    );
    // One picture has nothing to differ from.
    assert_eq!(first[5], None);
}

const RESIZE: Resize = Resize::Exact { height: super::fixtures::SIDE_PX, width: super::fixtures::SIDE_PX };

#[test]
fn held_out_prompts_are_never_trained_on_and_follow_from_the_seed() {
    let bench = Bench::new().with_teacher_data();
    let prompts = |rows: &[SourceRow]| -> Vec<String> { rows.iter().map(|row| row.prompt.clone()).collect() };
    let trained = |seed, monitor_rows, monitor_steps| {
        let recipe = Recipe { seed, monitor_rows, monitor_steps, ..bench.recipe() };
        crate::monitor::training_rows(&recipe, super::fixtures::rows(&recipe, RESIZE).unwrap())
    };
    assert_eq!(trained(1, 2, 0).unwrap().len(), ROWS);
    let first = prompts(&trained(1, 2, 5).unwrap());
    assert_eq!(first.len(), ROWS - 2);
    assert_eq!(prompts(&trained(1, 2, 5).unwrap()), first);
    assert!((2..9).any(|seed| prompts(&trained(seed, 2, 5).unwrap()) != first), "the seed chooses nothing");
    let error = trained(1, ROWS, 5).err().unwrap().to_string();
    assert!(error.contains("monitor_rows is 6") && error.contains("fewer than"), "{error}");
}

#[test]
fn an_online_teachers_run_is_watched_too() {
    let bench = Bench::new().with_teacher_data();
    let recipe = Recipe {
        online_teacher: true,
        teacher_num_inference_steps: Some(TEACHER_STEPS),
        num_inference_steps: STUDENT_STEPS,
        monitor_steps: 3,
        monitor_rows: 2,
        lora_base_model: Some("transformer".into()),
        ..bench.recipe()
    };
    train(&recipe);
    let looks = looks(&recipe);
    assert_eq!(looks.iter().map(|look| look[0].unwrap()).collect::<Vec<_>>(), [0.0, 3.0, 6.0]);
    let drawn = WeightFiles::open(&recipe.output_path.join("monitor/teacher.safetensors")).unwrap();
    assert_eq!(drawn.keys().count(), 2 * recipe.monitor_seeds);
}

#[test]
fn a_monitor_that_cannot_be_is_refused() {
    let bench = Bench::new().with_teacher_data();
    let says = |recipe: Recipe, part: &str| {
        let error = super::fixtures::fail(&recipe);
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    };
    let split = Recipe { task: Task::DirectDistillTrain, monitor_steps: 2, ..bench.recipe() };
    says(split, "monitor_steps is 2, expected 0 where a task is split in two");
    let path = Some(bench.path("data/metadata.csv"));
    says(Recipe { monitor_metadata_path: path, ..bench.recipe() }, "given without monitor_steps");
    says(
        Recipe { monitor_max_drift: 0.7, ..bench.recipe() },
        "monitor_max_drift is 0.7, expected 0, or a multiple",
    );
    says(
        Recipe { rollback_lr_factor: 0.0, ..bench.recipe() },
        "rollback_lr_factor is 0, expected more than 0",
    );
}
