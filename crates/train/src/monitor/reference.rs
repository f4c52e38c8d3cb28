//! What the student's pictures are compared with: the teacher's from the same noise, or real ones.

use std::collections::BTreeMap;
use std::path::Path;

use fewstep_data::buckets;
use fewstep_data::provenance::{FILE_NAME, Provenance};
use fewstep_models::conventions::SOLVERS;
use fewstep_models::{Model, Pipeline, Request, WeightFiles, WeightType, save_tensors};
use fewstep_report::{Appearance, diversity};

use super::held_out::{HeldOut, PICTURES_PER_BATCH, of_its_own};
use super::pictures;
use crate::TrainError;
use crate::host::HostTensor;
use crate::recipe::Recipe;

/// The teacher's pictures that no data set has, in a run's folder.
const FILE: &str = "monitor/teacher.safetensors";

/// The pictures to be reached, and what they look like.
pub(super) struct Reference {
    /// Latents of each row, `[C, H, W]`.
    pub(super) latents: Vec<HostTensor>,
    pub(super) appearance: Appearance,
    /// Absent where no two pictures are to be compared.
    pub(super) diversity: Option<f64>,
}

impl Reference {
    /// Stored latents where the rows have them. The others are drawn by `teacher`, once: the run's folder keeps them.
    ///
    /// # Errors
    /// If they are another teacher's to draw, or a file cannot be read or written.
    pub(super) fn new(recipe: &Recipe, rows: &HeldOut, teacher: &Model) -> Result<Self, TrainError> {
        let mut drawn = drawn(recipe, rows, teacher)?;
        let latents = rows.per_row(|batch| {
            let mut latents = |row| match rows.data.latents(row)? {
                Some(stored) => Ok(stored),
                None => Ok(drawn.remove(&key(rows, row)).expect("what is not stored has been drawn")),
            };
            batch.rows().into_iter().map(&mut latents).collect()
        })?;
        let pictures = rows.per_row(|batch| {
            let latents: Vec<&HostTensor> = batch.rows().into_iter().map(|row| &latents[row]).collect();
            let stacked = HostTensor::stack(&latents, rows.data.device());
            Ok(pictures(teacher, stacked, batch.group().extent.frames))
        })?;
        Ok(Self {
            appearance: Appearance::of(&pictures).expect("a monitor has rows"),
            diversity: diversity(&pictures, &rows.kin),
            latents,
        })
    }
}

/// Latents of the rows without stored ones, by [`key`]: from the run's folder, or drawn and put there.
fn drawn(
    recipe: &Recipe,
    rows: &HeldOut,
    teacher: &Model,
) -> Result<BTreeMap<String, HostTensor>, TrainError> {
    let missing: Vec<usize> =
        (0..rows.data.len()).filter(|row| rows.data.sample_at(*row).picture.is_none()).collect();
    if missing.is_empty() {
        return Ok(BTreeMap::new());
    }
    let path = recipe.output_path.join(FILE);
    let keys: Vec<String> = missing.iter().map(|row| key(rows, *row)).collect();
    if let Some(kept) = kept(&path, &keys)? {
        return Ok(kept);
    }
    let drawn = draw(recipe, rows, &missing, teacher)?;
    let tensors =
        drawn.iter().map(|(key, tensor)| (key.clone(), tensor.shape.clone(), tensor.values.clone()));
    save_tensors(&path, tensors, WeightType::F32, &BTreeMap::new())?;
    Ok(drawn)
}

/// What an earlier start of the run has drawn, if it has all of it.
fn kept(path: &Path, keys: &[String]) -> Result<Option<BTreeMap<String, HostTensor>>, TrainError> {
    if !path.is_file() {
        return Ok(None);
    }
    let files = WeightFiles::open(path)?;
    if !keys.iter().all(|key| files.contains(key)) {
        return Ok(None);
    }
    let read = |key: &String| -> Result<(String, HostTensor), TrainError> {
        let (shape, values) = files.read(key)?;
        Ok((key.clone(), HostTensor { shape, values }))
    };
    keys.iter().map(read).collect::<Result<_, _>>().map(Some)
}

fn draw(
    recipe: &Recipe,
    rows: &HeldOut,
    missing: &[usize],
    teacher: &Model,
) -> Result<BTreeMap<String, HostTensor>, TrainError> {
    let settings = teacher_settings(recipe, teacher)?;
    let pipeline = Pipeline::new(teacher.clone(), rows.data.device().clone());
    let mut drawn = BTreeMap::new();
    for batch in buckets::batches(&rows.groups(), missing, PICTURES_PER_BATCH) {
        let requests: Vec<Request> = batch.iter().map(|row| request(&settings, rows, *row)).collect();
        for (row, generated) in batch.iter().zip(pipeline.generate_batch(&requests)?) {
            drawn.insert(key(rows, *row), HostTensor::rows(generated.latents).swap_remove(0));
        }
    }
    Ok(drawn)
}

/// How the teacher of a recipe's data draws: as it did, or, for a data set without provenance, as an online teacher.
fn teacher_settings(recipe: &Recipe, teacher: &Model) -> Result<Request, TrainError> {
    let its_own = of_its_own(recipe);
    let base = &its_own.dataset_base_path;
    let (num_inference_steps, cfg_scale) = recipe.teacher(teacher.defaults());
    let online = Request { num_inference_steps, cfg_scale, ..Request::new("", 0, 0) };
    let found = if its_own.online_teacher { None } else { Provenance::read(base)? };
    let Some(found) = found else { return Ok(online) };
    if let Some(adapter) = found.lora {
        return Err(TrainError::Provenance {
            path: base.join(FILE_NAME),
            what: "the teacher's adapter",
            found: adapter,
            expected: "none, to draw more pictures for the monitor".into(),
            hint: "lower monitor_seeds to the pictures there are of a prompt, or generate more with --images-per-prompt",
        });
    }
    Ok(Request {
        num_inference_steps: found.num_inference_steps,
        cfg_scale: found.cfg_scale,
        embedded_guidance: found.embedded_guidance,
        negative_prompt: found.negative_prompt,
        solver: SOLVERS.iter().find(|(name, _)| *name == found.solver).map(|(_, solver)| *solver),
        exponential_shift_mu: found.exponential_shift_mu,
        ..online
    })
}

fn request(settings: &Request, rows: &HeldOut, row: usize) -> Request {
    let sample = rows.data.sample_at(row);
    Request {
        prompt: rows.data.prompts()[sample.prompt].clone(),
        seed: sample.noise_seed.expect("rows without a stored picture have been given a seed"),
        rand_device: sample.rand_device,
        height: sample.group.extent.height,
        width: sample.group.extent.width,
        num_frames: sample.group.extent.frames,
        ..settings.clone()
    }
}

/// What a drawn picture depends on, the teacher aside.
fn key(rows: &HeldOut, row: usize) -> String {
    let sample = rows.data.sample_at(row);
    let (seed, prompt) = (sample.noise_seed.unwrap_or_default(), &rows.data.prompts()[sample.prompt]);
    format!("{} px, {:?} seed {seed}: {prompt}", sample.group.extent, sample.rand_device)
}
