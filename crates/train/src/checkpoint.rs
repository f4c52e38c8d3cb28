//! Checkpoints: folders `checkpoints/step-00001234/` that hold all an exact resume needs.
//!
//! A checkpoint is written beside under another name, synced and renamed, so under its own name it is complete. Its
//! `trainer.json` lists the other files with their hashes: what was damaged later is noticed, and the checkpoint before
//! it is taken.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fewstep_data::atomic;
use fewstep_kernels::Moments;
use fewstep_models::{WeightFiles, WeightType, save_tensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::TrainError;
use crate::host::{HostTensor, HostTensors};

const WEIGHTS: &str = "weights.safetensors";
const MOMENTS: &str = "optimizer.safetensors";
const AVERAGES: &str = "ema.safetensors";
const PROGRESS: &str = "trainer.json";

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
    pub(crate) losses: Vec<f64>,
}

/// All that changes during a run.
#[derive(Debug, PartialEq)]
pub(crate) struct Snapshot {
    /// Where the run stands.
    pub(crate) progress: Progress,
    /// Trained parameters by name.
    pub(crate) weights: HostTensors,
    /// Optimiser moments by parameter name.
    pub(crate) moments: BTreeMap<String, Moments>,
    /// Averaged parameters by name, where the run averages.
    pub(crate) averages: Option<HostTensors>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    progress: Progress,
    /// File name → SHA-256.
    files: BTreeMap<String, String>,
}

/// The checkpoints of one run.
pub(crate) struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// The newest checkpoint that is whole, and what was wrong with newer ones.
pub(crate) struct Found {
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) damaged: Vec<String>,
}

impl Checkpoints {
    /// The checkpoints of a run folder, of which the `keep` newest stay.
    pub(crate) fn new(run: &Path, keep: usize) -> Self {
        Self { folder: run.join("checkpoints"), keep }
    }

    /// Writes a checkpoint and removes the oldest ones; returns its folder.
    ///
    /// # Errors
    /// If a file cannot be written; older checkpoints are untouched then.
    pub(crate) fn save(&self, snapshot: Snapshot) -> Result<PathBuf, TrainError> {
        let path = self.folder.join(format!("step-{:08}", snapshot.progress.step));
        let part = self.folder.join(format!(".step-{:08}.part", snapshot.progress.step));
        let written = write(&part, snapshot).and_then(|()| publish(&part, &path));
        if written.is_err() {
            // What cannot be removed now is removed after the next save.
            let _ = fs::remove_dir_all(&part);
        }
        written?;
        self.remove_old()?;
        Ok(path)
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

    /// The optimiser step of the newest checkpoint, by its name alone.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn newest_step(&self) -> Result<Option<u64>, TrainError> {
        let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        Ok(self.list()?.iter().filter_map(step).max())
    }

    /// Oldest first.
    fn list(&self) -> Result<Vec<PathBuf>, TrainError> {
        self.entries("step-")
    }

    /// Entries whose names start so, sorted.
    fn entries(&self, prefix: &str) -> Result<Vec<PathBuf>, TrainError> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.folder).map_err(TrainError::io(&self.folder))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
        paths.sort();
        Ok(paths)
    }

    /// Removes checkpoints past the number kept, and what killed runs left unfinished.
    fn remove_old(&self) -> Result<(), TrainError> {
        let (paths, unfinished) = (self.list()?, self.entries(".step-")?);
        for old in paths[..paths.len().saturating_sub(self.keep)].iter().chain(&unfinished) {
            fs::remove_dir_all(old).map_err(TrainError::io(old))?;
        }
        Ok(())
    }
}

fn write(folder: &Path, snapshot: Snapshot) -> Result<(), TrainError> {
    remove_if_there(folder)?;
    fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    let mut files = BTreeMap::new();
    let mut save = |name: &str, tensors: HostTensors| -> Result<(), TrainError> {
        let path = folder.join(name);
        let tensors = tensors.into_iter().map(|(key, tensor)| (key, tensor.shape, tensor.values));
        save_tensors(&path, tensors, WeightType::F32, &BTreeMap::new())?;
        files.insert(name.to_owned(), hash(&path)?);
        Ok(())
    };
    save(WEIGHTS, snapshot.weights)?;
    save(MOMENTS, flatten(snapshot.moments))?;
    if let Some(averages) = snapshot.averages {
        save(AVERAGES, averages)?;
    }
    let manifest = Manifest { progress: snapshot.progress, files };
    let json = serde_json::to_string_pretty(&manifest).expect("plain fields always serialise");
    let path = folder.join(PROGRESS);
    atomic::write(&path, json.as_bytes()).map_err(TrainError::io(&path))
}

/// Gives a complete folder its name, durably.
fn publish(part: &Path, path: &Path) -> Result<(), TrainError> {
    // A damaged checkpoint of the same step, which the run came past again.
    remove_if_there(path)?;
    fs::rename(part, path).map_err(TrainError::io(path))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    match cfg!(unix) {
        true => File::open(parent).and_then(|folder| folder.sync_all()).map_err(TrainError::io(parent)),
        false => Ok(()),
    }
}

fn remove_if_there(folder: &Path) -> Result<(), TrainError> {
    match folder.exists() {
        true => fs::remove_dir_all(folder).map_err(TrainError::io(folder)),
        false => Ok(()),
    }
}

/// Reads and checks one checkpoint; the error is the reason for the message.
fn read(folder: &Path) -> Result<Snapshot, String> {
    let in_folder = |reason: String| format!("{}: {reason}", folder.display());
    let json = fs::read_to_string(folder.join(PROGRESS))
        .map_err(|error| in_folder(format!("{PROGRESS}: {error}")))?;
    let manifest: Manifest =
        serde_json::from_str(&json).map_err(|error| in_folder(format!("{PROGRESS}: {error}")))?;
    for (name, expected) in &manifest.files {
        match hash(&folder.join(name)) {
            Ok(found) if found == *expected => {}
            Ok(_) => return Err(in_folder(format!("{name} is not what was written"))),
            Err(error) => return Err(error.to_string()),
        }
    }
    let tensors = |name: &str| read_tensors(&folder.join(name)).map_err(|error| error.to_string());
    let averaged = manifest.files.contains_key(AVERAGES);
    Ok(Snapshot {
        weights: tensors(WEIGHTS)?,
        moments: unflatten(tensors(MOMENTS)?),
        averages: averaged.then(|| tensors(AVERAGES)).transpose()?,
        progress: manifest.progress,
    })
}

fn read_tensors(path: &Path) -> Result<HostTensors, TrainError> {
    let files = WeightFiles::open(path)?;
    let read = |key: &str| -> Result<(String, HostTensor), TrainError> {
        let (shape, values) = files.read(key)?;
        Ok((key.to_owned(), HostTensor { shape, values }))
    };
    files.keys().map(read).collect()
}

fn hash(path: &Path) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(TrainError::io(path))?;
    std::io::copy(&mut file, &mut hash).map_err(TrainError::io(path))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

const FIRST: &str = ".first";
const SECOND: &str = ".second";

fn flatten(moments: BTreeMap<String, Moments>) -> HostTensors {
    let tensor = |values: Vec<f32>| HostTensor { shape: vec![values.len()], values };
    let pair = |(name, moments): (String, Moments)| {
        [
            (format!("{name}{FIRST}"), tensor(moments.first)),
            (format!("{name}{SECOND}"), tensor(moments.second)),
        ]
    };
    moments.into_iter().flat_map(pair).collect()
}

fn unflatten(tensors: HostTensors) -> BTreeMap<String, Moments> {
    let mut moments: BTreeMap<String, Moments> = BTreeMap::new();
    for (key, tensor) in tensors {
        if let Some(name) = key.strip_suffix(FIRST) {
            moments.entry(name.to_owned()).or_default().first = tensor.values;
        } else if let Some(name) = key.strip_suffix(SECOND) {
            moments.entry(name.to_owned()).or_default().second = tensor.values;
        }
    }
    moments
}
