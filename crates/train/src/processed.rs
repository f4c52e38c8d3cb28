//! The first half of a split task: a data set as text states and latents on disk, so that the second half needs no text
//! encoder and no autoencoder.
//!
//! A folder holds `latents.safetensors` and `text.safetensors`, whose keys are numbers, and `processed.json` with the rows
//! that refer to them. It is written last: a folder without it is no data set. Tensors go from where they are to the file
//! one by one, and from the file to the batches that need them: they are never in memory together.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewstep_data::atomic;
use fewstep_data::image::Size;
use fewstep_flow::noise::RandDevice;
use fewstep_models::{ModelError, ModelSource, WeightFiles, WeightType, save_streamed, weights_hash};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::dataset::{Dataset, Group, Sample, Tables};
use crate::place::Place;
use crate::recipe::{Objective, Recipe};

const ROWS: &str = "processed.json";
const LATENTS: &str = "latents.safetensors";
const TEXT: &str = "text.safetensors";

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
    seed: Option<u64>,
    rand_device: RandDevice,
    num_inference_steps: usize,
    cfg_scale: f32,
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
    let path = folder.join(ROWS);
    if !path.is_file() {
        return Err(TrainError::NotProcessed { path });
    }
    let damaged = |reason: String| TrainError::Processed { path: path.clone(), reason };
    let json = fs::read_to_string(&path).map_err(TrainError::io(&path))?;
    let found: Processed = serde_json::from_str(&json).map_err(|error| damaged(error.to_string()))?;
    let made: Recipe = toml::from_str(&found.recipe).map_err(|error| damaged(error.to_string()))?;
    let expectations = [
        ("task", &found.task, &objective_name(recipe).to_owned()),
        ("dtype", &format!("{:?}", made.dtype), &format!("{:?}", recipe.dtype)),
    ];
    if let Some((key, found, expected)) = expectations.into_iter().find(|(_, found, here)| found != here) {
        return Err(damaged(format!("made with {key} {found}, expected {expected}")));
    }
    let (latents, texts) = (open(&folder.join(LATENTS))?, open(&folder.join(TEXT))?);
    let exists = |row: &ProcessedRow| row.latents < latents.len() && row.prompt < found.prompts.len();
    if found.rows.is_empty() || texts.len() != found.prompts.len() || !found.rows.iter().all(exists) {
        return Err(damaged("its rows do not fit the files beside it".into()));
    }
    let mut samples = Vec::with_capacity(found.rows.len());
    for row in &found.rows {
        let shape = latents[row.latents].shape()?;
        let latent_shape = shape.try_into().map_err(|shape: Vec<usize>| {
            damaged(format!("latents {} have {} axes, expected 3", row.latents, shape.len()))
        })?;
        samples.push(sample(row, latent_shape));
    }
    Ok((samples, Tables { latents, prompts: found.prompts, texts }))
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
        height: sample.group.size.height,
        width: sample.group.size.width,
        seed: sample.noise_seed,
        rand_device: sample.rand_device,
        num_inference_steps: sample.group.num_inference_steps,
        cfg_scale: sample.group.cfg_scale(),
    }
}

fn sample(row: &ProcessedRow, latent_shape: [usize; 3]) -> Sample {
    let size = Size { height: row.height, width: row.width };
    Sample {
        picture: Some(row.latents),
        prompt: row.prompt,
        noise_seed: row.seed,
        rand_device: row.rand_device,
        group: Group::of(latent_shape, size, (row.num_inference_steps, row.cfg_scale)),
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
