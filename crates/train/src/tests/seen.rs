//! What a person sees of a run: its log, sample pictures and page, also after it was stopped and continued.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use fewstep_data::image::Picture;
use fewstep_models::{Pipeline, Request, WeightFiles, WeightType, save_tensors};
use fewstep_report::run::{Happening, LOG_FILE, LogEntry, REPORT_FILE, Run, SampleSet};
use fewstep_testkit::{copy_folder, folder_files};

use super::fixtures::{Bench, ROWS, Recorder, SIDE_PX, STUDENT_STEPS, run, train};
use crate::recipe::TrainingGrid;
use crate::{Outcome, Recipe, Task};

/// Full training of a student, with pictures of two prompts every third of six steps.
fn recipe(bench: &Bench) -> Recipe {
    Recipe {
        sample_steps: 3,
        sample_prompts: vec!["red apple".into(), "</script><b>".into()],
        teacher_num_inference_steps: Some(7),
        teacher_cfg_scale: Some(2.0),
        save_steps: Some(2),
        ..bench.recipe()
    }
}

fn log(run: &Path) -> Vec<LogEntry> {
    let text = fs::read_to_string(run.join(LOG_FILE)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Steps of the lines that tell of training.
fn trained(log: &[LogEntry]) -> Vec<u64> {
    let train = |entry: &&LogEntry| matches!(entry.what, Happening::Train { .. });
    log.iter().filter(train).map(|entry| entry.step).collect()
}

/// Steps with sample pictures.
fn drawn(run: &Path) -> Vec<u64> {
    Run::read(run).samples.steps.into_iter().map(|(step, _)| step).collect()
}

#[test]
fn a_student_draws_as_it_is_trained_and_the_teacher_once_with_its_first_weights() {
    let bench = Bench::new().with_teacher_data();
    let recipe = recipe(&bench);
    train(&recipe);
    let samples = recipe.output_path.join("samples");
    assert_eq!(drawn(&recipe.output_path), [0, 3, 6]);

    let settings = |name: &str| {
        let set = SampleSet::read(&samples.join(name)).unwrap();
        (set.num_inference_steps, set.cfg_scale, set.samples[1].prompt.clone())
    };
    assert_eq!(settings("step-00000003"), (STUDENT_STEPS, 1.0, "</script><b>".into()));
    assert_eq!(settings("teacher"), (7, 2.0, "</script><b>".into()));

    let picture = |name: &str| Picture::load(&samples.join(name)).unwrap();
    let request = Request { seed: recipe.seed, ..Request::new("red apple", SIDE_PX, SIDE_PX) };
    let start = Pipeline::new(bench.model(), Device::flex());
    let by_start = |num_inference_steps, cfg_scale| {
        let request = Request { num_inference_steps, cfg_scale, ..request.clone() };
        start.generate(&request).unwrap().picture().clone()
    };
    assert_eq!(picture("teacher/000.png"), by_start(7, 2.0));
    assert_eq!(picture("step-00000000/000.png"), by_start(STUDENT_STEPS, 1.0));
    assert_ne!(picture("step-00000006/000.png"), by_start(STUDENT_STEPS, 1.0), "the student has learned");
    let sheet = picture("teacher.png");
    assert_eq!((sheet.width, sheet.height), (2 * (SIDE_PX + 2) + 2, SIDE_PX + 2 + 2));
}

#[test]
fn a_student_of_the_peers_training_grid_draws_on_that_grid() {
    let bench = Bench::new().with_teacher_data();
    let drawn_on = |training_grid| {
        let output_path = bench.path(&format!("{training_grid:?}"));
        let recipe = Recipe { training_grid, output_path, max_steps: Some(1), ..recipe(&bench) };
        train(&recipe);
        let picture = |name: &str| Picture::load(&recipe.output_path.join("samples").join(name)).unwrap();
        (picture("step-00000000/000.png"), picture("teacher/000.png"))
    };
    let (ours, peers) = (drawn_on(TrainingGrid::Inference), drawn_on(TrainingGrid::Diffsynth));
    assert_ne!(ours.0, peers.0);
    assert_eq!(ours.1, peers.1, "the teacher's grid is its own");
}

#[test]
fn pictures_of_a_model_that_is_no_student_have_its_defaults_and_no_teacher() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe { task: Task::Sft, max_steps: Some(4), ..recipe(&bench) };
    train(&recipe);
    assert_eq!(drawn(&recipe.output_path), [3, 4]);
    let set = SampleSet::read(&recipe.output_path.join("samples/step-00000003")).unwrap();
    assert_eq!((set.num_inference_steps, set.cfg_scale), (25, 4.0));
    assert!(!recipe.output_path.join("samples/teacher").exists());
}

#[test]
fn a_stopped_and_continued_run_tells_each_step_once_and_draws_the_same() {
    let bench = Bench::new().with_teacher_data();
    let whole = Recipe { output_path: bench.path("whole"), ..recipe(&bench) };
    train(&whole);

    let recipe = recipe(&bench);
    let path = &recipe.output_path;
    let stop = AtomicBool::new(false);
    let mut recorder = Recorder { stop: Some((4, &stop)), ..Recorder::default() };
    assert_eq!(run(&recipe, &mut recorder).unwrap(), Outcome::Stopped(4));
    assert_eq!(log(path).last().unwrap().what, Happening::Stopped);
    let stopped_page = fs::read_to_string(path.join(REPORT_FILE)).unwrap();
    assert!(stopped_page.contains("Stopped") && stopped_page.contains("step 4 of 6"));
    // As a run killed later leaves it: lines and pictures past its last checkpoint, and half a line.
    let later = r#"{"kind":"train","epoch":0,"loss":9.0,"gradient_norm":1.0,"learning_rate":1.0,"samples_per_sec":1.0,"memory_bytes":1,"step":5,"time":1.0}"#;
    let old = fs::read_to_string(path.join(LOG_FILE)).unwrap();
    fs::write(path.join(LOG_FILE), format!("{old}{later}\n{}", &later[..30])).unwrap();
    copy_folder(&path.join("samples/step-00000003"), &path.join("samples/step-00000005"), &|_| true);
    fs::write(path.join("samples/step-00000005.png"), "x").unwrap();

    train(&recipe);
    let continued = log(path);
    assert_eq!(trained(&continued), [1, 2, 3, 4, 5, 6]);
    assert_eq!(trained(&log(&whole.output_path)), [1, 2, 3, 4, 5, 6]);
    let losses = |log: &[LogEntry]| -> Vec<Option<f64>> {
        let loss = |entry: &LogEntry| match entry.what {
            Happening::Train { loss, .. } => Some(loss),
            _ => None,
        };
        log.iter().filter_map(loss).collect()
    };
    assert_eq!(losses(&continued), losses(&log(&whole.output_path)));
    assert!(matches!(continued.last().unwrap().what, Happening::Finished { .. }));
    let told = |text: &str| continued.iter().any(|entry| format!("{:?}", entry.what).contains(text));
    assert!(told("continuing after step 4"), "{continued:?}");
    assert_eq!(folder_files(&path.join("samples")), folder_files(&whole.output_path.join("samples")));
}

#[test]
fn a_drawing_that_was_broken_off_before_its_sheet_is_drawn_again() {
    let bench = Bench::new().with_teacher_data();
    let recipe = recipe(&bench);
    train(&recipe);
    let samples = recipe.output_path.join("samples");
    let (sheet, before) = (samples.join("teacher.png"), folder_files(&samples.join("teacher")));
    fs::remove_dir_all(samples.join("teacher")).unwrap();
    fs::remove_file(&sheet).unwrap();
    fs::create_dir_all(sheet.join("in the way")).unwrap();
    let longer = Recipe { max_steps: Some(8), ..recipe };
    let error = run(&longer, &mut Recorder::default()).unwrap_err().to_string();
    assert!(error.contains("teacher.png"), "{error}");
    fs::remove_dir_all(&sheet).unwrap();
    train(&longer);
    assert!(sheet.is_file());
    assert_eq!(folder_files(&samples.join("teacher")), before);
}

#[test]
fn a_finished_run_leaves_a_page_that_stands_alone() {
    let bench = Bench::new().with_teacher_data();
    let recipe = recipe(&bench);
    train(&recipe);
    let page = fs::read_to_string(recipe.output_path.join(REPORT_FILE)).unwrap();
    assert!(page.contains("Finished") && page.contains("step 6 of 6"));
    // Two prompts, drawn by the student three times and by the teacher.
    assert_eq!(page.matches("data:image/png;base64,").count(), 8);
    assert_eq!(page.matches("</script").count(), 2, "no prompt ends a script");
    for foreign in ["http://", "https://", "<link", "@import"] {
        assert!(!page.contains(foreign), "the page contains {foreign}");
    }
}

#[test]
fn a_failed_run_tells_why_in_its_log_and_page() {
    let bench = Bench::new().with_teacher_data();
    for row in 0..ROWS {
        let path = bench.path(&format!("data/latents/{row}.safetensors"));
        let shape = WeightFiles::open(&path).unwrap().read("latents").unwrap().0;
        // Finite, as stored numbers must be, with squares that are not.
        let burst = ("latents".to_owned(), shape.clone(), vec![f32::MAX; shape.iter().product()]);
        save_tensors(&path, [burst], WeightType::F32, &Default::default()).unwrap();
    }
    let recipe = Recipe { max_steps: Some(50), max_rollbacks: 0, ..bench.recipe() };
    let error = run(&recipe, &mut Recorder::default()).unwrap_err().to_string();
    let log = log(&recipe.output_path);
    assert_eq!(log.last().unwrap().what, Happening::Failed { text: error });
    assert!(fs::read_to_string(recipe.output_path.join(REPORT_FILE)).unwrap().contains("Failed"));
    let skipped: Vec<u64> = log
        .iter()
        .filter(|entry| matches!(&entry.what, Happening::Message { text } if text.contains("skipped")))
        .map(|entry| entry.step)
        .collect();
    assert_eq!(skipped[..3], [1, 2, 3], "a message belongs to the step it is about");
}
