//! `fewstep demo`: the whole way on bundled real data, from teacher pictures to a report.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use fewstep_data::atomic;
use fewstep_data::emoji::{EmojiSet, Language};
use fewstep_device::DeviceName;
use fewstep_report::{Report, Stage};
use fewstep_train::{Context, Outcome, Recipe};

use crate::evaluate::{EvaluateArgs, evaluate};
use crate::generate::{GenerateArgs, generate};
use crate::interrupt::Interrupts;
use crate::parse::Student;
use crate::progress::{Progress, TrainProgress};
use crate::prompts::read_prompts;
use crate::train::version;

/// Side of the bundled pictures in pixels.
const SIDE_PX: usize = 64;
/// What the bundled teacher was trained on; recipes/emoji_teacher.toml.
const TEACHER_GROUPS: [&str; 2] = ["animals & nature", "food & drink"];
/// Seed of the first teacher picture; evaluation has its own, far away.
const TEACHER_SEED: u64 = 0;
/// Pictures drawn at once.
const BATCH_SIZE: usize = 16;

/// Flags of `demo`.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Folder to write to; an interrupted demo is continued
    #[arg(long, default_value = "runs/demo")]
    pub output: PathBuf,
    /// A shorter run: fewer pictures, fewer steps, rougher numbers
    #[arg(long)]
    pub quick: bool,
    /// Folder that holds assets/ and recipes/
    #[arg(long, default_value = ".")]
    pub root: PathBuf,
    /// Where to compute: cpu, cuda:N (an NVIDIA GPU) or wgpu, as far as the build has them
    #[arg(long, default_value = "cpu")]
    pub device: DeviceName,
}

/// How much of everything a demo does.
struct Size {
    teacher_pictures: usize,
    /// Share of the recipes' optimiser steps.
    training: f64,
    /// Pictures of each held-out prompt to evaluate on.
    evaluation_pictures: usize,
    shown: usize,
}

const WHOLE: Size = Size { teacher_pictures: 320, training: 1.0, evaluation_pictures: 2, shown: 16 };
const QUICK: Size = Size { teacher_pictures: 56, training: 0.1, evaluation_pictures: 1, shown: 8 };

/// One student of the demo.
struct StudentRun {
    name: &'static str,
    recipe: &'static str,
    /// Weights inside the run's folder.
    weights: &'static str,
    why: &'static str,
}

const STUDENTS: [StudentRun; 2] = [
    StudentRun {
        name: "LoRA student",
        recipe: "recipes/demo_lora.toml",
        weights: "lora.safetensors",
        why: "only small adapters learn, the teacher's weights stay as they are",
    },
    StudentRun {
        name: "full student",
        recipe: "recipes/demo_full.toml",
        weights: "model",
        why: "every weight of the transformer learns",
    },
];

/// The stages done so far and what is left to say about them.
struct Stages<'a> {
    done: Vec<Stage>,
    progress: &'a dyn Progress,
}

impl Stages<'_> {
    fn announce(&self, what: &str) {
        self.progress.say(&format!("[{}/{}] {what}", self.done.len() + 1, STUDENTS.len() + 3));
    }

    /// Announces a stage, runs it and keeps its time.
    fn run<T>(&mut self, name: &str, what: &str, stage: impl FnOnce() -> Result<T>) -> Result<T> {
        self.announce(what);
        let start = Instant::now();
        let result = stage()?;
        self.done.push(Stage { name: name.into(), secs: start.elapsed().as_secs_f64() });
        Ok(result)
    }
}

/// The subcommand; `false` when a signal stopped a training.
///
/// # Errors
/// As [`demo`].
pub fn run(args: &DemoArgs, progress: &dyn Progress) -> Result<bool> {
    let interrupts = Interrupts::take()?;
    let Some(report) = demo(args, &interrupts, progress)? else {
        progress.say("stopped; the same command continues");
        return Ok(false);
    };
    progress.say(&report.terminal_table());
    progress.say(&format!("report: {}", args.output.join(Report::HTML_FILE).display()));
    Ok(true)
}

/// Runs the demo and writes its report. `None` when a signal stopped a training.
///
/// # Errors
/// As the commands it is made of.
pub fn demo(args: &DemoArgs, interrupts: &Interrupts, progress: &dyn Progress) -> Result<Option<Report>> {
    // What cannot work is said before anything is written.
    args.device.open()?;
    let size = if args.quick { QUICK } else { WHOLE };
    let teacher = args.root.join("assets/teacher");
    ensure!(
        teacher.join("transformer").is_dir(),
        "{}: no bundled teacher\nhint: run the demo from the repository's root, or give --root",
        teacher.display()
    );
    let mut stages = Stages { done: Vec::new(), progress };
    let emoji = args.output.join("emoji");
    let what = "Unpacking the data set: emoji in three drawing styles, captions in English and Chinese.";
    stages.run("data set", what, || unpack(&args.root, &emoji))?;
    let what = format!(
        "Drawing {} teacher pictures in 50 steps with guidance 4: what the students shall draw in 4.",
        size.teacher_pictures
    );
    stages.run("teacher pictures", &what, || draw_teacher(args, &size, &teacher, progress))?;
    for student in &STUDENTS {
        let what = format!("Distilling the {}: {}.", student.name, student.why);
        let outcome =
            stages.run(student.name, &what, || distil(args, &size, &teacher, student, interrupts))?;
        if let Outcome::Stopped(_) = outcome {
            return Ok(None);
        }
    }
    stages.announce("Comparing teacher, undistilled model and students on prompts never trained on.");
    evaluate(&evaluation(args, &size, &teacher), stages.done, progress).map(Some)
}

fn unpack(root: &Path, emoji: &Path) -> Result<()> {
    if emoji.join("metadata.csv").exists() {
        return Ok(());
    }
    let set = EmojiSet::open(&root.join("assets/emoji"))?;
    Ok(set.write_training_folder(emoji, &[Language::English, Language::Chinese], &TEACHER_GROUPS)?)
}

fn draw_teacher(args: &DemoArgs, size: &Size, teacher: &Path, progress: &dyn Progress) -> Result<()> {
    let rows = read_prompts(&args.output.join("emoji/metadata.csv"))?;
    let all: Vec<String> = rows.into_iter().map(|row| row.prompt).collect();
    let prompts = spread(&all, size.teacher_pictures);
    let file = args.output.join("prompts.txt");
    atomic::write(&file, prompts.join("\n").as_bytes()).with_context(|| file.display().to_string())?;
    let output = args.output.join("teacher");
    let mut generate_args = GenerateArgs {
        prompts: Some(file),
        seed: TEACHER_SEED,
        batch_size: BATCH_SIZE,
        ..GenerateArgs::new(teacher, &output, [SIDE_PX; 2])
    };
    generate_args.load.device = args.device;
    generate(&generate_args, progress)
}

/// So many of the prompts, spread evenly. The rows alternate between languages and so does the choice.
fn spread(prompts: &[String], count: usize) -> Vec<String> {
    let pairs = prompts.len() / 2;
    let count = count.min(pairs);
    (0..count).map(|index| prompts[2 * (index * pairs / count) + index % 2].clone()).collect()
}

fn distil(
    args: &DemoArgs,
    size: &Size,
    teacher: &Path,
    student: &StudentRun,
    interrupts: &Interrupts,
) -> Result<Outcome> {
    let mut recipe = Recipe::read(&args.root.join(student.recipe))?;
    recipe.model = teacher.to_owned();
    recipe.device = args.device;
    recipe.dataset_base_path = args.output.join("teacher");
    recipe.dataset_metadata_path = Some(args.output.join("teacher/metadata.csv"));
    recipe.output_path = run_folder(args, student);
    let Some(steps) = recipe.max_steps else { bail!("{}: max_steps is missing", student.recipe) };
    recipe.max_steps = Some((steps as f64 * size.training).ceil() as u64);
    let device = args.device.open()?;
    let mut progress = TrainProgress::new(false);
    let outcome = interrupts.during(|stop| {
        let context = Context { model: None, device, stop, version: &version() };
        fewstep_train::run(&recipe, context, &mut progress)
    });
    progress.finish();
    Ok(outcome?)
}

fn run_folder(args: &DemoArgs, student: &StudentRun) -> PathBuf {
    args.output.join(student.name.replace(' ', "_"))
}

fn evaluation(args: &DemoArgs, size: &Size, teacher: &Path) -> EvaluateArgs {
    let student =
        |run: &StudentRun| Student { name: run.name.into(), path: run_folder(args, run).join(run.weights) };
    let metadata = args.output.join("emoji/held_out.csv");
    let mut evaluation = EvaluateArgs {
        student: STUDENTS.iter().map(student).collect(),
        student_num_inference_steps: Some(vec![1, 2, 4, 8]),
        images_per_prompt: size.evaluation_pictures,
        batch_size: BATCH_SIZE,
        judge: args.root.join("assets/judge").join(fewstep_report::Judge::FILE),
        shown: size.shown,
        ..EvaluateArgs::new(teacher, &metadata, &args.output, [SIDE_PX; 2])
    };
    evaluation.load.device = args.device;
    evaluation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_prompts_are_spread_and_alternate_between_languages() {
        let prompts: Vec<String> = (0..10).flat_map(|i| [format!("en{i}"), format!("zh{i}")]).collect();
        assert_eq!(spread(&prompts, 4), ["en0", "zh2", "en5", "zh7"]);
        assert_eq!(spread(&prompts, 99).len(), 10);
    }
}
