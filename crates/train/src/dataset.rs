//! The data set of a run in memory: each distinct picture once as latents, each distinct prompt once as text states.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::image::{Resize, Size};
use fewstep_flow::noise::RandDevice;
use fewstep_models::{Condition, Model};

use crate::TrainError;
use crate::host::HostTensor;
use crate::source::SourceRow;
use crate::tables::{PictureTable, PromptTable, Stored};

/// Everything a run reads, ready for batches.
pub struct Dataset {
    pub(crate) samples: Vec<Sample>,
    latents: Vec<HostTensor>,
    prompts: Vec<String>,
    /// One per prompt; empty when the text encoder learns and prompts are encoded in each step.
    conditions: Vec<Condition>,
    device: Device,
}

/// One row: indices into the tables of its data set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Absent where the teacher's picture is made during training.
    picture: Option<usize>,
    /// Its prompt.
    pub(crate) prompt: usize,
    /// The row's seed of the initial noise, where it has one.
    pub(crate) noise_seed: Option<u64>,
    /// The generator of that noise.
    pub(crate) rand_device: RandDevice,
    /// Rows of one group can share a batch.
    pub(crate) group: Group,
}

/// What all samples of a batch agree in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// `[C, H, W]` of the latents.
    pub latent_shape: [usize; 3],
    /// Picture size in px.
    pub size: Size,
    /// The student's sampling steps; 0 where the task has none.
    pub num_inference_steps: usize,
    /// Bits of the student's guidance, since floats are not [`Eq`].
    cfg_scale_bits: u32,
}

impl Group {
    fn new(row: &SourceRow, size: Size, model: &Model) -> Result<Self, TrainError> {
        Ok(Self {
            latent_shape: model.latent_shape(size.height, size.width)?,
            size,
            num_inference_steps: row.num_inference_steps,
            cfg_scale_bits: row.cfg_scale.to_bits(),
        })
    }

    /// The student's guidance; 1 is off.
    pub fn cfg_scale(&self) -> f32 {
        f32::from_bits(self.cfg_scale_bits)
    }
}

/// How a data set is prepared.
#[derive(Clone, Copy)]
pub(crate) struct Preparation<'a> {
    /// Encodes what is not stored, on the plain side of the device.
    pub(crate) model: &'a Model,
    /// Where batches go.
    pub(crate) device: &'a Device,
    /// Size rule of the pictures.
    pub(crate) resize: Resize,
    /// The data set folder, which may hold stored latents.
    pub(crate) base: &'a Path,
    /// Whether text states are computed now and kept.
    pub(crate) keep_text: bool,
}

/// Index of the empty prompt: what dropped captions and guidance read.
pub(crate) const EMPTY_PROMPT: usize = 0;

impl Dataset {
    /// Loads and encodes the rows.
    ///
    /// # Errors
    /// If a picture or stored file is missing, damaged or of another shape.
    pub(crate) fn prepare(rows: &[SourceRow], with: Preparation<'_>) -> Result<Self, TrainError> {
        let mut pictures = PictureTable::new(with);
        let mut prompts = PromptTable::default();
        prompts.add("", None)?;
        let mut samples = Vec::with_capacity(rows.len());
        for row in rows {
            let stored = Stored::beside(row.picture.as_ref(), with.base)?;
            let placed =
                row.picture.as_ref().map(|source| pictures.add(source, stored.as_ref())).transpose()?;
            let size = placed
                .map(|(_, size)| size)
                .or(row.size)
                .expect("a row without a picture has the run's size");
            samples.push(Sample {
                picture: placed.map(|(index, _)| index),
                prompt: prompts.add(&row.prompt, stored.as_ref())?,
                noise_seed: row.seed,
                rand_device: row.rand_device,
                group: Group::new(row, size, with.model)?,
            });
        }
        let conditions = if with.keep_text { prompts.encode(with.model, with.device)? } else { Vec::new() };
        Ok(Self {
            samples,
            latents: pictures.encode(),
            prompts: prompts.texts,
            conditions,
            device: with.device.clone(),
        })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The distinct kinds of batches, in the order of their first row.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for sample in &self.samples {
            if !groups.contains(&sample.group) {
                groups.push(sample.group);
            }
        }
        groups
    }

    /// Latents of rows that have pictures, `[B, C, H, W]`.
    pub(crate) fn latents(&self, rows: &[usize]) -> Tensor<4> {
        let [channels, height, width] = self.samples[rows[0]].group.latent_shape;
        let picture =
            |row: &usize| self.samples[*row].picture.expect("only rows of an online teacher have none");
        let mut values = Vec::with_capacity(rows.len() * channels * height * width);
        for row in rows {
            values.extend_from_slice(&self.latents[picture(row)].values);
        }
        Tensor::from_data(TensorData::new(values, [rows.len(), channels, height, width]), &self.device)
    }

    /// Text states of prompts by index; where they are not kept, computed by `model`, with a graph if it has one.
    pub(crate) fn condition(&self, model: &Model, prompts: &[usize]) -> Result<Condition, TrainError> {
        if self.conditions.is_empty() {
            let texts: Vec<String> = prompts.iter().map(|prompt| self.prompts[*prompt].clone()).collect();
            return Ok(model.encode_prompts(&texts)?);
        }
        let parts: Vec<Condition> = prompts.iter().map(|prompt| self.conditions[*prompt].clone()).collect();
        Ok(Condition::stack(&parts))
    }

    /// The plain side of the device that batches go to.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}
