//! The training loop: batches → method → gradients → optimiser, with logs, samples and checkpoints on the way.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use fewstep_data::image::Resize;
use fewstep_models::{Components, LoadOptions, Model, ModelSource};

use crate::batch::{Batch, Plan};
use crate::checkpoint::{Checkpoints, Progress};
use crate::dataset::{Dataset, Preparation};
use crate::learning_rate::LearningRate;
use crate::log::{Log, LogLine};
use crate::method::{GradientSum, Method};
use crate::observer::{Event, Observer, Started};
use crate::peer_output::{self, PeerFile};
use crate::provenance::DataFile;
use crate::recipe::{InitialWeights, Objective, OutputLayout, Recipe, Stage};
use crate::samples::Samples;
use crate::state::State;
use crate::trainable::{Trainable, with_preset};
use crate::{TrainError, output, processed, provenance, run_folder, source};

/// What a run needs beside its recipe.
pub struct Context<'a> {
    /// The model to train, where it is not the folder [`Recipe::model`]: what the recipe's other keys of a model name,
    /// with files downloaded.
    pub model: Option<ModelSource>,
    /// Where to train; its plain side.
    pub device: Device,
    /// Set from outside to finish the step, save and return.
    pub stop: &'a AtomicBool,
    /// Program, version and commit, for the files that name their origin.
    pub version: &'a str,
}

impl Context<'_> {
    fn source(&self, recipe: &Recipe) -> ModelSource {
        self.model.clone().unwrap_or_else(|| ModelSource::from(&recipe.model))
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done; the trained weights are in this file or folder.
    Finished(PathBuf),
    /// It was stopped after this many steps and continues when started again.
    Stopped(u64),
}

/// Trains as the recipe says, or continues the run its folder holds.
///
/// # Errors
/// If the recipe, the data, the model or the folder is not as it should be, or the run diverges.
pub fn run(
    recipe: &Recipe,
    context: Context<'_>,
    observer: &mut dyn Observer,
) -> Result<Outcome, TrainError> {
    recipe.validate()?;
    if recipe.task.stage() == Stage::DataProcess {
        return process(recipe, &context, observer);
    }
    let (mut run, mut state) = Run::prepare(recipe, &context, observer)?;
    observer.on(Event::Started(run.started(&state)));
    while state.progress.step < run.total_steps {
        state = run.step(state, observer)?;
        run.write_peer_file(&state, context.version)?;
        let stopped = context.stop.load(Ordering::Relaxed);
        let done = state.progress.step == run.total_steps;
        if stopped || done || is_due(recipe.checkpoint_steps(), state.progress.step) {
            observer.on(Event::Checkpoint(&run.checkpoints.save(state.snapshot())?));
        }
        if stopped && !done {
            return Ok(Outcome::Stopped(state.progress.step));
        }
    }
    let result = match recipe.output_layout {
        OutputLayout::Fewstep => {
            output::write(&run.origin(context.version), state.averaged(), state.progress.step)?
        }
        OutputLayout::Diffsynth => run.last_peer_file(),
    };
    observer.on(Event::Finished(&result));
    Ok(Outcome::Finished(result))
}

/// The first half of a split task: encodes the data set and writes it.
fn process(
    recipe: &Recipe,
    context: &Context<'_>,
    observer: &mut dyn Observer,
) -> Result<Outcome, TrainError> {
    run_folder::check(recipe)?;
    let model = load_model(recipe, context)?;
    let data = load_data(recipe, context, &model, true)?;
    observer.on(Event::Message(format!("encoded {} rows", data.len())));
    run_folder::write(recipe, context.version)?;
    let folder = processed::write(recipe, &context.source(recipe), &data, context.version)?;
    observer.on(Event::Finished(&folder));
    Ok(Outcome::Finished(folder))
}

/// The model of a recipe, with the parts its task needs.
fn load_model(recipe: &Recipe, context: &Context<'_>) -> Result<Model, TrainError> {
    if recipe.initial_weights == InitialWeights::Random {
        return Ok(Model::random(&context.source(recipe), recipe.seed, &context.device)?);
    }
    let options = LoadOptions {
        device: context.device.clone(),
        conventions: recipe.conventions(),
        dtype: recipe.dtype.into(),
        components: components(recipe),
    };
    Ok(Model::from_pretrained(&context.source(recipe), &options)?)
}

/// The parts of the model that a recipe's task needs.
pub(crate) fn components(recipe: &Recipe) -> Components {
    match recipe.task.stage() {
        _ if recipe.initial_weights == InitialWeights::Random => Components::All,
        Stage::Train => Components::Denoiser,
        Stage::DataProcess => Components::Encoders,
        Stage::Whole => Components::All,
    }
}

fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// What stays the same from step to step.
struct Run<'a> {
    recipe: &'a Recipe,
    source: ModelSource,
    device: Device,
    data: Dataset,
    plan: Plan,
    method: Method,
    learning_rate: LearningRate,
    total_steps: u64,
    samples: Option<Samples>,
    checkpoints: Checkpoints,
    log: Log,
    /// What the data was when the run began or was continued.
    data_file: Option<DataFile>,
    /// Samples and time since the last line of the log.
    window: (usize, Instant),
}

impl<'a> Run<'a> {
    /// Loads everything and finds where to continue. The folder is touched only when all of it is there.
    fn prepare(
        recipe: &'a Recipe,
        context: &Context<'_>,
        observer: &mut dyn Observer,
    ) -> Result<(Self, State), TrainError> {
        run_folder::check(recipe)?;
        let start = with_preset(load_model(recipe, context)?, recipe)?;
        let trainable = Trainable::new(recipe, &start)?;
        let data = load_data(recipe, context, &start, !trainable.trains_text_encoder())?;
        if let Trainable::Lora(config) = &trainable
            && recipe.finds_lora_targets()
        {
            let layers = config.target_modules.join(", ");
            observer.on(Event::Message(format!("adapters are attached to {layers}")));
        }
        let method = Method::new(recipe, &start);
        let model = trainable.prepare(start, recipe)?;
        run_folder::write(recipe, context.version)?;
        let checkpoints = Checkpoints::new(&recipe.output_path, recipe.keep);
        let state = State::prepare(recipe, model, &checkpoints, observer)?;
        let plan = Plan::new(recipe, &data);
        let total_steps = plan.total_steps(recipe);
        let run = Self {
            recipe,
            source: context.source(recipe),
            device: context.device.clone(),
            learning_rate: LearningRate::new(recipe, total_steps),
            samples: Samples::new(recipe, data.groups()[0].size)?,
            log: Log::open(&recipe.output_path, state.progress.step, recipe.output_layout)?,
            window: (0, Instant::now()),
            data_file: DataFile::of(recipe)?,
            data,
            plan,
            method,
            total_steps,
            checkpoints,
        };
        Ok((run, state))
    }

    fn started(&self, state: &State) -> Started {
        let (trained_parameters, parameters) = state.count();
        Started {
            first_step: state.progress.step,
            total_steps: self.total_steps,
            steps_per_epoch: self.plan.steps_per_epoch,
            rows: self.data.len(),
            trained_parameters,
            parameters,
        }
    }

    /// One optimiser step with the log line and the samples due after it.
    fn step(&mut self, state: State, observer: &mut dyn Observer) -> Result<State, TrainError> {
        let learning_rate = self.learning_rate.at(state.progress.step);
        let (sum, loss, samples) = self.gradients(&state)?;
        let (mut state, norm) = state.update(sum, loss, learning_rate, observer)?;
        let step = state.progress.step;
        self.window.0 += samples;
        observer.on(Event::Step { step, loss, learning_rate, samples });
        if is_due(self.recipe.log_steps, step) || step == self.total_steps {
            let line = self.log_line(&mut state.progress, norm, learning_rate);
            self.log.write(&line)?;
            observer.on(Event::Logged(line));
        }
        if is_due(self.recipe.sample_steps, step) {
            self.draw_samples(&state, observer)?;
        }
        Ok(state)
    }

    /// The gradient of the mean loss over all samples of the next step, that loss, and their number.
    fn gradients(&mut self, state: &State) -> Result<(GradientSum, f64, usize), TrainError> {
        let step = state.progress.step;
        let batches = self.plan.step(step);
        let samples: usize = batches.iter().map(|planned| planned.positions.len()).sum();
        let (mut sum, mut loss) = (GradientSum::default(), 0.0);
        for planned in &batches {
            let (seed, epoch) = (self.recipe.seed, self.plan.epoch_of(step));
            let batch = Batch { data: &self.data, planned, seed, epoch };
            let share = batch.len() as f64 / samples as f64;
            loss += share * self.method.step(&state.model, &batch, share as f32, &mut sum)?;
        }
        Ok((sum, loss, samples))
    }

    /// The peer's file of a step, if the run leaves such files and one is due.
    fn write_peer_file(&self, state: &State, version: &str) -> Result<(), TrainError> {
        let step = state.progress.step;
        if self.recipe.output_layout == OutputLayout::Fewstep {
            return Ok(());
        }
        if let Some(name) = self.peer_file(step) {
            let info = self.origin(version).info(&state.model, step)?;
            PeerFile { recipe: self.recipe, model: &state.model, info }.write(&name, state.trained())?;
        }
        Ok(())
    }

    /// Name of the peer's file of a step, if one is due.
    fn peer_file(&self, step: u64) -> Option<String> {
        peer_output::due(self.recipe, step, (self.plan.steps_per_epoch, self.total_steps))
    }

    fn last_peer_file(&self) -> PathBuf {
        self.recipe.output_path.join(self.peer_file(self.total_steps).expect("the last step leaves a file"))
    }

    /// Its time is taken out of the rate that the log shows.
    fn draw_samples(&mut self, state: &State, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(samples) = &self.samples else { return Ok(()) };
        let began = Instant::now();
        observer.on(Event::Samples(&samples.draw(state.averaged(), &self.device, state.progress.step)?));
        self.window.1 += began.elapsed();
        Ok(())
    }

    /// The line that sums up the steps since the one before.
    fn log_line(&mut self, progress: &mut Progress, gradient_norm: f64, learning_rate: f64) -> LogLine {
        let losses = std::mem::take(&mut progress.losses);
        let (samples, since) = std::mem::replace(&mut self.window, (0, Instant::now()));
        LogLine {
            step: progress.step,
            epoch: self.plan.epoch_of(progress.step - 1),
            loss: losses.iter().sum::<f64>() / losses.len() as f64,
            gradient_norm,
            learning_rate,
            samples_per_sec: samples as f64 / since.elapsed().as_secs_f64(),
        }
    }

    fn origin<'b>(&'b self, version: &'b str) -> output::Origin<'b> {
        output::Origin {
            recipe: self.recipe,
            source: &self.source,
            groups: self.data.groups(),
            rand_devices: self.data.rand_devices(),
            data: self.data_file.as_ref(),
            version,
        }
    }
}

/// Checks that the data belongs to the run, then loads it.
fn load_data(
    recipe: &Recipe,
    context: &Context<'_>,
    model: &Model,
    keep_text: bool,
) -> Result<Dataset, TrainError> {
    let device = &context.device;
    if recipe.task.stage() == Stage::Train {
        return Dataset::read(recipe, model, device);
    }
    if recipe.task.objective() == Objective::Distillation && !recipe.online_teacher {
        provenance::check(recipe, &context.source(recipe), model)?;
    }
    let resize = resize(recipe, model.division_factor());
    let base = &recipe.dataset_base_path;
    Dataset::prepare(&source::rows(recipe, resize)?, Preparation { model, device, resize, base, keep_text })
}

/// The size rule of a recipe's pictures.
pub(crate) fn resize(recipe: &Recipe, division: usize) -> Resize {
    match (recipe.height, recipe.width) {
        (Some(height), Some(width)) => Resize::Exact { height, width },
        _ => Resize::MaxPixels { max_pixels: recipe.max_pixels, division },
    }
}
