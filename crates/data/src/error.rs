//! What can go wrong with metadata, pictures and folders of them.

use std::io;
use std::path::{Path, PathBuf};

use crate::image::{MAX_PIXELS, MAX_SIDE_PX, Size};

/// Errors of reading and writing data sets. Where a way out is known, the message's last line is a `hint:`.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// A group that no concept of the bundled set has.
    #[error("no emoji group `{found}`, expected one of {}", expected.join(", "))]
    Group {
        /// The group asked for.
        found: String,
        /// The groups there are.
        expected: Vec<String>,
    },
    /// A provenance file that does not parse.
    #[error("{}: no valid provenance: {reason}\nhint: the file was changed by hand; generate the data set again", path.display())]
    Provenance {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        reason: String,
    },
    /// A metadata file of a format that is not read.
    #[error("{}: no metadata format: found extension `{found}`, expected csv, json or jsonl", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its extension.
        found: String,
    },
    /// A metadata or label file that breaks its format's rules.
    #[error("{}{}: {reason}", path.display(), at_row(*row))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The row, from 1, when the fault lies in one.
        row: Option<usize>,
        /// What is wrong, found against expected.
        reason: String,
    },
    /// A row without a column that is needed.
    #[error("{}, row {row}: column `{column}` is missing; found {}\nhint: {}", path.display(), names(found), column_hint(column))]
    MissingColumn {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column needed.
        column: String,
        /// The columns the row has.
        found: Vec<String>,
    },
    /// A value that is not what its column holds.
    #[error("{}, row {row}, column `{column}`: found `{found}`, expected {expected}\nhint: {hint}", path.display())]
    Value {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column.
        column: String,
        /// The value found.
        found: String,
        /// What the column holds.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },
    /// A row that names a picture that is not there.
    #[error(
        "{}, row {row}, column `{column}`: found no file {}\nhint: pictures are looked for relative to the dataset base path",
        path.display(),
        image.display()
    )]
    MissingImage {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column that names the picture.
        column: String,
        /// Where it was looked for.
        image: PathBuf,
    },
    /// A file of a data set that is a link to somewhere else, or lies below one.
    #[error(
        "{}: leads by a link to {}, outside of the dataset base path {}\nhint: copy it below the dataset base path, or name \
         a folder above both as the base path",
        path.display(),
        target.display(),
        base.display()
    )]
    Outside {
        /// The file as it is named.
        path: PathBuf,
        /// Where it really is.
        target: PathBuf,
        /// The data set's folder.
        base: PathBuf,
    },
    /// A row of distillation data whose picture is not of the size it would be trained at.
    #[error(
        "{}, row {row}: {} is {found} px, but this run trains at {expected} px and would resize it; distillation needs the \
         teacher's own pixels\nhint: generate the pictures at {expected}, or pass --height {} --width {}",
        path.display(),
        image.display(),
        found.height,
        found.width
    )]
    WouldResize {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The picture.
        image: PathBuf,
        /// Its size.
        found: Size,
        /// The size of the run.
        expected: Size,
    },
    /// A picture too small for the family's division factor.
    #[error(
        "a picture of {found} px rounds down to nothing; expected at least {division} px on each side\nhint: give the height and the width to scale it to"
    )]
    TooSmall {
        /// The picture's size.
        found: Size,
        /// What sides are rounded down to a multiple of.
        division: usize,
    },
    /// A picture with too many pixels to be decoded safely.
    #[error(
        "{}: found a picture of {found} px, expected at most {MAX_SIDE_PX} px on each side and {MAX_PIXELS} px in \
         all\nhint: scale it down",
        path.display()
    )]
    TooLarge {
        /// The picture.
        path: PathBuf,
        /// Its size as its header states it.
        found: Size,
    },
    /// A picture so narrow that it would have to grow out of all bounds to cover its target.
    #[error(
        "a picture of {found} px scaled until it covers {target} px has more than {MAX_PIXELS} px\nhint: crop it to a \
         shape that is less narrow"
    )]
    TooNarrow {
        /// The picture's size.
        found: Size,
        /// The size it shall have.
        target: Size,
    },
    /// A file that is no picture, or a damaged one.
    #[error("{}: no readable picture: {reason}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// The decoder's reason.
        reason: String,
    },
    /// An output folder that already holds something.
    #[error("{}: the folder is not empty\nhint: give another folder, or remove this one", path.display())]
    FolderTaken {
        /// The folder.
        path: PathBuf,
    },
}

impl DataError {
    /// For `map_err`: names the file in front of the system's reason.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |reason| Self::Io { path: path.to_path_buf(), reason }
    }

    /// An error that does not know where it happened, with the row in front.
    pub(crate) fn at_row(self, path: &Path, row: usize) -> Self {
        Self::Malformed { path: path.to_path_buf(), row: Some(row), reason: self.to_string() }
    }
}

fn at_row(row: Option<usize>) -> String {
    row.map(|row| format!(", row {row}")).unwrap_or_default()
}

fn names(columns: &[String]) -> String {
    if columns.is_empty() { "no columns".into() } else { columns.join(", ") }
}

/// The columns that only teacher data has are written by one command.
fn column_hint(column: &str) -> String {
    match column {
        "seed" | "rand_device" | "num_inference_steps" | "cfg_scale" => {
            "distillation needs the teacher's settings of every picture; `generate` writes them".into()
        }
        _ => format!("add a column `{column}`; names are compared letter by letter"),
    }
}
