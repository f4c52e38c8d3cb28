//! The training loop: batches → method → gradients → optimiser, with logs, samples and checkpoints on the way.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use fewstep_models::{Components, LoadOptions, Model, ModelSource};

use crate::checkpoint::{Checkpoints, Progress};
use crate::dataset::{Dataset, Preparation, Survey};
use crate::journal::Journal;
use crate::learning_rate::LearningRate;
use crate::loader::Loader;
use crate::log::{Log, LogLine};
use crate::method::{GradientSum, Method};
use crate::monitor::{HeldOut, Monitor, training_rows};
use crate::observer::{Event, Observer, Started};
use crate::peer_output::{self, PeerFile};
use crate::provenance::DataFile;
use crate::recipe::{InitialWeights, Objective, OutputLayout, Recipe, Stage};
use crate::run_folder::RunFolder;
use crate::samples::Samples;
use crate::source::Fit;
use crate::state::State;
use crate::trainable::{Trainable, with_preset};
use crate::{TrainError, guard, output, processed, provenance, source};

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
    let folder = RunFolder::claim(recipe)?;
    if recipe.task.stage() == Stage::DataProcess {
        return process(recipe, &context, &folder, observer);
    }
    let mut journal = Journal::new(observer, context.version);
    let outcome = train(recipe, &context, &folder, &mut journal);
    journal.end(&outcome);
    outcome
}

fn train(
    recipe: &Recipe,
    context: &Context<'_>,
    folder: &RunFolder,
    observer: &mut Journal<'_>,
) -> Result<Outcome, TrainError> {
    let Some((mut run, mut state)) = Run::prepare(recipe, context, folder, observer)? else {
        return Ok(Outcome::Stopped(Checkpoints::new(recipe).newest_step()?));
    };
    observer.on(Event::Started(run.started(&state)));
    run.draw_first_samples(&state, observer)?;
    run.look(&mut state, observer)?;
    while !run.is_over(&state) {
        observer.begin_step(state.progress.step + 1);
        state = run.step(state, observer)?;
        observer.check()?;
        run.write_peer_file(&state, context.version)?;
        let stopped = context.stop.load(Ordering::Relaxed);
        let done = run.is_over(&state);
        let wanted = run.wants_checkpoint(&state.progress);
        if wanted {
            state.progress.guard.saved = Some(state.progress.step);
        }
        if wanted || stopped || done {
            observer.on(Event::Checkpoint(&run.save(&state)?));
        }
        if stopped && !done {
            return Ok(Outcome::Stopped(state.progress.step));
        }
    }
    let result = run.write_result(state, context.version, observer)?;
    observer.on(Event::Finished(&result));
    Ok(Outcome::Finished(result))
}

/// The first half of a split task: encodes the data set and writes it.
fn process(
    recipe: &Recipe,
    context: &Context<'_>,
    folder: &RunFolder,
    observer: &mut dyn Observer,
) -> Result<Outcome, TrainError> {
    let source = context.source(recipe);
    let model = load_model(recipe, &source, &context.device)?;
    let cache = folder.cache();
    let preparation = preparation(recipe, context, (&model, &source, &cache));
    let survey = survey(recipe, preparation)?;
    folder.write_recipe(recipe, context.version)?;
    let Some(data) = survey.encode()? else { return Ok(Outcome::Stopped(0)) };
    observer.on(Event::Message(format!("encoded {} rows", data.len())));
    let written = processed::write(recipe, &source, &data, context.version)?;
    folder.remove_cache()?;
    observer.on(Event::Finished(&written));
    Ok(Outcome::Finished(written))
}

/// The model of a recipe, with the parts its task needs.
fn load_model(recipe: &Recipe, source: &ModelSource, device: &Device) -> Result<Model, TrainError> {
    if recipe.initial_weights == InitialWeights::Random {
        return Ok(Model::random(source, recipe.seed, device)?.stored_in(recipe.dtype.into()));
    }
    let options = LoadOptions {
        device: device.clone(),
        conventions: recipe.conventions(),
        dtype: recipe.dtype.into(),
        components: components(recipe),
    };
    Ok(Model::from_pretrained(source, &options)?)
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
    loader: Loader<'a>,
    method: Method,
    learning_rate: LearningRate,
    total_steps: u64,
    samples: Option<Samples>,
    monitor: Option<Monitor<'a>>,
    checkpoints: Checkpoints,
    log: Log,
    /// What the data was when the run began or was continued.
    data_file: Option<DataFile>,
    /// Samples and time since the last line of the log.
    window: (usize, Instant),
}

impl<'a> Run<'a> {
    /// Loads everything and finds where to continue; `None` when asked to stop before that is done.
    ///
    /// The folder becomes the run's when all of it is there, save what is encoded into it.
    fn prepare(
        recipe: &'a Recipe,
        context: &Context<'_>,
        folder: &RunFolder,
        observer: &mut Journal<'_>,
    ) -> Result<Option<(Self, State)>, TrainError> {
        let (source, device) = (context.source(recipe), &context.device);
        let start = with_preset(load_model(recipe, &source, device)?, recipe)?;
        let trainable = Trainable::new(recipe, &start)?;
        let (cache, held_out_cache) = (folder.cache(), folder.cache().join("held_out"));
        let keep_text = !trainable.trains_text_encoder(&start);
        let with = Preparation { keep_text, ..preparation(recipe, context, (&start, &source, &cache)) };
        let data = Data::find(recipe, with)?;
        let held_out = HeldOut::survey(recipe, Preparation { cache: &held_out_cache, ..with })?;
        if let Trainable::Lora(config) = &trainable
            && recipe.finds_lora_targets()
        {
            let layers = config.target_modules.join(", ");
            observer.on(Event::Message(format!("adapters are attached to {layers}")));
        }
        let method = Method::new(recipe, &start);
        let model = trainable.prepare(start.clone(), recipe)?;
        folder.write_recipe(recipe, context.version)?;
        let Some(data) = data.encode()? else { return Ok(None) };
        let held_out = match held_out.map(|survey| HeldOut::encode(recipe, survey)).transpose()? {
            Some(None) => return Ok(None),
            held_out => held_out.flatten(),
        };
        let checkpoints = Checkpoints::new(recipe);
        let state = State::prepare(recipe, model, &checkpoints, observer)?;
        observer.open(&recipe.output_path, state.progress.step)?;
        let samples = Samples::new(recipe, data.groups()[0], start.defaults())?;
        if let Some(samples) = &samples {
            samples.continue_after(state.progress.step)?;
            if samples.lacks_teacher() {
                observer.on(Event::Samples(&samples.draw_teacher(start.clone(), device)?));
            }
        }
        let monitor = held_out.map(|rows| Monitor::new(recipe, rows, &start, &state.progress));
        let monitor = monitor.transpose()?;
        drop(start); // weights are updated in place only where there is one handle to them
        let loader = Loader::new(recipe, &data);
        let run = Self {
            recipe,
            device: device.clone(),
            source,
            learning_rate: LearningRate::new(recipe, loader.total_steps),
            samples,
            monitor,
            log: Log::open(&recipe.output_path, state.progress.step, recipe.output_layout)?,
            window: (0, Instant::now()),
            data_file: DataFile::of(recipe)?,
            data,
            total_steps: loader.total_steps,
            loader,
            method,
            checkpoints,
        };
        Ok(Some((run, state)))
    }

    fn started(&self, state: &State) -> Started {
        let (trained_parameters, parameters) = state.count();
        Started {
            first_step: state.progress.step,
            total_steps: self.total_steps,
            steps_per_epoch: self.loader.plan.steps_per_epoch,
            rows: self.data.len(),
            trained_parameters,
            parameters,
        }
    }

    /// One optimiser step with the log line and the samples due after it.
    fn step(&mut self, state: State, observer: &mut dyn Observer) -> Result<State, TrainError> {
        let learning_rate =
            self.learning_rate.at(state.progress.step) * guard::rate_factor(self.recipe, &state.progress);
        let (sum, loss, samples) = self.gradients(&state)?;
        let (mut state, norm) = state.update(sum, loss, learning_rate, observer);
        let learning_rate = state.step_size(learning_rate);
        if state.progress.skipped_in_a_row >= self.recipe.max_skipped_steps {
            let start = || self.untrained();
            state = guard::roll_back(state, self.recipe, &self.checkpoints, start, observer)?;
        }
        let step = state.progress.step;
        self.window.0 += samples;
        observer.on(Event::Step { step, loss, learning_rate, samples });
        if is_due(self.recipe.log_steps, step) || step == self.total_steps {
            let line = self.log_line(&mut state.progress, norm, learning_rate);
            self.log.write(&line)?;
            observer.on(Event::Logged(line));
        }
        if self.samples.as_ref().is_some_and(|samples| samples.is_due(step, self.total_steps)) {
            self.draw_samples(&state, observer)?;
        }
        self.look(&mut state, observer)?;
        Ok(state)
    }

    /// The model before the first step.
    fn untrained(&self) -> Result<Model, TrainError> {
        let start = with_preset(load_model(self.recipe, &self.source, &self.device)?, self.recipe)?;
        Trainable::new(self.recipe, &start)?.prepare(start, self.recipe)
    }

    /// Lets the monitor look, if there is one and it is due. As with samples, its time is taken out of the rate.
    fn look(&mut self, state: &mut State, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(monitor) = &mut self.monitor else { return Ok(()) };
        if monitor.is_due(&state.progress) {
            let began = Instant::now();
            monitor.look(&state.averaged(), &mut state.progress, observer)?;
            self.window.1 += began.elapsed();
        }
        Ok(())
    }

    /// Why the run ends before its last step.
    fn early_end(&self, state: &State) -> Option<String> {
        self.monitor.as_ref()?.reason_to_stop(&state.progress)
    }

    fn is_over(&self, state: &State) -> bool {
        state.progress.step >= self.total_steps || self.early_end(state).is_some()
    }

    /// Whether the run itself wants a checkpoint here, interrupted or not.
    fn wants_checkpoint(&self, progress: &Progress) -> bool {
        let due = is_due(self.recipe.checkpoint_steps(), progress.step);
        due || progress.is_best() || progress.has_gone_back()
    }

    fn save(&self, state: &State) -> Result<PathBuf, TrainError> {
        self.log.sync()?;
        let path = self.checkpoints.save(state.snapshot())?;
        if let Some(monitor) = &self.monitor {
            monitor.mark_best(&state.progress)?;
        }
        Ok(path)
    }

    /// Writes the weights that the recipe asks for, the last or the best; returns where they are.
    fn write_result(
        &self,
        state: State,
        version: &str,
        observer: &mut dyn Observer,
    ) -> Result<PathBuf, TrainError> {
        if let Some(reason) = self.early_end(&state)
            && state.progress.step < self.total_steps
        {
            observer.on(Event::Message(format!("stopped early at step {}: {reason}", state.progress.step)));
        }
        let state = state.for_result(self.recipe.result, &self.checkpoints, observer)?;
        let step = state.progress.step;
        match self.recipe.output_layout {
            OutputLayout::Fewstep => output::write(&self.origin(version), state.averaged(), step),
            OutputLayout::Diffsynth if step == self.total_steps => Ok(self.last_peer_file()),
            OutputLayout::Diffsynth => self.write_peer_file_as(&peer_output::by_step(step), &state, version),
        }
    }

    /// The gradient of the mean loss over all samples of the next step, that loss, and their number.
    fn gradients(&mut self, state: &State) -> Result<(GradientSum, f64, usize), TrainError> {
        let sizes = self.loader.begin(state.progress.step, &self.data);
        let samples: usize = sizes.iter().sum();
        let (mut sum, mut loss) = (GradientSum::default(), 0.0);
        for size in sizes {
            let batch = self.loader.next(&self.data)?;
            let share = size as f64 / samples as f64;
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
            self.write_peer_file_as(&name, state, version)?;
        }
        Ok(())
    }

    fn write_peer_file_as(&self, name: &str, state: &State, version: &str) -> Result<PathBuf, TrainError> {
        let info = self.origin(version).info(&state.model, state.progress.step)?;
        PeerFile { recipe: self.recipe, model: &state.model, info }.write(name, state.trained())
    }

    /// Name of the peer's file of a step, if one is due.
    fn peer_file(&self, step: u64) -> Option<String> {
        peer_output::due(self.recipe, step, (self.loader.plan.steps_per_epoch, self.total_steps))
    }

    fn last_peer_file(&self) -> PathBuf {
        self.recipe.output_path.join(self.peer_file(self.total_steps).expect("the last step leaves a file"))
    }

    /// The pictures of a student that has not learned yet.
    fn draw_first_samples(&mut self, state: &State, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let student = self.samples.as_ref().is_some_and(Samples::starts_with_student);
        if student && state.progress.step == 0 { self.draw_samples(state, observer) } else { Ok(()) }
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
            epoch: self.loader.plan.epoch_of(progress.step - 1),
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

/// A data set before anything of it is encoded.
enum Data<'a> {
    /// Encoded by an earlier run.
    Ready(Dataset),
    Surveyed(Box<Survey<'a>>),
}

impl<'a> Data<'a> {
    fn find(recipe: &Recipe, with: Preparation<'a>) -> Result<Self, TrainError> {
        match recipe.task.stage() {
            Stage::Train => Ok(Self::Ready(Dataset::read(recipe, with.model, with.device)?)),
            _ => Ok(Self::Surveyed(Box::new(survey(recipe, with)?))),
        }
    }

    fn encode(self) -> Result<Option<Dataset>, TrainError> {
        match self {
            Self::Ready(data) => Ok(Some(data)),
            Self::Surveyed(survey) => survey.encode(),
        }
    }
}

/// Checks that the data belongs to the run, then looks at it.
fn survey<'a>(recipe: &Recipe, with: Preparation<'a>) -> Result<Survey<'a>, TrainError> {
    if recipe.task.objective() == Objective::Distillation && !recipe.online_teacher {
        provenance::check(recipe, with.source, with.model)?;
    }
    Survey::of(&training_rows(recipe, source::rows(recipe, with.fit)?)?, with)
}

/// How a recipe's data set is prepared, text states included, by a model from a source with a folder for what is encoded.
fn preparation<'a>(
    recipe: &'a Recipe,
    context: &'a Context<'_>,
    (model, source, cache): (&'a Model, &'a ModelSource, &'a Path),
) -> Preparation<'a> {
    Preparation {
        model,
        source,
        device: &context.device,
        fit: Fit::of(recipe, Some(model)),
        base: &recipe.dataset_base_path,
        keep_text: true,
        cache,
        memory_bytes: recipe.dataset_memory_mib.saturating_mul(1 << 20),
        workers: recipe.dataset_num_workers,
        stop: context.stop,
    }
}
