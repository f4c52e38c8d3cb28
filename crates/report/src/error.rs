//! What can go wrong while judging pictures and writing a report.

use std::path::PathBuf;

/// An error of this crate, naming the file it is about.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file could not be read.
    #[error("cannot read {}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// A file could not be written; what was there before is unchanged.
    #[error("cannot write {}: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// The judge's file is cut short or of another format.
    #[error("{} is no whole safetensors file: {reason}\nhint: the judge's weights are in assets/judge", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// The reader's reason.
        reason: safetensors::SafeTensorError,
    },
    /// The judge's file holds another network.
    #[error(
        "{} is not the judge's network: missing keys {missing:?}, unknown keys {unknown:?}\nhint: the judge's weights are in assets/judge",
        path.display()
    )]
    Keys {
        /// The file.
        path: PathBuf,
        /// Keys that the network needs and the file lacks.
        missing: Vec<String>,
        /// Keys of the file that the network does not use.
        unknown: Vec<String>,
    },
    /// A tensor of the judge's file has another shape or type.
    #[error("{}: tensor {key} is {found}, expected {expected}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        key: String,
        /// Its type and shape in the file.
        found: String,
        /// The type and shape that the network needs.
        expected: String,
    },
}
