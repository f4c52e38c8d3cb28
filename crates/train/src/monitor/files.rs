//! What the monitor leaves in a run's folder: `monitor.csv`, the same numbers for TensorBoard, and the name of the best
//! checkpoint.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fewstep_data::atomic;

use super::history::{Check, best, bests};
use crate::{TrainError, tensorboard};

const CSV_HEADER: &str =
    "step,paired_error,saturation_ratio,contrast_ratio,sharpness_ratio,diversity_ratio,best\n";

/// The monitor's files of a run.
pub(super) struct Files {
    csv: PathBuf,
    events: PathBuf,
    best: PathBuf,
}

impl Files {
    /// The files of a run that continues after these looks; later ones, which it makes again, are cut.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub(super) fn open(run: &Path, checks: &[Check]) -> Result<Self, TrainError> {
        let files = Self {
            csv: run.join("monitor.csv"),
            // A folder of its own: TensorBoard takes one file per folder.
            events: run.join("tensorboard/monitor/events.out.tfevents.0.fewstep"),
            best: run.join("checkpoints/best.json"),
        };
        let old = match files.events.exists() {
            true => fs::read(&files.events).map_err(TrainError::io(&files.events))?,
            false => Vec::new(),
        };
        let kept = checks.last().map_or(&[][..], |last| tensorboard::up_to_step(&old, last.step));
        let kept = if kept.is_empty() { tensorboard::header() } else { kept.to_vec() };
        write(&files.events, &kept)?;
        write(&files.csv, csv(checks).as_bytes())?;
        files.mark_best(checks)?;
        Ok(files)
    }

    /// Writes all looks, of which the last is new.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn add(&self, checks: &[Check]) -> Result<(), TrainError> {
        write(&self.csv, csv(checks).as_bytes())?;
        let Some(new) = checks.last() else { return Ok(()) };
        let scalars = numbers(new).map(|(name, value)| (format!("monitor/{name}"), value));
        let scalars: Vec<(&str, f64)> =
            scalars.iter().filter_map(|(name, value)| Some((name.as_str(), f64::from((*value)?)))).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64());
        let record = tensorboard::scalars(new.step, now, &scalars);
        let file = OpenOptions::new().append(true).open(&self.events);
        file.and_then(|mut file| file.write_all(&record)).map_err(TrainError::io(&self.events))
    }

    /// Names the best checkpoint, once it is there.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn mark_best(&self, checks: &[Check]) -> Result<(), TrainError> {
        let Some(best) = best(checks) else { return Ok(()) };
        let named = serde_json::json!({
            "step": best.step,
            "checkpoint": format!("step-{:08}", best.step),
            "paired_error": best.paired_error,
        });
        write(&self.best, format!("{named:#}\n").as_bytes())
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), TrainError> {
    atomic::write(path, content).map_err(TrainError::io(path))
}

/// The measures of a look by the names of their columns.
fn numbers(check: &Check) -> [(&'static str, Option<f32>); 5] {
    [
        ("paired_error", Some(check.paired_error)),
        ("saturation_ratio", Some(check.saturation_ratio)),
        ("contrast_ratio", Some(check.contrast_ratio)),
        ("sharpness_ratio", Some(check.sharpness_ratio)),
        ("diversity_ratio", check.diversity_ratio),
    ]
}

/// A line per look; the last column is 1 where it was the best so far.
fn csv(checks: &[Check]) -> String {
    let row = |(check, best): (&Check, bool)| {
        let cells =
            numbers(check).map(|(_, value)| value.map_or(String::new(), |value| format!("{value:.6e}")));
        format!("{},{},{}\n", check.step, cells.join(","), u8::from(best))
    };
    std::iter::once(CSV_HEADER.to_owned()).chain(checks.iter().zip(bests(checks)).map(row)).collect()
}
