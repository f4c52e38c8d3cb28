//! A tiny model folder, small data sets, and a recipe that uses them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::{Picture, Resize};
use fewstep_data::metadata::{
    CaptionedRow, DistillRow, Media, RandDevice, write_captioned_csv, write_distill_csv,
};
use fewstep_models::{
    Generated, LoadOptions, Model, ModelSource, NamedVisitor, Pipeline, Request, WeightType, save_tensors,
    visit_named,
};
use fewstep_testkit::{random_values, write_tiny_configs};
use tempfile::TempDir;

use crate::batch::{Batch, Planned};
use crate::dataset::{Dataset, Preparation, Survey};
use crate::host::to_vec;
use crate::source::{Fit, SourceRow};
use crate::{Context, Event, Observer, Outcome, Recipe, TrainError};

/// Side of every picture, in px: 2 × 2 tokens of the tiny model.
pub(super) const SIDE_PX: usize = 16;
/// Rows of every data set.
pub(super) const ROWS: usize = 6;

/// A temporary folder with `model/`, and data sets on request.
pub(super) struct Bench {
    pub(super) folder: TempDir,
}

impl Bench {
    /// A folder with a model of random weights, none of them zero.
    pub(super) fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let configs = bench.path("configs");
        write_tiny_configs(&configs);
        let source = ModelSource::from(&configs);
        let model = perturbed(Model::random(&source, 1, &Device::flex()).unwrap());
        model.save_pretrained(&source, &bench.path("model"), WeightType::F32, &Default::default()).unwrap();
        bench
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn model(&self) -> Model {
        Model::from_pretrained(&(&self.path("model")).into(), &LoadOptions::default()).unwrap()
    }

    /// Pictures with captions.
    pub(super) fn with_pictures(self) -> Self {
        let base = self.path("data");
        let rows: Vec<CaptionedRow> =
            (0..ROWS).map(|row| CaptionedRow::of_image(format!("{row}.png"), prompt(row))).collect();
        for (at, row) in rows.iter().enumerate() {
            let rgb = random_values(3 * SIDE_PX * SIDE_PX, at as u64)
                .iter()
                .map(|x| (128.0 + 40.0 * x) as u8)
                .collect();
            Picture { width: SIDE_PX, height: SIDE_PX, rgb }.save_png(&base.join(&row.file)).unwrap();
        }
        write_captioned_csv(&base.join("metadata.csv"), &rows).unwrap();
        self
    }

    /// The model's own 8-step pictures, for a student of 3 steps.
    pub(super) fn with_teacher_data(self) -> Self {
        let requests: Vec<Request> = (0..ROWS).map(teacher_request).collect();
        write_teacher_data(&self.path("data"), self.model(), &requests);
        self
    }

    /// A run of six steps on this bench's data.
    pub(super) fn recipe(&self) -> Recipe {
        Recipe {
            model: self.path("model"),
            dataset_base_path: self.path("data"),
            output_path: self.path("run"),
            height: Some(SIDE_PX),
            width: Some(SIDE_PX),
            batch_size: 2,
            learning_rate: 1e-3,
            max_steps: Some(6),
            log_steps: 1,
            seed: 5,
            lora_rank: 4,
            ..Recipe::default()
        }
    }
}

pub(super) fn prompt(row: usize) -> String {
    ["red apple", "a dog", "", "猫", "noto emoji of sun", "flat emoji of a very small house"][row % 6].into()
}

/// The teacher's settings, which the online teacher's tests repeat.
pub(super) const TEACHER_STEPS: usize = 8;
pub(super) const TEACHER_CFG_SCALE: f32 = 2.0;
pub(super) const STUDENT_STEPS: usize = 3;

pub(super) fn teacher_request(row: usize) -> Request {
    Request {
        seed: 100 + row as u64,
        num_inference_steps: TEACHER_STEPS,
        cfg_scale: TEACHER_CFG_SCALE,
        ..Request::new(prompt(row), SIDE_PX, SIDE_PX)
    }
}

/// A model's pictures as `generate` writes them, for a student of [`STUDENT_STEPS`].
pub(super) fn write_teacher_data(base: &Path, model: Model, requests: &[Request]) {
    let pictures = Pipeline::new(model, Device::flex()).generate_batch(requests).unwrap();
    let rows: Vec<DistillRow> = requests.iter().enumerate().map(distill_row).collect();
    for (row, generated) in rows.iter().zip(&pictures) {
        generated.save(base.join(&row.file)).unwrap();
        save_latents(base, &row.file, generated);
    }
    write_distill_csv(&base.join("metadata.csv"), &rows).unwrap();
}

fn distill_row((at, request): (usize, &Request)) -> DistillRow {
    DistillRow {
        media: Media::Image,
        file: format!("images/{at}.png"),
        prompt: request.prompt.clone(),
        seed: request.seed,
        rand_device: RandDevice::Cpu,
        num_inference_steps: STUDENT_STEPS,
        cfg_scale: 1.0,
        embedded_guidance: None,
        num_frames: None,
    }
}

/// As `generate` writes them.
fn save_latents(base: &Path, image: &str, generated: &Generated) {
    let stem = Path::new(image).file_stem().unwrap().to_string_lossy().into_owned();
    let latents = generated.latents.clone().squeeze_dim::<3>(0);
    let text = generated.condition.text.clone().squeeze_dim::<2>(0);
    let mut tensors = vec![
        ("latents".to_owned(), latents.dims().to_vec(), to_vec(latents)),
        ("text".to_owned(), text.dims().to_vec(), to_vec(text)),
    ];
    if let Some(pooled) = generated.condition.pooled.clone() {
        tensors.push(("pooled".to_owned(), vec![pooled.dims()[1]], to_vec(pooled)));
    }
    let path = base.join(format!("latents/{stem}.safetensors"));
    save_tensors(&path, tensors, WeightType::F32, &Default::default()).unwrap();
}

/// Adds noise to every parameter: a fresh model has zeros where gradients would vanish.
fn perturbed(model: Model) -> Model {
    let values: std::collections::BTreeMap<String, Vec<f32>> = all_values(&model)
        .into_iter()
        .enumerate()
        .map(|(at, (name, values))| {
            let noise = random_values(values.len(), at as u64);
            (name, values.iter().zip(noise).map(|(value, noise)| value + 0.05 * noise).collect())
        })
        .collect();
    crate::host::with_parameters(model, |name| values.get(name).map(Vec::as_slice))
}

/// Every parameter in the model's order.
pub(super) fn all_values(model: &Model) -> Vec<(String, Vec<f32>)> {
    struct All(Vec<(String, Vec<f32>)>);
    impl NamedVisitor for All {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            self.0.push((name.to_owned(), to_vec(parameter.val().inner())));
        }
    }
    let mut all = All(Vec::new());
    visit_named(model, &mut all);
    all.0
}

/// Keeps what a run says; asks it to stop after a step, if given.
#[derive(Default)]
pub(super) struct Recorder<'a> {
    pub(super) losses: Vec<f64>,
    pub(super) rates: Vec<f64>,
    pub(super) messages: Vec<String>,
    pub(super) stop: Option<(u64, &'a AtomicBool)>,
}

impl Observer for Recorder<'_> {
    fn on(&mut self, event: Event<'_>) {
        match event {
            Event::Step { step, loss, learning_rate, .. } => {
                self.losses.push(loss);
                self.rates.push(learning_rate);
                if let Some((last, stop)) = self.stop
                    && step == last
                {
                    stop.store(true, std::sync::atomic::Ordering::Relaxed);
                }
            }
            Event::Message(message) => self.messages.push(message),
            _ => {}
        }
    }
}

/// Runs a recipe to its end; returns its losses and where the result is.
#[track_caller]
pub(super) fn train(recipe: &Recipe) -> (Vec<f64>, PathBuf) {
    let mut recorder = Recorder::default();
    match run(recipe, &mut recorder).unwrap() {
        Outcome::Finished(path) => (recorder.losses, path),
        Outcome::Stopped(step) => panic!("stopped at step {step}"),
    }
}

/// Runs a recipe that fails; returns its error as a person sees it.
#[track_caller]
pub(super) fn fail(recipe: &Recipe) -> String {
    run(recipe, &mut Recorder::default()).unwrap_err().to_string()
}

/// The rows of a recipe, whose pictures have the size that a rule gives them.
pub(super) fn rows(recipe: &Recipe, resize: Resize) -> Result<Vec<SourceRow>, TrainError> {
    crate::source::rows(recipe, Fit { resize, ..Fit::of(recipe, None) })
}

/// A recipe's data set as a run has it, encoded in memory.
pub(super) fn dataset(recipe: &Recipe, model: &Model, resize: Resize) -> Dataset {
    let fit = Fit { resize, ..Fit::of(recipe, Some(model)) };
    let preparation = Preparation {
        model,
        source: &ModelSource::from(&recipe.model),
        device: &Device::flex(),
        fit,
        base: &recipe.dataset_base_path,
        keep_text: true,
        cache: Path::new("nowhere"),
        memory_bytes: usize::MAX,
        workers: 0,
        stop: &AtomicBool::new(false),
    };
    let rows = crate::source::rows(recipe, fit).unwrap();
    Survey::of(&rows, preparation).unwrap().encode().unwrap().unwrap()
}

/// A batch with what it needs.
pub(super) fn read(data: &Dataset, planned: Planned, seed: u64) -> Batch<'_> {
    let read = data.reading(&planned.positions)().unwrap();
    Batch::new(data, planned, seed, read)
}

pub(super) fn run(recipe: &Recipe, recorder: &mut Recorder<'_>) -> Result<Outcome, TrainError> {
    let never = AtomicBool::new(false);
    let stop = recorder.stop.map_or(&never, |(_, stop)| stop);
    let context = Context { model: None, device: Device::flex(), stop, version: "a test" };
    crate::run(recipe, context, recorder)
}

/// The bytes of every file in a folder, by path.
pub(super) fn file_bytes(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
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

/// Weights, optimiser state, averages and progress of the newest checkpoint.
pub(super) fn newest_checkpoint(recipe: &Recipe) -> Vec<Vec<u8>> {
    let folders = fs::read_dir(recipe.output_path.join("checkpoints")).unwrap();
    let last = folders.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).max().unwrap();
    file_bytes(&last).into_iter().map(|(_, bytes)| bytes).collect()
}
