//! The data set of a run: its rows, and where the latents of each distinct picture and the text states of each distinct
//! prompt are.
//!
//! What the data set folder stores stays in its files until a batch needs it. What it does not store is encoded before
//! the first step, once, and kept in memory where it is little and in files of the run's folder where it is much
//! ([`crate::shelf`]), so the memory a run needs does not grow with its data set.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use fewstep_flow::noise::RandDevice;
use fewstep_models::{Extent, Model, ModelSource};

use crate::host::HostTensor;
use crate::place::Place;
use crate::recipe::Recipe;
use crate::source::{Fit, SourceRow};
use crate::tables::{PictureTable, PromptTable, Stored, TextWidths};
use crate::workers::Reading;
use crate::{TrainError, processed};

/// Everything a run reads, ready for batches.
pub struct Dataset {
    pub(crate) samples: Vec<Sample>,
    pub(crate) tables: Tables,
    device: Device,
}

/// What the rows refer to.
pub(crate) struct Tables {
    /// Distinct pictures, `[C, H, W]` each.
    pub(crate) latents: Vec<Place>,
    /// Distinct prompts, the empty one first.
    pub(crate) prompts: Vec<String>,
    /// Text states of the prompts, `[S, J]` each; none when the text encoder learns and prompts are encoded in each step.
    pub(crate) texts: Vec<Place>,
    /// Pooled states of the prompts, `[P]` each; none where the model has none, or as [`Self::texts`].
    pub(crate) pooled: Vec<Place>,
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
    /// `[C, H, W]` of the latents; of a video `[C, F · H, W]`, as everywhere in training.
    pub latent_shape: [usize; 3],
    /// Size of the picture or video in px and frames.
    pub extent: Extent,
    /// The student's sampling steps; 0 where the task has none.
    pub num_inference_steps: usize,
    /// Bits of the student's guidance, since floats are not [`Eq`].
    cfg_scale_bits: u32,
    /// The same of the scale that the denoiser is told.
    embedded_guidance_bits: Option<u32>,
}

impl Group {
    /// The group of a row whose picture is trained at a size.
    ///
    /// # Errors
    /// If the size does not fit the model.
    pub(crate) fn new(row: &SourceRow, extent: Extent, model: &Model) -> Result<Self, TrainError> {
        let latent_shape = model.latent_shape(extent)?;
        let drawn = (row.num_inference_steps, row.cfg_scale, row.embedded_guidance);
        Ok(Self::of(latent_shape, extent, drawn))
    }

    /// A group of its sizes and the student's sampling steps, guidance, and scale that the denoiser is told.
    pub(crate) fn of(
        latent_shape: [usize; 3],
        extent: Extent,
        (num_inference_steps, cfg_scale, embedded_guidance): (usize, f32, Option<f32>),
    ) -> Self {
        let (cfg_scale_bits, embedded_guidance_bits) =
            (cfg_scale.to_bits(), embedded_guidance.map(f32::to_bits));
        Self { latent_shape, extent, num_inference_steps, cfg_scale_bits, embedded_guidance_bits }
    }

    /// The student's guidance; 1 is off.
    pub fn cfg_scale(&self) -> f32 {
        f32::from_bits(self.cfg_scale_bits)
    }

    /// The guidance scale that the denoiser is told, where it takes one; `None` leaves it to the model.
    pub fn embedded_guidance(&self) -> Option<f32> {
        self.embedded_guidance_bits.map(f32::from_bits)
    }
}

/// How a data set is prepared.
#[derive(Clone, Copy)]
pub(crate) struct Preparation<'a> {
    /// Encodes what is not stored, on the plain side of the device.
    pub(crate) model: &'a Model,
    /// Where that model is from.
    pub(crate) source: &'a ModelSource,
    /// Where batches go.
    pub(crate) device: &'a Device,
    /// Size rule of pictures and videos.
    pub(crate) fit: Fit,
    /// The data set folder, which may hold stored latents.
    pub(crate) base: &'a Path,
    /// Whether text states are computed now and kept.
    pub(crate) keep_text: bool,
    /// Folder for what is encoded and does not fit into memory.
    pub(crate) cache: &'a Path,
    /// Bytes of encoded pictures, and of encoded prompts, that are kept in memory.
    pub(crate) memory_bytes: usize,
    /// Threads that decode ahead.
    pub(crate) workers: usize,
    /// Set from outside to stop encoding.
    pub(crate) stop: &'a AtomicBool,
}

impl Preparation<'_> {
    /// Whether encoding shall stop.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Index of the empty prompt: what dropped captions and guidance read.
pub(crate) const EMPTY_PROMPT: usize = 0;

/// A data set whose rows, picture sizes and stored files have been looked at and nothing more.
pub(crate) struct Survey<'a> {
    with: Preparation<'a>,
    samples: Vec<Sample>,
    pictures: PictureTable<'a>,
    prompts: PromptTable,
}

impl<'a> Survey<'a> {
    /// Looks at the rows.
    ///
    /// # Errors
    /// If a picture or stored file is missing, damaged in its header, or of another shape.
    pub(crate) fn of(rows: &[SourceRow], with: Preparation<'a>) -> Result<Self, TrainError> {
        let (pictures, prompts) = (PictureTable::new(with), PromptTable::new(TextWidths::of(with.model)));
        let mut survey = Self { with, samples: Vec::with_capacity(rows.len()), pictures, prompts };
        survey.prompts.add("", None)?;
        for row in rows {
            let sample = survey.sample(row)?;
            survey.samples.push(sample);
        }
        Ok(survey)
    }

    fn sample(&mut self, row: &SourceRow) -> Result<Sample, TrainError> {
        let stored = Stored::beside(row.picture.as_ref(), self.with.base)?;
        let placed =
            row.picture.as_ref().map(|source| self.pictures.add(source, stored.as_ref())).transpose()?;
        let extent = placed.map(|(_, extent)| extent).or(row.extent);
        let extent = extent.expect("a row without a picture has the run's size");
        Ok(Sample {
            picture: placed.map(|(index, _)| index),
            prompt: self.prompts.add(&row.prompt, stored.as_ref())?,
            noise_seed: row.seed,
            rand_device: row.rand_device,
            group: Group::new(row, extent, self.with.model)?,
        })
    }

    /// Encodes what is not stored; `None` when asked to stop before all was done.
    ///
    /// # Errors
    /// If a picture is damaged, a prompt cannot be encoded, or a file cannot be read or written.
    pub(crate) fn encode(self) -> Result<Option<Dataset>, TrainError> {
        let Some(latents) = self.pictures.encode()? else { return Ok(None) };
        let texts = if self.with.keep_text { self.prompts.encode(self.with)? } else { Some(Vec::new()) };
        let Some(texts) = texts else { return Ok(None) };
        let pooled = texts.iter().filter_map(|places| places.pooled.clone()).collect();
        let texts = texts.into_iter().map(|places| places.states).collect();
        let tables = Tables { latents, prompts: self.prompts.texts, texts, pooled };
        Ok(Some(Dataset { samples: self.samples, tables, device: self.with.device.clone() }))
    }
}

impl Dataset {
    /// Opens what the first half of a split task wrote.
    ///
    /// # Errors
    /// As [`processed::read`], or if the latents are not of the model's sizes.
    pub(crate) fn read(recipe: &Recipe, model: &Model, device: &Device) -> Result<Self, TrainError> {
        let (samples, tables) = processed::read(recipe)?;
        let shapes = |places: &[Place]| places.iter().map(Place::shape).collect::<Result<Vec<_>, _>>();
        let (text, pooled) = (shapes(&tables.texts)?, shapes(&tables.pooled)?);
        check_shapes(recipe, model, &samples, [&text, &pooled])?;
        Ok(Self { samples, tables, device: device.clone() })
    }

    /// The prompts, the empty one first.
    pub(crate) fn prompts(&self) -> &[String] {
        &self.tables.prompts
    }

    /// The row of a position in an epoch; positions past the rows are further passes over them.
    pub(crate) fn sample_at(&self, position: usize) -> &Sample {
        &self.samples[position % self.len()]
    }

    /// The rows.
    pub(crate) fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Latents `[C, H, W]` of a row; `None` where it has no picture.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn latents(&self, row: usize) -> Result<Option<HostTensor>, TrainError> {
        let picture = self.samples[row].picture;
        Ok(picture.map(|picture| self.tables.latents[picture].read()).transpose()?)
    }

    /// How many of these positions have a picture: all of them, or none with an online teacher.
    pub(crate) fn pictures(&self, positions: &[usize]) -> usize {
        positions.iter().filter(|position| self.sample_at(**position).picture.is_some()).count()
    }

    /// Reads what a batch of positions needs: the latents of each, then the text states of each and of the empty prompt,
    /// then their pooled states, as far as there are any.
    pub(crate) fn reading(&self, positions: &[usize]) -> Reading {
        let samples = || positions.iter().map(|position| self.sample_at(*position));
        let latents = samples().filter_map(|sample| Some(&self.tables.latents[sample.picture?]));
        let prompts = || samples().map(|sample| sample.prompt).chain([EMPTY_PROMPT]);
        let texts = prompts().filter_map(|prompt| self.tables.texts.get(prompt));
        let pooled = prompts().filter_map(|prompt| self.tables.pooled.get(prompt));
        let places: Vec<Place> = latents.chain(texts).chain(pooled).cloned().collect();
        Box::new(move || Ok(places.iter().map(Place::read).collect::<Result<_, _>>()?))
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

    /// The plain side of the device that batches go to.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

/// Checks that processed data is of a model's sizes; of text states and pooled ones, the shapes are given.
///
/// # Errors
/// If latents or states are not.
pub(crate) fn check_shapes(
    recipe: &Recipe,
    model: &Model,
    samples: &[Sample],
    [text, pooled]: [&[Vec<usize>]; 2],
) -> Result<(), TrainError> {
    let check = |what, found: &[usize], expected: Vec<usize>| match found == expected {
        true => Ok(()),
        false => {
            let (path, found) = (recipe.dataset_base_path.clone(), found.to_vec());
            Err(TrainError::Shape { path, what, found, expected })
        }
    };
    for group in samples.iter().map(|sample| sample.group) {
        let expected = model.latent_shape(group.extent)?;
        check("latents", &group.latent_shape, expected.to_vec())?;
    }
    let widths = TextWidths::of(model);
    for states in text {
        check("text states", states, vec![states.first().copied().unwrap_or(0), widths.states])?;
    }
    let expected = widths.pooled.map_or(0, |_| text.len());
    check("pooled states", &[pooled.len()], vec![expected])?;
    pooled.iter().try_for_each(|found| check("pooled states", found, widths.pooled.into_iter().collect()))
}
