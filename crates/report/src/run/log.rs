//! `log.jsonl`: what happened in a run, one JSON object per line.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The log's name inside a run folder.
pub const LOG_FILE: &str = "log.jsonl";

/// Bytes read from the end of a log; what lies before is not shown.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    /// What happened; its name is the key `kind`, its values are further keys.
    #[serde(flatten)]
    pub what: Happening,
    /// Optimiser steps done then.
    pub step: u64,
    /// When: Unix time in seconds.
    pub time: f64,
}

/// What a line of the log tells. Numbers that are not finite are `null` in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Happening {
    /// A run began, or continued after the line's step.
    Started {
        /// Optimiser steps of the whole run.
        total_steps: u64,
        /// Optimiser steps per epoch.
        steps_per_epoch: u64,
        /// Rows of the data set.
        rows: usize,
        /// Numbers that learn.
        trained_parameters: usize,
        /// Numbers in all.
        parameters: usize,
        /// Program, version and commit.
        version: String,
    },
    /// Means and totals of the steps since the line of this kind before.
    Train {
        /// Epoch, from 0.
        epoch: u64,
        /// Mean loss.
        loss: Option<f64>,
        /// Norm of the last step's gradient before clipping.
        gradient_norm: Option<f64>,
        /// Rate of the last step.
        learning_rate: f64,
        /// Samples trained on per second.
        samples_per_sec: Option<f64>,
        /// Memory of the process in bytes, where the system tells it.
        memory_bytes: Option<u64>,
    },
    /// The monitor looked at held-out prompts. Ratios are to its reference.
    Monitor {
        /// Mean squared error.
        paired_error: f32,
        /// Of saturation.
        saturation_ratio: f32,
        /// Of contrast.
        contrast_ratio: f32,
        /// Of sharpness.
        sharpness_ratio: f32,
        /// Of diversity, where it can be told.
        diversity_ratio: Option<f32>,
        /// Whether the pictures are the best so far.
        is_best: bool,
        /// The same as a sentence.
        text: String,
    },
    /// A sentence for the person who watches.
    Message {
        /// It.
        text: String,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Its folder, seen from the run's, as all paths here.
        path: String,
    },
    /// Sample pictures are complete.
    Samples {
        /// Their contact sheet.
        path: String,
    },
    /// All steps are done and the result is written.
    Finished {
        /// The file or folder.
        path: String,
    },
    /// The run was stopped; the same command continues it.
    Stopped,
    /// The run ended by an error.
    Failed {
        /// It.
        text: String,
    },
    /// A kind this version does not know.
    #[serde(other)]
    Other,
}

/// The lines of a log that can be read; the last may be half written.
pub(super) fn read(path: &Path) -> Vec<LogEntry> {
    let text = read_end(path, MAX_LOG_BYTES).unwrap_or_default();
    text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// At most so many bytes from the end of a file.
fn read_end(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(max_bytes);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_with_its_kind_and_reads_back() {
        let entry = LogEntry {
            what: Happening::Train {
                epoch: 1,
                loss: Some(0.25),
                gradient_norm: None,
                learning_rate: 1e-4,
                samples_per_sec: Some(3.0),
                memory_bytes: Some(1 << 33),
            },
            step: 20,
            time: 1.5e9,
        };
        let line = serde_json::to_string(&entry).unwrap();
        assert_eq!(
            line,
            r#"{"kind":"train","epoch":1,"loss":0.25,"gradient_norm":null,"learning_rate":0.0001,"samples_per_sec":3.0,"memory_bytes":8589934592,"step":20,"time":1500000000.0}"#
        );
        assert_eq!(serde_json::from_str::<LogEntry>(&line).unwrap(), entry);
    }

    #[test]
    fn half_lines_foreign_lines_and_unknown_kinds_do_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG_FILE);
        let whole = r#"{"kind":"stopped","step":3,"time":1.0}"#;
        let unknown = r#"{"kind":"eclipse","paired_error":0.5,"step":3,"time":1.0}"#;
        std::fs::write(&path, format!("{whole}\nnot json\n\u{0}\n{unknown}\n{}", &whole[..20])).unwrap();
        let kinds: Vec<Happening> = read(&path).into_iter().map(|entry| entry.what).collect();
        assert_eq!(kinds, [Happening::Stopped, Happening::Other]);
        assert_eq!(read(&folder.path().join("absent")), []);
    }

    #[test]
    fn of_a_giant_log_the_end_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG_FILE);
        std::fs::write(&path, b"abcdef\nghi").unwrap();
        assert_eq!(read_end(&path, 5).unwrap(), b"f\nghi");
        assert_eq!(read_end(&path, 100).unwrap(), b"abcdef\nghi");
    }
}
