//! Metadata files: which pictures and videos a data set has and what is known of each.
//!
//! A csv, json or jsonl file becomes [`Row`]s of named text values; typed access checks one value and, where it is wrong,
//! names the file, the row and the column.

mod json;
mod media;
mod read;
mod rows;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::inside::is_below;
use crate::{DataError, bounded};
pub use fewstep_flow::noise::RandDevice;
pub use media::Media;
pub use rows::{CaptionedRow, DistillRow, write_captioned_csv, write_distill_csv};

/// The largest metadata file: a few million rows.
const MAX_BYTES: u64 = 1 << 30;

/// The rows of one metadata file.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The file, for messages.
    pub path: Arc<Path>,
    /// Its rows in the file's order.
    pub rows: Vec<Row>,
}

/// One row: named values as text.
#[derive(Clone, Debug)]
pub struct Row {
    /// Counts from 1; a header does not count.
    pub number: usize,
    /// Column name and value, in the file's order. JSON's null is left out; lists and objects are JSON text.
    pub values: Vec<(String, String)>,
    file: Arc<Path>,
}

impl Metadata {
    /// Reads a file whose extension says what it is: csv with a header line, json with a list of objects, or jsonl with
    /// an object per line.
    ///
    /// # Errors
    /// When the file cannot be read, is not UTF-8, or breaks its format's rules.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        Self::parse(path, bounded::read(path, MAX_BYTES).map_err(DataError::io(path))?)
    }

    /// As [`Self::read`], from the bytes of a file; `path` tells the format by its extension and names the file in
    /// errors.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self, DataError> {
        let rows = Self::parse_rows(path, bytes)?.into_iter().collect::<Result<_, _>>()?;
        Ok(Self { rows, path: path.into() })
    }

    /// As [`Self::read`], with what is wrong with a row in its place.
    ///
    /// # Errors
    /// When the file cannot be read, is not UTF-8, or breaks its format's rules as a whole.
    pub fn read_rows(path: &Path) -> Result<Vec<Result<Row, DataError>>, DataError> {
        Self::parse_rows(path, bounded::read(path, MAX_BYTES).map_err(DataError::io(path))?)
    }

    fn parse_rows(path: &Path, bytes: Vec<u8>) -> Result<Vec<Result<Row, DataError>>, DataError> {
        let file: Arc<Path> = path.into();
        let records = read::records(path, bytes)?.into_iter().zip(1..);
        Ok(records.map(|(read, number)| Ok(Row { number, values: read?, file: file.clone() })).collect())
    }

    /// Every row's picture or video and prompt.
    ///
    /// # Errors
    /// For the first row that lacks one of them, or whose file lies outside the base folder.
    pub fn captioned_rows(&self) -> Result<Vec<CaptionedRow>, DataError> {
        self.rows.iter().map(Row::captioned).collect()
    }

    /// Every row as teacher data: picture or video, prompt and the teacher's noise.
    ///
    /// # Errors
    /// For the first row with a missing or malformed value.
    pub fn distill_rows(&self) -> Result<Vec<DistillRow>, DataError> {
        self.rows.iter().map(Row::distill).collect()
    }

    /// The file of every row's picture or video.
    ///
    /// # Errors
    /// For the first row that names none, one outside `base`, or one that is not there.
    pub fn media_files(&self, base: &Path) -> Result<Vec<(Media, PathBuf)>, DataError> {
        self.rows.iter().map(|row| row.media_file(base)).collect()
    }
}

impl Row {
    /// The metadata file this row is from.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// The row as teacher data: picture or video, prompt and the teacher's noise.
    ///
    /// # Errors
    /// For the first missing or malformed value.
    pub fn distill(&self) -> Result<DistillRow, DataError> {
        DistillRow::from_row(self)
    }

    /// The value of a column, if the row has it.
    pub fn get(&self, column: &str) -> Option<&str> {
        self.values.iter().find(|(name, _)| name == column).map(|(_, value)| value.as_str())
    }

    /// The value of a column, which may be empty.
    ///
    /// # Errors
    /// When the row lacks the column.
    pub fn text(&self, column: &str) -> Result<&str, DataError> {
        self.get(column).ok_or_else(|| DataError::MissingColumn {
            path: self.path().into(),
            row: self.number,
            column: column.into(),
            found: self.columns(),
        })
    }

    fn columns(&self) -> Vec<String> {
        self.values.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The value of a column that holds integers from 0.
    ///
    /// # Errors
    /// When it is missing, negative, fractional, too large or no number.
    pub fn integer(&self, column: &str) -> Result<u64, DataError> {
        let text = self.text(column)?;
        text.trim().parse().map_err(|_| self.wrong(column, text, INTEGER))
    }

    /// The value of a column that holds a number from 0.
    ///
    /// # Errors
    /// When it is missing, negative, not finite or no number.
    pub fn number(&self, column: &str) -> Result<f32, DataError> {
        let text = self.text(column)?;
        let number = text.trim().parse().ok().filter(|number: &f32| number.is_finite() && *number >= 0.0);
        number.ok_or_else(|| self.wrong(column, text, NUMBER))
    }

    /// The same of a column that may be missing or empty.
    ///
    /// # Errors
    /// When it holds something else.
    pub fn optional_number(&self, column: &str) -> Result<Option<f32>, DataError> {
        match self.get(column) {
            None | Some("") => Ok(None),
            Some(_) => self.number(column).map(Some),
        }
    }

    /// The row's picture or video and its prompt.
    ///
    /// # Errors
    /// When it lacks one of them, or the file lies outside the base folder.
    pub fn captioned(&self) -> Result<CaptionedRow, DataError> {
        CaptionedRow::from_row(self)
    }

    /// The value of a column that names a file, as written: relative to the data set's base folder.
    ///
    /// # Errors
    /// When it is missing, empty, absolute, leads out of the base folder, or has a backslash in it.
    pub fn relative_path(&self, column: &str) -> Result<&str, DataError> {
        let text = self.text(column)?;
        if is_below(text) { Ok(text) } else { Err(self.wrong(column, text, RELATIVE_PATH)) }
    }

    /// The value of a column that counts something, from 1 to `most`.
    fn count(&self, column: &str, most: usize, kind: Kind) -> Result<usize, DataError> {
        let found = self.integer(column)?;
        let count = usize::try_from(found).ok().filter(|count| (1..=most).contains(count));
        count.ok_or_else(|| self.wrong(column, &found.to_string(), kind))
    }

    fn wrong(&self, column: &str, found: &str, kind: Kind) -> DataError {
        DataError::Value {
            path: self.path().into(),
            row: self.number,
            column: column.into(),
            found: found.into(),
            expected: kind.expected,
            hint: kind.hint,
        }
    }
}

/// What a column holds and what to do when it holds something else.
#[derive(Clone, Copy)]
struct Kind {
    expected: &'static str,
    hint: &'static str,
}

const INTEGER: Kind = Kind {
    expected: "an integer from 0 to 18446744073709551615",
    hint: "write it without sign, decimal point and quotes; pandas turns a column of integers with gaps into fractions",
};
const NUMBER: Kind =
    Kind { expected: "a number from 0", hint: "write it like 1 or 4.5; cfg_scale 1 is guidance off" };
const RELATIVE_PATH: Kind = Kind {
    expected: "a path relative to the dataset base path that does not leave it",
    hint: "move the file below the dataset base path, or name a folder above both as the base path; folders are \
           parted by /",
};
const RAND_DEVICE: Kind =
    Kind { expected: "cpu or cuda", hint: "it names the generator that drew the teacher's noise" };
const STEPS: Kind = Kind {
    expected: "an integer from 1 to 10000",
    hint: "it is the number of sampling steps the student shall take",
};

#[cfg(test)]
mod tests;
