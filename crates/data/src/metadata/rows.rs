//! Rows with a meaning: a captioned picture or video, and a teacher's one with the noise it came from.

use std::path::Path;

use fewstep_flow::MAX_STEPS;
use fewstep_flow::noise::RandDevice;

use super::{Media, RAND_DEVICE, Row, STEPS};
use crate::{DataError, atomic};

/// A captioned picture or video.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionedRow {
    /// What it is, which is the column that names it.
    pub media: Media,
    /// Its file, relative to the data set's base folder.
    pub file: String,
    /// The caption; may be empty.
    pub prompt: String,
    /// How many frames of a video are trained on instead of the run's number; the column may be left out.
    pub num_frames: Option<usize>,
}

/// A teacher's picture or video and how the student shall draw it. Other fields' names are the columns' names.
#[derive(Clone, Debug, PartialEq)]
pub struct DistillRow {
    /// What it is, which is the column that names it.
    pub media: Media,
    /// Its file, relative to the data set's base folder.
    pub file: String,
    /// What both teacher and student are asked for; may be empty.
    pub prompt: String,
    /// The seed of the initial noise.
    pub seed: u64,
    /// The generator of the initial noise.
    pub rand_device: RandDevice,
    /// The student's sampling steps, at least 1 and at most [`MAX_STEPS`].
    pub num_inference_steps: usize,
    /// The student's guidance; 1 is off.
    pub cfg_scale: f32,
    /// The guidance scale that the student's denoiser is told, where it takes one; the column may be left out.
    pub embedded_guidance: Option<f32>,
    /// The frames of a video; the column may be left out.
    pub num_frames: Option<usize>,
}

impl CaptionedRow {
    /// A row of a picture.
    pub fn of_image(file: impl Into<String>, prompt: impl Into<String>) -> Self {
        Self { media: Media::Image, file: file.into(), prompt: prompt.into(), num_frames: None }
    }

    pub(super) fn from_row(row: &Row) -> Result<Self, DataError> {
        let (media, file) = row.media()?;
        Ok(Self {
            media,
            file: file.into(),
            prompt: row.text("prompt")?.into(),
            num_frames: row.num_frames()?,
        })
    }
}

impl DistillRow {
    pub(super) fn from_row(row: &Row) -> Result<Self, DataError> {
        let (media, file) = row.media()?;
        Ok(Self {
            media,
            file: file.into(),
            prompt: row.text("prompt")?.into(),
            seed: row.integer("seed")?,
            rand_device: rand_device(row, "rand_device")?,
            num_inference_steps: steps(row, "num_inference_steps")?,
            cfg_scale: row.number("cfg_scale")?,
            embedded_guidance: row.optional_number("embedded_guidance")?,
            num_frames: row.num_frames()?,
        })
    }
}

fn rand_device(row: &Row, column: &str) -> Result<RandDevice, DataError> {
    let found = row.text(column)?;
    found.parse().map_err(|_| row.wrong(column, found, RAND_DEVICE))
}

fn steps(row: &Row, column: &str) -> Result<usize, DataError> {
    row.count(column, MAX_STEPS, STEPS)
}

/// Writes teacher data as csv, atomically: `image` or `video`, `prompt`, `seed`, `rand_device`, `num_inference_steps` and
/// `cfg_scale`, and of `embedded_guidance` and `num_frames` those for which a row has a value.
///
/// # Errors
/// When the file cannot be written.
pub fn write_distill_csv(path: &Path, rows: &[DistillRow]) -> Result<(), DataError> {
    let mut columns = media_columns(rows.iter().map(|row| (row.media, row.file.as_str())).collect());
    columns.push(("prompt", rows.iter().map(|row| row.prompt.clone()).collect()));
    columns.push(("seed", rows.iter().map(|row| row.seed.to_string()).collect()));
    columns.push(("rand_device", rows.iter().map(|row| row.rand_device.to_string()).collect()));
    columns
        .push(("num_inference_steps", rows.iter().map(|row| row.num_inference_steps.to_string()).collect()));
    columns.push(("cfg_scale", rows.iter().map(|row| decimal(row.cfg_scale)).collect()));
    let told = rows.iter().map(|row| row.embedded_guidance.map(decimal));
    columns.extend(optional("embedded_guidance", told.collect()));
    columns.extend(optional("num_frames", rows.iter().map(|row| row.num_frames.map(whole)).collect()));
    write_csv(path, &columns, rows.len())
}

/// Writes captioned pictures or videos as csv, atomically: `image` or `video` and `prompt`, and `num_frames` where a row
/// has a value for it.
///
/// # Errors
/// When the file cannot be written.
pub fn write_captioned_csv(path: &Path, rows: &[CaptionedRow]) -> Result<(), DataError> {
    let mut columns = media_columns(rows.iter().map(|row| (row.media, row.file.as_str())).collect());
    columns.push(("prompt", rows.iter().map(|row| row.prompt.clone()).collect()));
    columns.extend(optional("num_frames", rows.iter().map(|row| row.num_frames.map(whole)).collect()));
    write_csv(path, &columns, rows.len())
}

/// A column's name and its values.
type Column = (&'static str, Vec<String>);

/// A column for pictures, one for videos, or both; a file without rows has the first.
fn media_columns(files: Vec<(Media, &str)>) -> Vec<Column> {
    let of = |media: Media| {
        let own =
            files.iter().map(move |(of, file)| if *of == media { file.to_string() } else { String::new() });
        (media.column(), own.collect::<Vec<_>>())
    };
    let is_used = |media: &Media| {
        files.iter().any(|(of, _)| of == media) || (files.is_empty() && *media == Media::Image)
    };
    Media::ALL.into_iter().filter(is_used).map(of).collect()
}

/// A column that is left out when no row has a value for it.
fn optional(name: &'static str, values: Vec<Option<String>>) -> Option<Column> {
    let is_used = values.iter().any(Option::is_some);
    is_used.then(|| (name, values.into_iter().map(Option::unwrap_or_default).collect()))
}

/// A number with a decimal point, as the peers write fractions.
fn decimal(number: f32) -> String {
    format!("{number:?}")
}

fn whole(number: usize) -> String {
    number.to_string()
}

fn write_csv(path: &Path, columns: &[Column], rows: usize) -> Result<(), DataError> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let in_memory = "every record has a value for every column, and writing to memory cannot fail";
    writer.write_record(columns.iter().map(|(name, _)| *name)).expect(in_memory);
    for row in 0..rows {
        writer.write_record(columns.iter().map(|(_, values)| &values[row])).expect(in_memory);
    }
    atomic::write(path, &writer.into_inner().expect(in_memory)).map_err(DataError::io(path))
}
