//! `fewstep train --dry-run`: what a run would do, take and write, and what would keep it from starting.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use burn::tensor::Device;
use fewstep_models::ModelSource;
use fewstep_train::Recipe;
use fewstep_train::dry_run::{Alternative, Bucket, Course, DryRun, Memory, ModelOutline, dry_run};
use indicatif::{HumanBytes, HumanCount, HumanDuration};
use serde::Serialize;

use crate::machine;
use crate::model_args::{ModelArgs, Preview};

/// Problems that are shown; of the others only the number.
const SHOWN_PROBLEMS: usize = 20;

/// What was found out, the machine included.
#[derive(Serialize)]
struct Report {
    /// Whether the run would start.
    starts: bool,
    #[serde(flatten)]
    run: DryRun,
    /// Files that would be downloaded first, with what is missing of them.
    download: Vec<(PathBuf, u64)>,
    /// The most that the run holds at any time.
    peak_bytes: Option<u64>,
    /// Of that, what must be there.
    needed_bytes: Option<u64>,
    free_memory_bytes: Option<u64>,
    /// Whether that is a device's own, of which too little is a problem: the host's may be swapped out.
    #[serde(skip)]
    memory_of_device: bool,
    free_disk_bytes: Option<u64>,
    time: Option<Time>,
}

/// How long the run would take.
#[derive(Clone, Copy, Serialize)]
struct Time {
    /// Measured here by a matrix product.
    flops_per_sec: f64,
    secs_per_step: f64,
    secs: f64,
}

/// Prints what a run would do; true where it would start.
///
/// # Errors
/// If the recipe itself is at fault.
pub fn run(recipe: &Recipe, model: &ModelArgs, device: &Device, json: bool) -> Result<bool> {
    let report = Report::new(recipe, model, device)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text(recipe));
        report.complain();
    }
    Ok(report.starts)
}

/// Refuses a run that a device with memory of its own has too little of: in the middle of the run it would end the
/// process.
///
/// # Errors
/// If it does not fit, with what would; or if the recipe itself is at fault.
pub fn check_memory(recipe: &Recipe, source: &ModelSource, device: &Device) -> Result<()> {
    let Some(free) = recipe.device.free_memory_bytes()? else { return Ok(()) };
    let run = dry_run(recipe, Some(source), device)?;
    let needed = run.memory.as_ref().map_or(0, |memory| memory.peak().bytes());
    match too_little(needed, free, &run.alternatives) {
        Some(problem) => bail!("device {}: {problem}", recipe.device),
        None => Ok(()),
    }
}

impl Report {
    fn new(recipe: &Recipe, model: &ModelArgs, device: &Device) -> Result<Self> {
        let mut unusable = Vec::new();
        let Preview { source, missing } = model.preview().unwrap_or_else(|error| {
            unusable.push(format!("{error:#}"));
            Preview::default()
        });
        let mut run = dry_run(recipe, source.as_ref(), device)?;
        run.problems.splice(0..0, unusable);
        if let Some(folder) = machine::unwritable(&recipe.output_path) {
            run.problems.push(format!("{}: nothing can be written there", folder.display()));
        }
        let of_device = recipe.device.free_memory_bytes()?;
        // Before the speed is measured, whose buffers are larger than a small run's. It takes no memory of a device.
        let process = if of_device.is_some() { 0 } else { machine::computing_bytes().unwrap_or(0) };
        run.memory = run.memory.map(|memory| memory.beside("the process itself", process));
        for alternative in &mut run.alternatives {
            alternative.needed_bytes += process;
        }
        let needed = run.memory.as_ref().map_or(0, |memory| memory.peak().bytes());
        run.problems.extend(of_device.and_then(|free| too_little(needed, free, &run.alternatives)));
        Ok(Self {
            starts: run.problems.is_empty(),
            download: missing,
            peak_bytes: run.memory.as_ref().map(|memory| memory.peak().bytes()),
            needed_bytes: run.memory.as_ref().map(|memory| memory.peak().bytes()),
            memory_of_device: of_device.is_some(),
            free_memory_bytes: of_device.or_else(machine::free_memory_bytes),
            free_disk_bytes: machine::free_disk_bytes(&recipe.output_path),
            time: Time::of(&run),
            run,
        })
    }

    fn text(&self, recipe: &Recipe) -> String {
        let mut text = Text::default();
        if !self.download.is_empty() {
            let missing: u64 = self.download.iter().map(|(_, bytes)| bytes).sum();
            text.section(
                "download",
                &format!(
                    "{} before anything else; model, memory and time can be told then",
                    HumanBytes(missing)
                ),
            );
            for (path, bytes) in &self.download {
                text.row(&path.display().to_string(), &HumanBytes(*bytes).to_string());
            }
        }
        if let Some(model) = &self.run.model {
            text.model(model);
        }
        text.data(&self.run);
        if let Some(course) = &self.run.course {
            text.course(course, recipe);
        }
        if let Some(memory) = &self.run.memory {
            text.memory(memory, self.free_memory_bytes);
        }
        if let Some(time) = &self.time {
            text.time(time);
        }
        text.files(&self.run, recipe, self.free_disk_bytes);
        text.0
    }

    /// Warnings and problems, on standard error.
    fn complain(&self) {
        for warning in self.warnings() {
            eprintln!("warning: {warning}");
        }
        let problems = &self.run.problems;
        for problem in problems.iter().take(SHOWN_PROBLEMS) {
            eprintln!("error: {problem}");
        }
        if problems.len() > SHOWN_PROBLEMS {
            eprintln!("error: and {} more of {} problems", problems.len() - SHOWN_PROBLEMS, problems.len());
        }
        match problems.len() {
            0 => eprintln!("the run would start"),
            1 => eprintln!("the run would not start: 1 problem"),
            count => eprintln!("the run would not start: {count} problems"),
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let (Some(needed), Some(free), false) =
            (self.needed_bytes, self.free_memory_bytes, self.memory_of_device)
        {
            warnings.extend(too_little(needed, free, &self.run.alternatives));
        }
        let files: u64 = self.run.files.iter().map(|file| file.bytes).sum();
        if let Some(free) = self.free_disk_bytes.filter(|free| *free < files) {
            let hint = "keep fewer checkpoints with --keep, or give another --output-path";
            warnings.push(format!(
                "the run writes {}, {} are free there\nhint: {hint}",
                HumanBytes(files),
                HumanBytes(free)
            ));
        }
        warnings
    }
}

/// Says so where a run needs more memory than is free.
fn too_little(needed: u64, free: u64, alternatives: &[Alternative]) -> Option<String> {
    let said = || {
        let fitting = fitting(alternatives, needed, free);
        format!("the run needs {} of memory, {} are free{fitting}", HumanBytes(needed), HumanBytes(free))
    };
    (needed > free).then(said)
}

/// What would fit, one hint a line; what comes closest where nothing does.
fn fitting(alternatives: &[Alternative], needed: u64, free: u64) -> String {
    let smaller = || alternatives.iter().filter(|other| other.needed_bytes < needed);
    let mut shown: Vec<&Alternative> = smaller().filter(|other| other.needed_bytes <= free).collect();
    let verdict = if shown.is_empty() { "still needs" } else { "fits:" };
    if shown.is_empty() {
        shown.extend(smaller().min_by_key(|other| other.needed_bytes));
    }
    let line = |other: &Alternative| {
        format!("\nhint: {} {verdict} {}", other.change, HumanBytes(other.needed_bytes))
    };
    shown.into_iter().map(line).collect()
}

impl Time {
    /// `None` where the work is not known.
    fn of(run: &DryRun) -> Option<Self> {
        let work = run.work?;
        let flops_per_sec = machine::measured_speed();
        let steps =
            run.course.as_ref().map_or(0, |course| course.total_steps.saturating_sub(course.first_step));
        let flops = work.preparation + steps as f64 * work.step + work.sheets as f64 * work.samples;
        Some(Self { flops_per_sec, secs_per_step: work.step / flops_per_sec, secs: flops / flops_per_sec })
    }
}

/// Sections of rows in two columns.
#[derive(Default)]
struct Text(String);

impl Text {
    fn section(&mut self, name: &str, about: &str) {
        self.0.push_str(&format!("{name:<10}{about}\n"));
    }

    fn row(&mut self, name: &str, value: &str) {
        self.0.push_str(&format!("  {name:<46}{value:>14}\n"));
    }

    fn model(&mut self, model: &ModelOutline) {
        self.section("model", &model.source);
        for (component, parameters) in &model.parameters {
            self.row(&format!("parameters of the {component}"), &HumanCount(*parameters).to_string());
        }
        self.row(&format!("trained: {}", model.trained), &HumanCount(model.trained_parameters).to_string());
    }

    fn data(&mut self, run: &DryRun) {
        let data = &run.data;
        let wrong = match data.wrong_rows {
            0 => String::new(),
            count => format!(" and {count} with problems"),
        };
        self.section("data", &format!("{} rows{wrong}", data.rows));
        self.row("pictures", &data.pictures.to_string());
        self.row("of these with stored latents", &data.stored_latents.to_string());
        self.row("prompts, the empty one included", &data.prompts.to_string());
        self.row("tokens of the longest prompt", &data.longest_prompt_tokens.to_string());
        for bucket in &data.batches {
            self.row(&kind(bucket), &format!("{} batches", bucket.batches));
        }
    }

    fn course(&mut self, course: &Course, recipe: &Recipe) {
        let Course { first_step, steps_per_epoch, total_steps, learning_rates } = course;
        let about = match (*first_step, total_steps.saturating_sub(*first_step)) {
            (0, _) => format!("{total_steps} steps, {steps_per_epoch} in an epoch"),
            (done, 0) => format!(
                "all {total_steps} steps are done: step {done} is in {}",
                recipe.output_path.display()
            ),
            (done, left) => format!(
                "{left} of {total_steps} steps, {steps_per_epoch} in an epoch: the run in {} is continued after step {done}",
                recipe.output_path.display()
            ),
        };
        self.section("course", &about);
        for (step, rate) in learning_rates {
            self.row(&format!("learning rate of step {step}"), &format!("{rate:.3e}"));
        }
    }

    fn memory(&mut self, memory: &Memory, free: Option<u64>) {
        let peak = memory.peak();
        let bytes = |bytes: u64| HumanBytes(bytes).to_string();
        self.section("memory", &format!("{} at most, while {}", bytes(peak.bytes()), peak.name));
        for part in &peak.parts {
            self.row(&part.name, &bytes(part.bytes));
        }
        for phase in memory.phases.iter().filter(|phase| phase.name != peak.name) {
            self.row(&format!("in all while {}", phase.name), &bytes(phase.bytes()));
        }
        if let Some(free) = free {
            self.row("free now", &bytes(free));
        }
    }

    fn time(&mut self, time: &Time) {
        let whole = HumanDuration(Duration::from_secs_f64(time.secs.min(1e12)));
        let speed = time.flops_per_sec / 1e9;
        self.section(
            "time",
            &format!("about {whole}, at {speed:.0} GFLOP/s, measured here by a matrix product"),
        );
        self.row("seconds a step", &format!("{:.3}", time.secs_per_step));
    }

    fn files(&mut self, run: &DryRun, recipe: &Recipe, free: Option<u64>) {
        if run.files.is_empty() {
            return;
        }
        let folder = &recipe.output_path;
        let bytes = |bytes: u64| HumanBytes(bytes).to_string();
        let together = run.files.iter().map(|file| file.bytes).sum();
        self.section("files", &format!("{} in {}", bytes(together), folder.display()));
        for file in &run.files {
            let name = file.path.strip_prefix(folder).unwrap_or(&file.path).display().to_string();
            let name = if file.count > 1 { format!("{name} and {} before it", file.count - 1) } else { name };
            self.row(&name, &bytes(file.bytes));
        }
        if let Some(free) = free {
            self.row("free there", &bytes(free));
        }
    }
}

/// A kind of batches in words.
fn kind(bucket: &Bucket) -> String {
    let Bucket { width, height, num_frames, num_inference_steps, cfg_scale, rows, largest_batch, .. } =
        bucket;
    let student = match num_inference_steps {
        0 => String::new(),
        steps => format!(", {steps} steps, guidance {cfg_scale}"),
    };
    let frames = if *num_frames == 1 { String::new() } else { format!(", {num_frames} frames") };
    format!("{width}x{height} px{frames}{student}: {rows} rows by {largest_batch}")
}
