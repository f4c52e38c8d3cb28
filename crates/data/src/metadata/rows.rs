//! Rows with a meaning: a captioned picture, and a teacher's picture with the noise it came from.

use std::path::Path;

use fewstep_flow::MAX_STEPS;
use fewstep_flow::noise::RandDevice;
use serde::{Deserialize, Serialize};

use super::{RAND_DEVICE, Row, STEPS};
use crate::{DataError, atomic};

/// A captioned picture. Its field names are the columns' names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// The picture, relative to the data set's base folder.
    pub image: String,
    /// The caption; may be empty.
    pub prompt: String,
}

/// A teacher's picture and how the student shall draw it. Its field names are the columns' names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DistillRow {
    /// The picture, relative to the data set's base folder.
    pub image: String,
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
}

/// A column that only some models have a use for.
const TOLD: &str = "embedded_guidance";

impl ImageRow {
    pub(super) fn from_row(row: &Row) -> Result<Self, DataError> {
        Ok(Self { image: row.image("image")?.into(), prompt: row.text("prompt")?.into() })
    }
}

impl DistillRow {
    pub(super) fn from_row(row: &Row) -> Result<Self, DataError> {
        Ok(Self {
            image: row.image("image")?.into(),
            prompt: row.text("prompt")?.into(),
            seed: row.integer("seed")?,
            rand_device: rand_device(row, "rand_device")?,
            num_inference_steps: steps(row, "num_inference_steps")?,
            cfg_scale: row.number("cfg_scale")?,
            embedded_guidance: row.optional_number(TOLD)?,
        })
    }
}

fn rand_device(row: &Row, column: &str) -> Result<RandDevice, DataError> {
    let found = row.text(column)?;
    found.parse().map_err(|_| row.wrong(column, found, RAND_DEVICE))
}

fn steps(row: &Row, column: &str) -> Result<usize, DataError> {
    let found = row.integer(column)?;
    usize::try_from(found)
        .ok()
        .filter(|steps| (1..=MAX_STEPS).contains(steps))
        .ok_or_else(|| row.wrong(column, &found.to_string(), STEPS))
}

/// Writes teacher data as csv, atomically, with [`DistillRow`]'s fields as columns in their order; the last one where a
/// row has a value for it.
///
/// # Errors
/// When the file cannot be written.
pub fn write_distill_csv(path: &Path, rows: &[DistillRow]) -> Result<(), DataError> {
    let header = ["image", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", TOLD];
    if rows.iter().any(|row| row.embedded_guidance.is_some()) {
        return write_csv(path, &header, rows);
    }
    let others = |row: &DistillRow| {
        let (image, prompt) = (row.image.clone(), row.prompt.clone());
        (image, prompt, row.seed, row.rand_device, row.num_inference_steps, row.cfg_scale)
    };
    write_csv(path, &header[..6], &rows.iter().map(others).collect::<Vec<_>>())
}

/// Writes captioned pictures as csv, atomically, with [`ImageRow`]'s fields as columns in their order.
///
/// # Errors
/// When the file cannot be written.
pub fn write_image_csv(path: &Path, rows: &[ImageRow]) -> Result<(), DataError> {
    write_csv(path, &["image", "prompt"], rows)
}

/// The header is written even when there are no rows, which serde alone would not do.
fn write_csv(path: &Path, header: &[&str], rows: &[impl Serialize]) -> Result<(), DataError> {
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    let in_memory = "rows of plain fields always serialise, and writing to memory cannot fail";
    writer.write_record(header).expect(in_memory);
    for row in rows {
        writer.serialize(row).expect(in_memory);
    }
    atomic::write(path, &writer.into_inner().expect(in_memory)).map_err(DataError::io(path))
}
