//! The loss log of a run: `loss.csv` and a TensorBoard event file with the same numbers.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fewstep_data::atomic;
use fewstep_data::disk::explained;

use crate::recipe::OutputLayout;
use crate::{TrainError, tensorboard};

/// One line of the log: means and totals since the line before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogLine {
    /// Optimiser steps done.
    pub step: u64,
    /// Epoch of the last of them, from 0.
    pub epoch: u64,
    /// Mean loss.
    pub loss: f64,
    /// Norm of the last step's gradient before clipping.
    pub gradient_norm: f64,
    /// Rate of the last step.
    pub learning_rate: f64,
    /// Samples trained on per second.
    pub samples_per_sec: f64,
}

const PEER_CSV_HEADER: &str = "step,key,value\n";
const CSV_HEADER: &str = "step,epoch,loss,gradient_norm,learning_rate,samples_per_sec\n";

/// The open log files of a run.
pub(crate) struct Log {
    csv: LogFile,
    layout: OutputLayout,
    events: LogFile,
}

/// A file that is replaced once and then grows.
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens a run's log to continue after `step`; lines of later steps, which a resumed run writes again, are cut.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub(crate) fn open(run: &Path, step: u64, layout: OutputLayout) -> Result<Self, TrainError> {
        let csv = run.join("loss.csv");
        let events = run.join("tensorboard/events.out.tfevents.0.fewstep");
        let old_csv = read(&csv)?;
        let old_events = read(&events)?;
        let kept_events = tensorboard::up_to_step(&old_events, step);
        let kept_events = if kept_events.is_empty() { tensorboard::header() } else { kept_events.to_vec() };
        let header = match layout {
            OutputLayout::Fewstep => CSV_HEADER,
            OutputLayout::Diffsynth => PEER_CSV_HEADER,
        };
        let kept_rows = csv_up_to_step(header, &String::from_utf8_lossy(&old_csv), step);
        Ok(Self {
            layout,
            csv: LogFile::replace(csv, kept_rows.as_bytes())?,
            events: LogFile::replace(events, &kept_events)?,
        })
    }

    /// Appends a line to both files.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(crate) fn write(&mut self, line: &LogLine) -> Result<(), TrainError> {
        let LogLine { step, epoch, loss, gradient_norm, learning_rate, samples_per_sec } = *line;
        let row = match self.layout {
            OutputLayout::Fewstep => format!(
                "{step},{epoch},{loss:.6e},{gradient_norm:.6e},{learning_rate:.6e},{samples_per_sec:.3}\n"
            ),
            OutputLayout::Diffsynth => format!("{step},loss,{loss}\n"),
        };
        self.csv.append(row.as_bytes())?;
        let scalars = [
            ("train/loss", loss),
            ("train/gradient_norm", gradient_norm),
            ("train/learning_rate", learning_rate),
            ("train/samples_per_sec", samples_per_sec),
        ];
        self.events.append(&tensorboard::scalars(step, wall_time_secs(), &scalars))
    }

    /// Brings all lines to the disk. Called before a checkpoint, whose run does not write them again.
    ///
    /// # Errors
    /// If the system cannot.
    pub(crate) fn sync(&self) -> Result<(), TrainError> {
        [&self.csv, &self.events].into_iter().try_for_each(LogFile::sync)
    }
}

impl LogFile {
    /// Gives the file its first content.
    pub(crate) fn replace(path: PathBuf, content: &[u8]) -> Result<Self, TrainError> {
        atomic::write(&path, content).map_err(TrainError::io(&path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(TrainError::io(&path))?;
        Ok(Self { path, file })
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| TrainError::io(&self.path)(explained(error, None)))
    }

    fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(TrainError::io(&self.path))
    }
}

/// A file's bytes; none where it is absent.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    match path.exists() {
        true => fs::read(path).map_err(TrainError::io(path)),
        false => Ok(Vec::new()),
    }
}

/// The header and the whole lines up to a step.
fn csv_up_to_step(header: &str, old: &str, last_step: u64) -> String {
    let rows = old.split_inclusive('\n').skip(1).filter(|row| row.ends_with('\n'));
    let step = |row: &str| row.split(',').next()?.parse::<u64>().ok();
    let kept = rows.take_while(|row| step(row).is_some_and(|step| step <= last_step));
    std::iter::once(header).chain(kept).collect()
}

/// Unix time.
pub(crate) fn wall_time_secs() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> LogLine {
        LogLine { step, epoch: 0, loss: 0.5, gradient_norm: 2.0, learning_rate: 1e-4, samples_per_sec: 7.0 }
    }

    #[test]
    fn a_resumed_log_has_each_step_once() {
        let run = tempfile::tempdir().unwrap();
        let mut log = Log::open(run.path(), 0, OutputLayout::Fewstep).unwrap();
        for step in [10, 20, 30] {
            log.write(&line(step)).unwrap();
        }
        drop(log);
        let events = run.path().join("tensorboard/events.out.tfevents.0.fewstep");
        let whole = fs::read(&events).unwrap().len();
        OpenOptions::new().append(true).open(run.path().join("loss.csv")).unwrap().write_all(b"4").unwrap();

        let mut log = Log::open(run.path(), 20, OutputLayout::Fewstep).unwrap();
        log.write(&line(30)).unwrap();
        let csv = fs::read_to_string(run.path().join("loss.csv")).unwrap();
        let row = |step| format!("{step},0,5.000000e-1,2.000000e0,1.000000e-4,7.000\n");
        assert_eq!(csv, format!("{CSV_HEADER}{}{}{}", row(10), row(20), row(30)));
        assert_eq!(fs::read(&events).unwrap().len(), whole);
    }
}
