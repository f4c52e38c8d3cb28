//! The sample pictures of a run: a folder per drawing, with a picture per prompt and a file that says what they are.

use std::io;
use std::path::{Path, PathBuf};

use fewstep_data::atomic;
use fewstep_data::image::Picture;
use serde::{Deserialize, Serialize};

use super::read_text;

/// The folder of all sample pictures inside a run folder.
pub const SAMPLES_FOLDER: &str = "samples";
/// The teacher's drawing among them.
pub const TEACHER: &str = "teacher";
const SET_FILE: &str = "samples.json";
/// Pictures of a drawing that are shown.
const MAX_PICTURES: usize = 256;

/// What was drawn at once: by one model with one setting, a picture per prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleSet {
    /// Sampling steps.
    pub num_inference_steps: usize,
    /// Guidance; 1 is off.
    pub cfg_scale: f32,
    /// Picture height in px.
    pub height: usize,
    /// Picture width in px.
    pub width: usize,
    /// In the order of the files.
    pub samples: Vec<Sample>,
}

/// Where one picture comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// What was asked for.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: u64,
}

/// All drawings of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// The trained model's, by optimiser steps done.
    pub steps: Vec<(u64, SampleSet)>,
    /// The teacher's, of the same prompts and seeds.
    pub teacher: Option<SampleSet>,
}

impl SampleSet {
    /// Reads what a drawing's folder says; `None` where there is no whole drawing.
    pub fn read(folder: &Path) -> Option<Self> {
        let mut set: Self = serde_json::from_str(&read_text(&folder.join(SET_FILE))).ok()?;
        set.samples.truncate(MAX_PICTURES);
        Some(set)
    }

    /// Writes the drawing as `folder`, which is complete or absent; an older one is replaced.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path, pictures: &[Picture]) -> io::Result<()> {
        let made = atomic::NewFolder::begin(folder)?;
        for (index, picture) in pictures.iter().enumerate() {
            atomic::write(&made.part().join(picture_file(index)), &picture.to_png())?;
        }
        let json = serde_json::to_string_pretty(self).expect("plain fields always serialise");
        atomic::write(&made.part().join(SET_FILE), json.as_bytes())?;
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        made.publish()
    }
}

impl Samples {
    /// The drawings that are whole.
    pub(super) fn read(run: &Path) -> Self {
        let folder = run.join(SAMPLES_FOLDER);
        let teacher = SampleSet::read(&folder.join(TEACHER));
        let drawing = |(step, path): (u64, PathBuf)| Some((step, SampleSet::read(&path)?));
        Self { steps: step_folders(&folder).into_iter().filter_map(drawing).collect(), teacher }
    }
}

/// The drawings' folders by step, in order.
pub fn step_folders(samples: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(samples).into_iter().flatten().flatten();
    let mut folders: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| Some((step_of(entry.file_name().to_str()?)?, entry.path())))
        .filter(|(_, path)| path.is_dir())
        .collect();
    folders.sort();
    folders
}

/// Name of a step's folder; its contact sheet has `.png` after it.
pub fn step_folder(step: u64) -> String {
    format!("step-{step:08}")
}

/// Name of a drawing's picture.
pub fn picture_file(index: usize) -> String {
    format!("{index:03}.png")
}

/// Path of a picture inside the run's folder, from the names in a request; `None` for any other name.
pub fn picture_path(set: &str, file: &str) -> Option<PathBuf> {
    let known = set == TEACHER || step_of(set).is_some();
    let index: usize = file.strip_suffix(".png")?.parse().ok()?;
    (known && picture_file(index) == file).then(|| Path::new(SAMPLES_FOLDER).join(set).join(file))
}

/// The step of a folder that [`step_folder`] named.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step) == name).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(steps: usize) -> SampleSet {
        let sample = Sample { prompt: "a <b>".into(), seed: 7 };
        SampleSet { num_inference_steps: steps, cfg_scale: 1.0, height: 1, width: 1, samples: vec![sample] }
    }

    #[test]
    fn drawings_are_found_by_step_and_replaced_whole() {
        let run = tempfile::tempdir().unwrap();
        let picture = |level: u8| Picture { width: 1, height: 1, rgb: vec![level; 3] };
        let folder = |name: &str| run.path().join(SAMPLES_FOLDER).join(name);
        for (name, steps) in [(step_folder(100), 4), (step_folder(20), 4), (TEACHER.into(), 50)] {
            set(steps).write(&folder(&name), &[picture(1), picture(2)]).unwrap();
        }
        set(8).write(&folder("step-00000020"), &[picture(9)]).unwrap();
        for foreign in ["step-20", "step-00000030", ".step-00000040.part", "other"] {
            std::fs::create_dir_all(folder(foreign)).unwrap();
        }
        let found = Samples::read(run.path());
        assert_eq!(found.steps, [(20, set(8)), (100, set(4))]);
        assert_eq!(found.teacher, Some(set(50)));
        let files = std::fs::read_dir(folder("step-00000020")).unwrap().count();
        assert_eq!(files, 2, "the first drawing's second picture is gone");
        assert_eq!(Picture::load(&folder("step-00000020/000.png")).unwrap(), picture(9));
    }

    #[test]
    fn only_names_of_pictures_lead_to_a_file() {
        let path = Path::new("samples/step-00000010/003.png");
        assert_eq!(picture_path("step-00000010", "003.png").as_deref(), Some(path));
        assert!(picture_path("teacher", "1234.png").is_some());
        for (set, file) in [
            ("..", "000.png"),
            ("teacher", "../run.toml"),
            ("step-10", "000.png"),
            ("step-+0000010", "000.png"),
            ("teacher/..", "000.png"),
            ("teacher", "0.png"),
            ("teacher", "+00.png"),
            ("teacher", "samples.json"),
        ] {
            assert_eq!(picture_path(set, file), None, "{set}/{file}");
        }
    }
}
