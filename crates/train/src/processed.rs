//! The first half of a split task: a data set as text states and latents on disk, so that the second half needs no text
//! encoder and no autoencoder.
//!
//! A folder holds `latents.safetensors` and `text.safetensors`, where the model has pooled states `pooled.safetensors`
//! too, whose keys are numbers, and `processed.json` with the rows that refer to them. It is written last: a folder without it is no data set. Tensors go from where they are to the file
//! one by one, and from the file to the batches that need them: they are never in memory together.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewstep_data::atomic;
use fewstep_flow::noise::RandDevice;
use fewstep_models::{Extent, ModelError, ModelSource, WeightFiles, WeightType, save_streamed, weights_hash};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::dataset::{Dataset, Group, Sample, Tables};
use crate::place::Place;
use crate::recipe::{Objective, Recipe};

/// The file of the rows.
pub(crate) const ROWS: &str = "processed.json";
const LATENTS: &str = "latents.safetensors";
const TEXT: &str = "text.safetensors";
const POOLED: &str = "pooled.safetensors";

/// The rows, and what they were made with and for.
#[derive(Serialize, Deserialize)]
struct Processed {
    /// Program, version and commit.
    version: String,
    /// What the rows are for: the name of a whole task.
    task: String,
    /// The model that encoded.
    model: String,
    /// SHA-256 of its weights.
    model_hash: String,
    /// The recipe, as TOML.
    recipe: String,
    /// The prompts, the empty one first.
    prompts: Vec<String>,
    rows: Vec<ProcessedRow>,
}

#[derive(Serialize, Deserialize)]
struct ProcessedRow {
    /// Key of its latents.
    latents: usize,
    /// Index of its prompt, and key of its text states.
    prompt: usize,
    height: usize,
    width: usize,
    /// Of a video.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_frames: Option<usize>,
    seed: Option<u64>,
    rand_device: RandDevice,
    num_inference_steps: usize,
    cfg_scale: f32,
    /// Absent in files older than the choice.
    #[serde(default)]
    embedded_guidance: Option<f32>,
}

/// Writes a prepared data set into the recipe's output folder; returns the folder.
///
/// # Errors
/// If a file cannot be read or written.
pub(crate) fn write(
    recipe: &Recipe,
    source: &ModelSource,
    data: &Dataset,
    version: &str,
) -> Result<PathBuf, TrainError> {
    let folder = &recipe.output_path;
    let tables = &data.tables;
    save(&folder.join(LATENTS), &tables.latents)?;
    save(&folder.join(TEXT), &tables.texts)?;
    if !tables.pooled.is_empty() {
        save(&folder.join(POOLED), &tables.pooled)?;
    }
    let processed = Processed {
        version: version.to_owned(),
        task: objective_name(recipe).to_owned(),
        model: source.to_string(),
        model_hash: weights_hash(source)?,
        recipe: recipe.to_toml(),
        prompts: tables.prompts.clone(),
        rows: data.samples.iter().map(row).collect(),
    };
    let json = serde_json::to_string_pretty(&processed).expect("plain fields always serialise");
    let path = folder.join(ROWS);
    atomic::write(&path, json.as_bytes()).map_err(TrainError::io(&path))?;
    Ok(folder.clone())
}

/// Reads what [`write`] wrote into the recipe's data set folder.
///
/// # Errors
/// If it is not there, was made for another task or number type, or is damaged.
pub(crate) fn read(recipe: &Recipe) -> Result<(Vec<Sample>, Tables), TrainError> {
    let folder = &recipe.dataset_base_path;
    let found = Processed::read(recipe)?;
    let (latents, texts) = (open(&folder.join(LATENTS))?, open(&folder.join(TEXT))?);
    let pooled = folder.join(POOLED);
    let pooled = if pooled.is_file() { open(&pooled)? } else { Vec::new() };
    found.check_rows(recipe, latents.len(), texts.len())?;
    let mut samples = Vec::with_capacity(found.rows.len());
    for row in &found.rows {
        let latent_shape = latents[row.latents].shape()?.try_into().map_err(|shape: Vec<usize>| {
            let reason = format!("latents {} have {} axes, expected 3", row.latents, shape.len());
            TrainError::Processed { path: folder.join(ROWS), reason }
        })?;
        samples.push(sample(row, latent_shape));
    }
    Ok((samples, Tables { latents, prompts: found.prompts, texts, pooled }))
}

/// The rows, and the shapes of latents and text states, from the files' headers alone.
///
/// # Errors
/// As [`read`].
pub(crate) fn outline(recipe: &Recipe) -> Result<Outline, TrainError> {
    let (samples, tables) = read(recipe)?;
    let shapes = |places: &[Place]| places.iter().map(Place::shape).collect::<Result<Vec<_>, _>>();
    Ok(Outline {
        samples,
        latents: shapes(&tables.latents)?,
        text: shapes(&tables.texts)?,
        pooled: shapes(&tables.pooled)?,
    })
}

/// Processed data without its numbers.
pub(crate) struct Outline {
    pub(crate) samples: Vec<Sample>,
    /// Shapes of the latents.
    pub(crate) latents: Vec<Vec<usize>>,
    /// Shapes of the text states.
    pub(crate) text: Vec<Vec<usize>>,
    /// Shapes of the pooled states.
    pub(crate) pooled: Vec<Vec<usize>>,
}

impl Processed {
    fn read(recipe: &Recipe) -> Result<Self, TrainError> {
        let path = recipe.dataset_base_path.join(ROWS);
        if !path.is_file() {
            return Err(TrainError::NotProcessed { path });
        }
        let damaged = |reason: String| TrainError::Processed { path: path.clone(), reason };
        let json = fs::read_to_string(&path).map_err(TrainError::io(&path))?;
        let found: Self = serde_json::from_str(&json).map_err(|error| damaged(error.to_string()))?;
        let made: Recipe = toml::from_str(&found.recipe).map_err(|error| damaged(error.to_string()))?;
        let expectations = [
            ("task", &found.task, &objective_name(recipe).to_owned()),
            ("dtype", &format!("{:?}", made.dtype), &format!("{:?}", recipe.dtype)),
        ];
        let differs = expectations.into_iter().find(|(_, found, here)| found != here);
        match differs.map(|(key, found, here)| format!("made with {key} {found}, expected {here}")) {
            Some(reason) => Err(damaged(reason)),
            None => Ok(found),
        }
    }

    fn check_rows(&self, recipe: &Recipe, latents: usize, text: usize) -> Result<(), TrainError> {
        let exists = |row: &ProcessedRow| row.latents < latents && row.prompt < self.prompts.len();
        if self.rows.is_empty() || text != self.prompts.len() || !self.rows.iter().all(exists) {
            let path = recipe.dataset_base_path.join(ROWS);
            let reason = "its rows do not fit the files beside it".into();
            return Err(TrainError::Processed { path, reason });
        }
        Ok(())
    }
}

fn objective_name(recipe: &Recipe) -> &'static str {
    match recipe.task.objective() {
        Objective::FlowMatching => "sft",
        Objective::Distillation => "direct_distill",
    }
}

fn row(sample: &Sample) -> ProcessedRow {
    ProcessedRow {
        latents: sample.picture.expect("a split task has pictures"),
        prompt: sample.prompt,
        height: sample.group.extent.height,
        width: sample.group.extent.width,
        num_frames: sample.group.extent.num_frames(),
        seed: sample.noise_seed,
        rand_device: sample.rand_device,
        num_inference_steps: sample.group.num_inference_steps,
        cfg_scale: sample.group.cfg_scale(),
        embedded_guidance: sample.group.embedded_guidance(),
    }
}

fn sample(row: &ProcessedRow, latent_shape: [usize; 3]) -> Sample {
    let extent = Extent { frames: row.num_frames.unwrap_or(1), height: row.height, width: row.width };
    Sample {
        picture: Some(row.latents),
        prompt: row.prompt,
        noise_seed: row.seed,
        rand_device: row.rand_device,
        group: Group::of(
            latent_shape,
            extent,
            (row.num_inference_steps, row.cfg_scale, row.embedded_guidance),
        ),
    }
}

fn save(path: &Path, places: &[Place]) -> Result<(), ModelError> {
    let shape = |(at, place): (usize, &Place)| Ok((key(at), place.shape()?));
    let shapes: Vec<(String, Vec<usize>)> =
        places.iter().enumerate().map(shape).collect::<Result<_, ModelError>>()?;
    let mut next = places.iter();
    save_streamed(path, shapes, WeightType::F32, &mut |_| {
        Ok(next.next().expect("the file has a tensor for each place").read()?.values)
    })
}

fn open(path: &Path) -> Result<Vec<Place>, ModelError> {
    let files = Arc::new(WeightFiles::open(path)?);
    let place = |key: &str| Place::Open { files: files.clone(), key: key.to_owned() };
    Ok(files.keys().map(place).collect())
}

/// Zeros in front, so that the order of the keys is that of the numbers.
fn key(number: usize) -> String {
    format!("{number:08}")
}
