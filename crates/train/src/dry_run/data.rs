//! Every row of a data set, checked without decoding a picture: its values, its picture's header, the size it is
//! trained at, and what is stored beside it.

use std::collections::{BTreeMap, BTreeSet};

use fewstep_models::{Extent, Model};
use serde::Serialize;

use crate::batch::Plan;
use crate::dataset::{Group, check_shapes};
use crate::recipe::{Recipe, Stage};
use crate::source::{Fit, SourceRow};
use crate::tables::{Stored, TextWidths};
use crate::{TrainError, processed, source};

/// The data of a run, counted.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DataOutline {
    /// Rows that can be trained on.
    pub rows: usize,
    /// Rows that cannot, each of which is a problem.
    pub wrong_rows: usize,
    /// Distinct pictures.
    pub pictures: usize,
    /// Of these, with latents stored beside them.
    pub stored_latents: usize,
    /// Distinct prompts, the empty one included.
    pub prompts: usize,
    /// Tokens of the longest prompt's states.
    pub longest_prompt_tokens: usize,
    /// Kinds of batches.
    pub batches: Vec<Bucket>,
    /// The kind of batch of each row.
    #[serde(skip)]
    pub(super) groups: Vec<Group>,
    /// Numbers of all latents.
    #[serde(skip)]
    pub(super) latents: u64,
    /// Of these, numbers of the latents that are encoded before the first step.
    #[serde(skip)]
    pub(super) encoded_latents: u64,
    /// Pixels of all pictures and frames that are encoded.
    #[serde(skip)]
    pub(super) encoded_pixels: u64,
    /// Pixels of the largest picture or video that is encoded.
    #[serde(skip)]
    pub(super) largest_encoded: u64,
    /// Pixels that the autoencoder has at once: of a video those of the frames behind one latent frame.
    #[serde(skip)]
    pub(super) largest_chunk: u64,
    /// Numbers of all prompts' states.
    #[serde(skip)]
    pub(super) text_states: u64,
    /// Of these, numbers of the states that are encoded before the first step.
    #[serde(skip)]
    pub(super) encoded_text_states: u64,
    /// Tokens of all prompts that are encoded, the dropped ones included.
    #[serde(skip)]
    pub(super) encoded_tokens: u64,
    /// Prompts that are encoded.
    #[serde(skip)]
    pub(super) encoded_prompts: usize,
    /// Tokens before a prompt that are encoded with it and then dropped.
    #[serde(skip)]
    pub(super) dropped_tokens: usize,
}

/// Rows that share batches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// Picture width in px.
    pub width: usize,
    /// Picture height in px.
    pub height: usize,
    /// Frames; 1 is a picture.
    pub num_frames: usize,
    /// The student's sampling steps; 0 where the task has none.
    pub num_inference_steps: usize,
    /// The student's guidance; 1 is off.
    pub cfg_scale: f32,
    /// Rows of one epoch, repetitions included.
    pub rows: usize,
    /// Batches of one epoch.
    pub batches: usize,
    /// Rows of the largest batch.
    pub largest_batch: usize,
}

/// Checks the data of a recipe; `problems` gets what is wrong with it. Without a model, rows are checked as far as that
/// goes.
pub(super) fn check(recipe: &Recipe, model: Option<&Model>, problems: &mut Vec<TrainError>) -> DataOutline {
    let read = match (recipe.task.stage(), model) {
        (Stage::Train, Some(model)) => processed_rows(recipe, model),
        (Stage::Train, None) => processed::outline(recipe).map(|_| DataOutline::default()),
        _ => rows(recipe, model, problems),
    };
    let mut outline = read.unwrap_or_else(|error| {
        problems.push(error);
        DataOutline::default()
    });
    outline.batches = buckets(recipe, &outline.groups);
    outline
}

/// What the first half of a split task wrote.
fn processed_rows(recipe: &Recipe, model: &Model) -> Result<DataOutline, TrainError> {
    let processed::Outline { samples, latents, text, pooled } = processed::outline(recipe)?;
    check_shapes(recipe, model, &samples, [&text, &pooled])?;
    Ok(DataOutline {
        rows: samples.len(),
        pictures: latents.len(),
        stored_latents: latents.len(),
        prompts: text.len(),
        longest_prompt_tokens: text.iter().map(|shape| shape[0]).max().unwrap_or(0),
        groups: samples.iter().map(|sample| sample.group).collect(),
        latents: numbers(&latents),
        text_states: numbers(&text) + numbers(&pooled),
        ..DataOutline::default()
    })
}

fn numbers(shapes: &[Vec<usize>]) -> u64 {
    shapes.iter().map(|shape| shape.iter().product::<usize>() as u64).sum()
}

fn rows(
    recipe: &Recipe,
    model: Option<&Model>,
    problems: &mut Vec<TrainError>,
) -> Result<DataOutline, TrainError> {
    let fit = Fit::of(recipe, model);
    let mut counted = Counted { recipe, model, fit, outline: DataOutline::default(), seen: Seen::default() };
    counted.prompt("", None)?;
    for row in source::checked_rows(recipe, fit)? {
        match row.and_then(|row| counted.add(&row)) {
            Ok(()) => counted.outline.rows += 1,
            Err(error) => {
                counted.outline.wrong_rows += 1;
                problems.push(error);
            }
        }
    }
    Ok(counted.outline)
}

/// What has been counted already.
#[derive(Default)]
struct Seen {
    pictures: BTreeSet<String>,
    prompts: BTreeSet<String>,
}

struct Counted<'a> {
    recipe: &'a Recipe,
    model: Option<&'a Model>,
    fit: Fit,
    outline: DataOutline,
    seen: Seen,
}

impl Counted<'_> {
    fn add(&mut self, row: &SourceRow) -> Result<(), TrainError> {
        let stored = Stored::beside(row.picture.as_ref(), &self.recipe.dataset_base_path)?;
        let latents = stored.as_ref().map(|stored| stored.shape("latents")).transpose()?.flatten();
        let extent = match (&row.picture, row.extent) {
            // Stored latents are taken as they are.
            (Some(picture), _) if latents.is_some() => picture.extent()?,
            (Some(picture), _) => picture.target(self.fit)?,
            (None, extent) => extent.expect("a row without a picture has the run's size"),
        };
        let Some(model) = self.model else { return self.prompt(&row.prompt, None) };
        let group = Group::new(row, extent, model)?;
        if let (Some(stored), Some(found)) = (&stored, latents.clone()) {
            stored.check("latents", found, &group.latent_shape)?;
        }
        self.prompt(&row.prompt, stored.as_ref())?;
        if let Some(picture) = &row.picture
            && self.seen.pictures.insert(picture.name().into_owned())
        {
            self.outline.picture(&group, latents.is_some(), model.frames_per_latent().unwrap_or(1));
        }
        self.outline.groups.push(group);
        Ok(())
    }

    fn prompt(&mut self, text: &str, stored: Option<&Stored>) -> Result<(), TrainError> {
        if !self.seen.prompts.insert(text.to_owned()) {
            return Ok(());
        }
        self.outline.prompts += 1;
        let Some(model) = self.model else { return Ok(()) };
        let widths = TextWidths::of(model);
        let tokens = match stored.map(|stored| stored.text_tokens(widths)).transpose()?.flatten() {
            Some(tokens) => tokens,
            None => {
                let length = model.prompt_tokens(text)?;
                self.outline.encoded_prompts += 1;
                self.outline.dropped_tokens = length.dropped;
                self.outline.encoded_text_states += widths.numbers(length.states) as u64;
                self.outline.encoded_tokens += (length.states + length.dropped) as u64;
                length.states
            }
        };
        self.outline.text_states += widths.numbers(tokens) as u64;
        self.outline.longest_prompt_tokens = self.outline.longest_prompt_tokens.max(tokens);
        Ok(())
    }
}

impl DataOutline {
    fn picture(&mut self, group: &Group, stored: bool, frames_per_latent: usize) {
        self.pictures += 1;
        let latents = group.latent_shape.iter().product::<usize>() as u64;
        self.latents += latents;
        let Extent { frames, height, width } = group.extent;
        let pixels = (frames * height * width) as u64;
        if stored {
            self.stored_latents += 1;
        } else {
            self.encoded_latents += latents;
            self.encoded_pixels += pixels;
            self.largest_encoded = self.largest_encoded.max(pixels);
            let chunk = (frames.min(frames_per_latent) * height * width) as u64;
            self.largest_chunk = self.largest_chunk.max(chunk);
        }
    }
}

/// The kinds of batches of an epoch, in the order of their first row.
fn buckets(recipe: &Recipe, groups: &[Group]) -> Vec<Bucket> {
    let mut order: Vec<Group> = Vec::new();
    let mut rows: BTreeMap<usize, usize> = BTreeMap::new();
    for group in groups {
        let at = order.iter().position(|known| known == group).unwrap_or(order.len());
        if at == order.len() {
            order.push(*group);
        }
        *rows.entry(at).or_default() += recipe.dataset_repeat;
    }
    let bucket = |(at, group): (usize, &Group)| Bucket {
        width: group.extent.width,
        height: group.extent.height,
        num_frames: group.extent.frames,
        num_inference_steps: group.num_inference_steps,
        cfg_scale: group.cfg_scale(),
        rows: rows[&at],
        batches: rows[&at].div_ceil(recipe.batch_size),
        largest_batch: rows[&at].min(recipe.batch_size),
    };
    order.iter().enumerate().map(bucket).collect()
}

/// Optimiser steps of an epoch and of the run; `None` where no row can be trained on.
pub(super) fn steps(recipe: &Recipe, data: &DataOutline) -> Option<(u64, u64)> {
    if data.groups.is_empty() {
        return None;
    }
    let plan = Plan::of_groups(recipe, data.groups.clone());
    Some((plan.steps_per_epoch, plan.total_steps(recipe)))
}
