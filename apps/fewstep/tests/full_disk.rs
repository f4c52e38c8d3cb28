//! No room and no permission in the middle of the work: the exit code, what is said, and what is left.

#![cfg(unix)]
#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fewstep_testkit::{folder_files, write_tiny_configs};
use tempfile::TempDir;

const NOBODY: u32 = 65_534;

/// A folder with configs of a small model and a data set.
fn fixture() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_tiny_configs(&folder.path().join("configs"));
    fs::create_dir(folder.path().join("data")).unwrap();
    image::RgbImage::from_pixel(16, 16, image::Rgb([90; 3])).save(folder.path().join("data/a.png")).unwrap();
    fs::write(folder.path().join("data/metadata.csv"), "image,prompt\na.png,a square\n").unwrap();
    folder
}

/// Trains random weights for so many steps, saving after each second one.
fn train_args(folder: &Path, steps: u64) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (model, data, output, steps) = (path("configs"), path("data"), path("run"), steps.to_string());
    let places = ["train", "--model", &model, "--dataset-base-path", &data, "--output-path", &output];
    let what =
        ["--task", "sft", "--initial-weights", "random", "--trainable-models", "text_encoder,transformer"];
    let long = ["--max-steps", &steps, "--save-steps", "2"];
    places.into_iter().chain(what).chain(long).map(str::to_owned).collect()
}

fn fewstep(args: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fewstep"));
    command.args(args);
    command
}

/// The program where no file may be larger than so many blocks of 512 bytes.
fn limited(args: &[String], blocks: u64) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f $0 && exec \"$@\"", &blocks.to_string(), env!("CARGO_BIN_EXE_fewstep")]);
    command.args(args);
    command
}

fn said(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// The files of a folder in the making, which a program that ended by itself has removed.
fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let hidden = |path: &PathBuf| path.to_string_lossy().contains(".part");
    folder_files(folder).into_keys().filter(hidden).collect()
}

#[test]
fn training_without_room_for_a_checkpoint_exits_with_1_and_continues_from_the_last() {
    let folder = fixture();
    said(&fewstep(&train_args(folder.path(), 2)).output().unwrap(), 0);
    let checkpoint = folder.path().join("run/checkpoints/step-00000002");
    let before = folder_files(&checkpoint);
    let largest = before.values().map(Vec::len).max().unwrap() as u64;

    let text = said(&limited(&train_args(folder.path(), 4), largest / 512 / 2).output().unwrap(), 1);
    assert!(text.contains("error: the checkpoint of step 4, about "), "{text}");
    assert!(
        text.contains("File too large") && text.contains("step-00000002 is whole\nhint: make room"),
        "{text}"
    );
    assert_eq!(folder_files(&checkpoint), before);
    assert!(unfinished(folder.path()).is_empty());

    let text = said(&fewstep(&train_args(folder.path(), 4)).output().unwrap(), 0);
    assert!(text.contains("continuing after step 2"), "{text}");
}

#[test]
fn a_generation_without_room_exits_with_1_and_continues() {
    let folder = fixture();
    said(&fewstep(&train_args(folder.path(), 2)).output().unwrap(), 0);
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, output) = (path("run/model"), path("pictures"));
    let args = ["generate", "--model", &model, "--output", &output, "--prompt", "a", "--prompt", "b"];
    let size = ["--height", "16", "--width", "16", "--num-inference-steps", "2", "--batch-size", "1"];
    let args: Vec<String> = args.iter().chain(&size).map(|arg| (*arg).to_owned()).collect();
    let text = said(&limited(&args, 6).output().unwrap(), 1);
    assert!(text.contains("latents/000000.safetensors: File too large"), "{text}");
    assert!(
        text.contains("bytes are needed; what was complete before is untouched\nhint: raise the limit"),
        "{text}"
    );
    assert!(unfinished(folder.path()).is_empty());
    said(&fewstep(&args).output().unwrap(), 0);
    assert_eq!(folder_files(Path::new(&output)).len(), 2 * 2 + 2);
}

/// As root, whom no permission stops, the program runs as somebody else.
#[test]
fn a_folder_of_checkpoints_that_became_read_only_keeps_them_and_is_named() {
    let folder = fixture();
    said(&fewstep(&train_args(folder.path(), 2)).output().unwrap(), 0);
    let (run, checkpoints) = (folder.path().join("run"), folder.path().join("run/checkpoints"));
    let before = folder_files(&checkpoints);
    let program = folder.path().join("fewstep");
    fs::copy(env!("CARGO_BIN_EXE_fewstep"), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(train_args(folder.path(), 4)).current_dir(folder.path());
    if fs::metadata(folder.path()).unwrap().uid() == 0 {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        give_away(&run);
        command.uid(NOBODY).gid(NOBODY);
    }
    fs::set_permissions(&checkpoints, fs::Permissions::from_mode(0o555)).unwrap();
    let output = command.output().unwrap();
    fs::set_permissions(&checkpoints, fs::Permissions::from_mode(0o755)).unwrap();
    let text = said(&output, 1);
    assert!(text.contains("the checkpoint of step 4") && text.contains("Permission denied"), "{text}");
    assert!(text.contains("step-00000002 is whole\nhint: "), "{text}");
    assert_eq!(folder_files(&checkpoints), before);
}

/// Gives a folder and all below it to nobody.
fn give_away(folder: &Path) {
    chown(folder, Some(NOBODY), Some(NOBODY)).unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            give_away(&path);
        } else {
            chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
}
