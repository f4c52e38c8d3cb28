//! Checkpoints: folders `checkpoints/step-00001234/` that hold all an exact resume needs.
//!
//! A checkpoint is written beside under another name, synced and renamed, so under its own name it is complete. Its
//! `files.json` lists the other files with their hashes: what was damaged later is noticed, and the checkpoint before
//! it is taken.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fewstep_data::atomic::{self, NewFolder};
use fewstep_models::{Numbers, WeightFiles, WeightType, read_numbers, save_numbers, save_tensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::guard::GuardState;
use crate::host::{HostTensor, HostTensors};
use crate::monitor::Check;
use crate::recipe::Recipe;
use crate::update::SavedState;
use crate::{TrainError, exact_floats, hash, monitor};

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGES: &str = "ema.safetensors";
const PROGRESS: &str = "trainer.json";
const MANIFEST: &str = "files.json";

/// Where a run stands between two optimiser steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Optimiser steps done, skipped ones included. Data order and noise follow from it.
    pub(crate) step: u64,
    /// Steps that moved the weights.
    pub(crate) updates: u64,
    /// Skipped steps since the last that did.
    pub(crate) skipped_in_a_row: u32,
    /// Losses since the last line of the log, so that a resumed log has the same means.
    #[serde(with = "exact_floats")]
    pub(crate) losses: Vec<f64>,
    /// What the guards remember.
    #[serde(default)]
    pub(crate) guard: GuardState,
    /// What the monitor saw.
    #[serde(default)]
    pub(crate) checks: Vec<Check>,
}

impl Progress {
    /// Steps whose checkpoints the run still needs, however old: the one to go back to, and the best one.
    fn needed(&self) -> Vec<u64> {
        let best = monitor::best(&self.checks).map(|check| check.step);
        self.guard.good.into_iter().chain(best).collect()
    }
}

/// All that changes during a run.
#[derive(Debug, PartialEq)]
pub(crate) struct Snapshot<'a> {
    /// Where the run stands.
    pub(crate) progress: Progress,
    /// Trained parameters by name.
    pub(crate) weights: HostTensors,
    /// The optimiser's state.
    pub(crate) optimizer: SavedState<'a>,
    /// Averaged parameters by name, where the run averages.
    pub(crate) averages: Option<HostTensors>,
}

impl Snapshot<'_> {
    /// Bytes of its numbers, about what its files need.
    fn bytes(&self) -> u64 {
        let tensors = self.weights.values().chain(self.averages.iter().flat_map(BTreeMap::values));
        let numbers: usize = tensors.map(|tensor| tensor.values.len()).sum();
        (size_of::<f32>() * numbers) as u64 + self.optimizer.values().map(Numbers::size_bytes).sum::<u64>()
    }
}

/// File name → SHA-256 of every file of a checkpoint but the one that holds this.
type Manifest = BTreeMap<String, String>;

/// The checkpoints of one run.
pub(crate) struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// The newest checkpoint that is whole, and what was wrong with newer ones.
pub(crate) struct Found {
    pub(crate) snapshot: Option<Snapshot<'static>>,
    pub(crate) damaged: Vec<String>,
}

impl Checkpoints {
    /// The checkpoints of a recipe's run folder, of which the `keep` newest stay, and those that [`Progress::needed`]
    /// names.
    pub(crate) fn new(recipe: &Recipe) -> Self {
        Self { folder: recipe.output_path.join("checkpoints"), keep: recipe.keep }
    }

    /// Writes a checkpoint and removes the oldest ones; returns its folder.
    ///
    /// # Errors
    /// If a file cannot be written; older checkpoints are untouched then.
    pub(crate) fn save(&self, snapshot: Snapshot<'_>) -> Result<PathBuf, TrainError> {
        let (step, needed_bytes) = (snapshot.progress.step, snapshot.bytes());
        self.save_new(snapshot).map_err(|reason| {
            let reason = Box::new(reason);
            TrainError::NotSaved {
                step,
                needed_bytes,
                reason,
                newest: self.list().ok().and_then(|mut all| all.pop()),
            }
        })
    }

    fn save_new(&self, snapshot: Snapshot<'_>) -> Result<PathBuf, TrainError> {
        let path = self.path(snapshot.progress.step);
        let needed: Vec<PathBuf> =
            snapshot.progress.needed().into_iter().map(|step| self.path(step)).collect();
        let made = NewFolder::begin(&path).map_err(TrainError::io(&path))?;
        write(made.part(), snapshot)?;
        // There may be a damaged checkpoint of the same step, which the run came past again.
        made.replace().map_err(TrainError::io(&path))?;
        self.remove_old(&needed)?;
        Ok(path)
    }

    /// Reads the checkpoint of a step.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub(crate) fn load(&self, step: u64) -> Result<Snapshot<'static>, String> {
        read(&self.path(step))
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}"))
    }

    /// Reads the newest checkpoint that is whole.
    ///
    /// # Errors
    /// If there are checkpoints and all are damaged.
    pub(crate) fn load_newest(&self) -> Result<Found, TrainError> {
        let mut damaged = Vec::new();
        for path in self.list()?.into_iter().rev() {
            match read(&path) {
                Ok(snapshot) => return Ok(Found { snapshot: Some(snapshot), damaged }),
                Err(reason) => damaged.push(reason),
            }
        }
        match damaged.is_empty() {
            true => Ok(Found { snapshot: None, damaged }),
            false => Err(TrainError::Damaged { path: self.folder.clone(), reasons: damaged }),
        }
    }

    /// The step of the newest checkpoint, whole or not; 0 where there is none.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn newest_step(&self) -> Result<u64, TrainError> {
        let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        Ok(self.list()?.last().and_then(step).unwrap_or(0))
    }

    /// Oldest first.
    fn list(&self) -> Result<Vec<PathBuf>, TrainError> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.folder).map_err(TrainError::io(&self.folder))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")));
        paths.sort();
        Ok(paths)
    }

    /// Removes checkpoints past the number kept that are not needed.
    fn remove_old(&self, needed: &[PathBuf]) -> Result<(), TrainError> {
        let paths = self.list()?;
        let past = paths[..paths.len().saturating_sub(self.keep)].iter();
        for old in past.filter(|path| !needed.contains(path)) {
            atomic::remove_folder(old).map_err(TrainError::io(old))?;
        }
        Ok(())
    }
}

fn write(folder: &Path, snapshot: Snapshot<'_>) -> Result<(), TrainError> {
    let mut manifest = Manifest::new();
    let mut save = |name: &str, tensors: HostTensors| -> Result<(), TrainError> {
        let path = folder.join(name);
        let tensors = tensors.into_iter().map(|(key, tensor)| (key, tensor.shape, tensor.values));
        save_tensors(&path, tensors, WeightType::F32, &BTreeMap::new())?;
        manifest.insert(name.to_owned(), hash::of_file(&path)?);
        Ok(())
    };
    save(WEIGHTS, snapshot.weights)?;
    if let Some(averages) = snapshot.averages {
        save(AVERAGES, averages)?;
    }
    let path = folder.join(OPTIMIZER);
    save_numbers(&path, &snapshot.optimizer)?;
    manifest.insert(OPTIMIZER.to_owned(), hash::of_file(&path)?);
    let progress = folder.join(PROGRESS);
    write_json(&progress, &snapshot.progress)?;
    manifest.insert(PROGRESS.to_owned(), hash::of_file(&progress)?);
    write_json(&folder.join(MANIFEST), &manifest)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    let json = serde_json::to_string_pretty(value).expect("plain fields always serialise");
    atomic::write(path, json.as_bytes()).map_err(TrainError::io(path))
}

/// Reads and checks one checkpoint; the error is the reason for the message.
fn read(folder: &Path) -> Result<Snapshot<'static>, String> {
    let manifest: Manifest = read_json(&folder.join(MANIFEST))?;
    for (name, expected) in &manifest {
        let path = folder.join(name);
        if hash::of_file(&path).map_err(|error| error.to_string())? != *expected {
            return Err(format!("{}: not what was written", path.display()));
        }
    }
    let tensors = |name: &str| read_tensors(&folder.join(name)).map_err(|error| error.to_string());
    let averaged = manifest.contains_key(AVERAGES);
    Ok(Snapshot {
        weights: tensors(WEIGHTS)?,
        optimizer: read_numbers(&folder.join(OPTIMIZER)).map_err(|error| error.to_string())?,
        averages: averaged.then(|| tensors(AVERAGES)).transpose()?,
        progress: read_json(&folder.join(PROGRESS))?,
    })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let in_file = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    let json = fs::read_to_string(path).map_err(|error| in_file(&error))?;
    serde_json::from_str(&json).map_err(|error| in_file(&error))
}

fn read_tensors(path: &Path) -> Result<HostTensors, TrainError> {
    let files = WeightFiles::open(path)?;
    let read = |key: &str| -> Result<(String, HostTensor), TrainError> {
        let (shape, values) = files.read(key)?;
        Ok((key.to_owned(), HostTensor { shape, values }))
    };
    files.keys().map(read).collect()
}
