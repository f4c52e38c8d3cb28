//! The first half of a split task: a data set as text states and latents on disk, so that the second half needs no text
//! encoder and no autoencoder.
//!
//! A folder holds `latents.safetensors` and `text.safetensors`, whose keys are numbers, and `processed.json` with the rows
//! that refer to them. It is written last: a folder without it is no data set.

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_data::atomic;
use fewstep_data::image::Size;
use fewstep_flow::noise::RandDevice;
use fewstep_models::{ModelSource, WeightFiles, WeightType, save_tensors, weights_hash};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::dataset::{Dataset, Group, Sample, Tables};
use crate::host::HostTensor;
use crate::recipe::{Objective, Recipe};

/// The file of the rows.
pub(crate) const ROWS: &str = "processed.json";
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
    let (tables, text) = (data.tables(), data.text_states());
    save(&folder.join(LATENTS), &tables.latents)?;
    save(&folder.join(TEXT), &text)?;
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
pub(crate) fn read(recipe: &Recipe) -> Result<(Vec<Sample>, Tables, Vec<HostTensor>), TrainError> {
    let folder = &recipe.dataset_base_path;
    let found = Processed::read(recipe)?;
    let latents = load(&folder.join(LATENTS))?;
    let text = load(&folder.join(TEXT))?;
    found.check_rows(recipe, latents.len(), text.len())?;
    let samples = found.rows.iter().map(|row| sample(row, &latents[row.latents].shape)).collect();
    Ok((samples, Tables { latents, prompts: found.prompts }, text))
}

/// The rows, and the shapes of latents and text states, from the files' headers alone.
///
/// # Errors
/// As [`read`].
pub(crate) fn outline(recipe: &Recipe) -> Result<Outline, TrainError> {
    let folder = &recipe.dataset_base_path;
    let found = Processed::read(recipe)?;
    let (latents, text) = (shapes(&folder.join(LATENTS))?, shapes(&folder.join(TEXT))?);
    found.check_rows(recipe, latents.len(), text.len())?;
    let samples = found.rows.iter().map(|row| sample(row, &latents[row.latents])).collect();
    Ok(Outline { samples, latents, text })
}

/// Processed data without its numbers.
pub(crate) struct Outline {
    pub(crate) samples: Vec<Sample>,
    /// Shapes of the latents.
    pub(crate) latents: Vec<Vec<usize>>,
    /// Shapes of the text states.
    pub(crate) text: Vec<Vec<usize>>,
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
        height: sample.group.size.height,
        width: sample.group.size.width,
        seed: sample.noise_seed,
        rand_device: sample.rand_device,
        num_inference_steps: sample.group.num_inference_steps,
        cfg_scale: sample.group.cfg_scale(),
    }
}

fn sample(row: &ProcessedRow, latents: &[usize]) -> Sample {
    let latent_shape = [latents[0], latents[1], latents[2]];
    let size = Size { height: row.height, width: row.width };
    Sample {
        picture: Some(row.latents),
        prompt: row.prompt,
        noise_seed: row.seed,
        rand_device: row.rand_device,
        group: Group::of(latent_shape, size, (row.num_inference_steps, row.cfg_scale)),
    }
}

fn save(path: &Path, tensors: &[HostTensor]) -> Result<(), TrainError> {
    // Zeros in front, so that the file's order is that of the rows.
    let named = tensors
        .iter()
        .enumerate()
        .map(|(at, tensor)| (format!("{at:08}"), tensor.shape.clone(), tensor.values.clone()));
    Ok(save_tensors(path, named, WeightType::F32, &Default::default())?)
}

fn load(path: &Path) -> Result<Vec<HostTensor>, TrainError> {
    let files = WeightFiles::open(path)?;
    let read = |key: &str| -> Result<HostTensor, TrainError> {
        let (shape, values) = files.read(key)?;
        Ok(HostTensor { shape, values })
    };
    files.keys().map(read).collect()
}

fn shapes(path: &Path) -> Result<Vec<Vec<usize>>, TrainError> {
    let entries = WeightFiles::open(path)?.entries()?;
    Ok(entries.into_iter().map(|entry| entry.shape).collect())
}
