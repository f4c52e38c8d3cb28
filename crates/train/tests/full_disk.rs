//! Writing that fails after any number of bytes, by the system's limit on the size of a file. The limit holds for the
//! whole process, so this file has one test.

#![cfg(unix)]
#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use fewstep_data::image::Picture;
use fewstep_data::metadata::{CaptionedRow, write_captioned_csv};
use fewstep_testkit::{copy_folder, folder_files, write_tiny_configs};
use fewstep_train::recipe::InitialWeights;
use fewstep_train::{Context, Event, Observer, Outcome, Recipe, Task, TrainError, run};
use rlimit::Resource;

/// Side of the pictures, in px.
const SIDE_PX: usize = 16;

struct Quiet;

impl Observer for Quiet {
    fn on(&mut self, _: Event<'_>) {}
}

/// A run of four steps that saves after each second one.
fn recipe(folder: &Path, output: &str) -> Recipe {
    Recipe {
        task: Task::Sft,
        model: folder.join("model"),
        initial_weights: InitialWeights::Random,
        trainable_models: vec!["transformer".into()],
        dataset_base_path: folder.join("data"),
        output_path: folder.join(output),
        height: Some(SIDE_PX),
        width: Some(SIDE_PX),
        ema_decay: 0.9,
        max_steps: Some(4),
        save_steps: Some(2),
        ..Recipe::default()
    }
}

fn train(recipe: &Recipe) -> Result<Outcome, TrainError> {
    let never = AtomicBool::new(false);
    run(recipe, Context { model: None, device: Device::flex(), stop: &never, version: "a test" }, &mut Quiet)
}

/// Trains while no file may become larger than `bytes`; returns what the run dies of.
fn train_within(recipe: &Recipe, bytes: u64) -> String {
    let (_, most) = Resource::FSIZE.get().unwrap();
    Resource::FSIZE.set(bytes, most).unwrap();
    let outcome = train(recipe);
    Resource::FSIZE.set(most, most).unwrap();
    outcome.expect_err("there is no room").to_string()
}

/// Sizes at which something else does not fit: around the beginning, the middle and the end of every file.
fn limits(run: &Path) -> BTreeSet<u64> {
    // The page of a run is left out where it does not fit, and the run is none the worse.
    let needed = folder_files(run).into_iter().filter(|(path, _)| !path.ends_with("report.html"));
    let sizes = needed.map(|(_, file)| file.len() as u64);
    let around = |size: u64| [0, 1, 8, size / 2, size.saturating_sub(1)];
    sizes.filter(|size| *size > 0).flat_map(around).collect()
}

fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}

#[test]
fn a_run_without_room_for_any_of_its_files_keeps_its_last_checkpoint_and_continues_to_the_same_weights() {
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false))).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_tiny_configs(&folder.path().join("model"));
    let rows = [0, 1].map(|row| CaptionedRow::of_image(format!("{row}.png"), format!("picture {row}")));
    for (row, level) in rows.iter().zip([40, 200]) {
        let picture = Picture { width: SIDE_PX, height: SIDE_PX, rgb: vec![level; 3 * SIDE_PX * SIDE_PX] };
        picture.save_png(&folder.path().join("data").join(&row.file)).unwrap();
    }
    write_captioned_csv(&folder.path().join("data/metadata.csv"), &rows).unwrap();

    let (half, whole) = (recipe(folder.path(), "half"), recipe(folder.path(), "whole"));
    train(&Recipe { max_steps: Some(2), ..half.clone() }).unwrap();
    train(&whole).unwrap();
    let expected = folder_files(&checkpoint(&whole.output_path, 4));
    let first = folder_files(&checkpoint(&half.output_path, 2));
    for (at, limit) in limits(&whole.output_path).into_iter().enumerate() {
        let recipe = recipe(folder.path(), &format!("run-{at}"));
        copy_folder(&half.output_path, &recipe.output_path, &|_| true);
        let error = train_within(&recipe, limit);
        assert!(error.contains("File too large") && error.contains("\nhint: "), "{limit} bytes: {error}");
        assert_eq!(folder_files(&checkpoint(&recipe.output_path, 2)), first, "{limit} bytes");
        if error.contains("the checkpoint of step 4") {
            let named = format!("{} is whole\n", checkpoint(&recipe.output_path, 2).display());
            assert!(error.contains(&named), "{error}");
            assert!(!checkpoint(&recipe.output_path, 4).exists(), "{limit} bytes");
        }
        train(&recipe).unwrap();
        assert_eq!(folder_files(&checkpoint(&recipe.output_path, 4)), expected, "{limit} bytes");
        std::fs::remove_dir_all(&recipe.output_path).unwrap();
    }
}
