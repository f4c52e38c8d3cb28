//! The data set of a run in memory: each distinct picture once as latents, each distinct prompt once as text states.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::image::{Resize, Size};
use fewstep_flow::noise::RandDevice;
use fewstep_models::{Condition, Model};

use crate::host::{HostTensor, to_vec};
use crate::recipe::Recipe;
use crate::source::SourceRow;
use crate::tables::{PictureTable, PromptTable, Stored, from_host};
use crate::{TrainError, processed};

/// Everything a run reads, ready for batches.
pub struct Dataset {
    pub(crate) samples: Vec<Sample>,
    tables: Tables,
    /// One per prompt; empty when the text encoder learns and prompts are encoded in each step.
    conditions: Vec<Condition>,
    device: Device,
}

/// What the rows refer to.
pub(crate) struct Tables {
    /// Distinct pictures, `[C, H, W]` each.
    pub(crate) latents: Vec<HostTensor>,
    /// Distinct prompts, the empty one first.
    pub(crate) prompts: Vec<String>,
}

/// One row: indices into the tables of its data set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Absent where the teacher's picture is made during training.
    pub(crate) picture: Option<usize>,
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
    /// The group of a row whose picture is trained at a size.
    ///
    /// # Errors
    /// If the size does not fit the model.
    pub(crate) fn new(row: &SourceRow, size: Size, model: &Model) -> Result<Self, TrainError> {
        let latent_shape = model.latent_shape(size.height, size.width)?;
        Ok(Self::of(latent_shape, size, (row.num_inference_steps, row.cfg_scale)))
    }

    /// A group of its sizes and the student's sampling steps and guidance.
    pub(crate) fn of(latent_shape: [usize; 3], size: Size, (steps, cfg_scale): (usize, f32)) -> Self {
        Self { latent_shape, size, num_inference_steps: steps, cfg_scale_bits: cfg_scale.to_bits() }
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
            tables: Tables { latents: pictures.encode(), prompts: prompts.texts },
            conditions,
            device: with.device.clone(),
        })
    }

    /// Reads what the first half of a split task wrote.
    ///
    /// # Errors
    /// As [`processed::read`], or if the latents are not of the model's sizes.
    pub(crate) fn read(recipe: &Recipe, model: &Model, device: &Device) -> Result<Self, TrainError> {
        let (samples, tables, text) = processed::read(recipe)?;
        check_shapes(recipe, model, &samples, text.iter().map(|states| &states.shape))?;
        let conditions = text.iter().map(|text| from_host(text, device)).collect();
        Ok(Self { samples, tables, conditions, device: device.clone() })
    }

    /// Pictures and prompts by index.
    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Text states of every prompt, `[S, J]` each.
    pub(crate) fn text_states(&self) -> Vec<HostTensor> {
        let state = |condition: &Condition| {
            let text = condition.text.clone().squeeze_dim::<2>(0);
            HostTensor { shape: text.dims().to_vec(), values: to_vec(text) }
        };
        self.conditions.iter().map(state).collect()
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

    /// The generators of the rows' noise, each once.
    pub(crate) fn rand_devices(&self) -> Vec<RandDevice> {
        let of = |device: &RandDevice| self.samples.iter().any(|sample| sample.rand_device == *device);
        [RandDevice::Cpu, RandDevice::Cuda].into_iter().filter(of).collect()
    }

    /// Latents of rows that have pictures, `[B, C, H, W]`.
    pub(crate) fn latents(&self, rows: &[usize]) -> Tensor<4> {
        let [channels, height, width] = self.samples[rows[0]].group.latent_shape;
        let picture =
            |row: &usize| self.samples[*row].picture.expect("only rows of an online teacher have none");
        let mut values = Vec::with_capacity(rows.len() * channels * height * width);
        for row in rows {
            values.extend_from_slice(&self.tables.latents[picture(row)].values);
        }
        Tensor::from_data(TensorData::new(values, [rows.len(), channels, height, width]), &self.device)
    }

    /// Text states of prompts by index; where they are not kept, computed by `model`, with a graph if it has one.
    pub(crate) fn condition(&self, model: &Model, prompts: &[usize]) -> Result<Condition, TrainError> {
        if self.conditions.is_empty() {
            let texts: Vec<String> =
                prompts.iter().map(|prompt| self.tables.prompts[*prompt].clone()).collect();
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

/// Checks that processed data is of a model's sizes.
///
/// # Errors
/// If latents or text states are not.
pub(crate) fn check_shapes<'a>(
    recipe: &Recipe,
    model: &Model,
    samples: &[Sample],
    mut text: impl Iterator<Item = &'a Vec<usize>>,
) -> Result<(), TrainError> {
    let wrong = |what, found: Vec<usize>, expected: Vec<usize>| {
        Err(TrainError::Shape { path: recipe.dataset_base_path.clone(), what, found, expected })
    };
    for group in samples.iter().map(|sample| sample.group) {
        let expected = model.latent_shape(group.size.height, group.size.width)?;
        if group.latent_shape != expected {
            return wrong("latents", group.latent_shape.to_vec(), expected.to_vec());
        }
    }
    let width = model.text_width();
    match text.find(|states| states[1] != width) {
        Some(states) => wrong("text states", states.clone(), vec![states[0], width]),
        None => Ok(()),
    }
}
