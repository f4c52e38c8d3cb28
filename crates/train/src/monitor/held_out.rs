//! The rows that a run is watched on and never trained on.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use fewstep_data::buckets;
use fewstep_models::Extent;

use crate::batch::{Batch, Planned};
use crate::dataset::{Dataset, Group, Preparation, Sample, Survey};
use crate::random::{Draw, Purpose};
use crate::recipe::{Objective, Recipe};
use crate::source::{self, Fit, SourceRow};
use crate::{TrainError, provenance};

/// Pictures drawn at once.
pub(super) const PICTURES_PER_BATCH: usize = 8;

/// Held-out rows, loaded.
pub(crate) struct HeldOut {
    pub(super) data: Dataset,
    batches: Vec<Planned>,
    /// Rows whose pictures should differ from each other: those of one prompt, or, without a teacher, all of one size.
    pub(super) kin: Vec<Vec<usize>>,
    seed: u64,
}

impl HeldOut {
    /// Looks at the rows of a recipe's monitor, if it has one.
    ///
    /// # Errors
    /// If they cannot be read, or were made for something else than this run.
    pub(crate) fn survey<'a>(
        recipe: &'a Recipe,
        with: Preparation<'a>,
    ) -> Result<Option<Survey<'a>>, TrainError> {
        if recipe.monitor_steps == 0 {
            return Ok(None);
        }
        let its_own = of_its_own(recipe);
        if recipe.task.objective() == Objective::Distillation && recipe.monitor_metadata_path.is_some() {
            provenance::check(&its_own, with.source, with.model)?;
        }
        let base = recipe.monitor_metadata_path.as_deref().map_or(with.base, folder_of);
        Survey::of(&rows(recipe, with.fit)?, Preparation { base, ..with }).map(Some)
    }

    /// The rows, encoded where they are not stored; `None` when asked to stop before all was done.
    ///
    /// # Errors
    /// As [`Survey::encode`].
    pub(crate) fn encode(recipe: &Recipe, survey: Survey<'_>) -> Result<Option<Self>, TrainError> {
        let Some(data) = survey.encode()? else { return Ok(None) };
        let distills = recipe.task.objective() == Objective::Distillation;
        let order: Vec<usize> = (0..data.len()).collect();
        let batches = buckets::batches(&groups(&data), &order, PICTURES_PER_BATCH);
        let planned = |positions| Planned { positions, generators: None, step: 0, epoch: 0 };
        let batches = batches.into_iter().map(planned).collect();
        let kin = |sample: &Sample| (distills.then_some(sample.prompt), sample.group.extent);
        let kinds: Vec<_> = data.samples().iter().map(kin).collect();
        let kin = buckets::batches(&kinds, &order, data.len());
        Ok(Some(Self { data, batches, kin, seed: recipe.seed }))
    }

    /// What the rows of a batch agree in, row by row.
    pub(super) fn groups(&self) -> Vec<Group> {
        groups(&self.data)
    }

    /// What `of` makes of each batch, in the order of the rows.
    pub(super) fn per_row<T>(
        &self,
        mut of: impl FnMut(&Batch<'_>) -> Result<Vec<T>, TrainError>,
    ) -> Result<Vec<T>, TrainError> {
        let mut all: Vec<(usize, T)> = Vec::new();
        for planned in &self.batches {
            let read = self.data.reading(&planned.positions)()?;
            let batch = Batch::new(&self.data, planned.clone(), self.seed, read);
            all.extend(planned.positions.iter().copied().zip(of(&batch)?));
        }
        all.sort_by_key(|(row, _)| *row);
        Ok(all.into_iter().map(|(_, made)| made).collect())
    }
}

/// The rows of a data set that are trained on: without a monitor, or with a data set of its own, all.
///
/// # Errors
/// If nothing is left.
pub(crate) fn training_rows(recipe: &Recipe, rows: Vec<SourceRow>) -> Result<Vec<SourceRow>, TrainError> {
    if recipe.monitor_steps == 0 || recipe.monitor_metadata_path.is_some() {
        return Ok(rows);
    }
    let chosen = Chosen::new(recipe, &rows);
    let kept: Vec<SourceRow> = rows.iter().filter(|row| !chosen.touches(row)).cloned().collect();
    match kept.is_empty() {
        false => Ok(kept),
        true => Err(TrainError::Value {
            key: "monitor_rows",
            found: recipe.monitor_rows.to_string(),
            expected: "fewer than the data set's prompts",
        }),
    }
}

/// The rows a recipe's monitor draws, each with a noise of its own.
///
/// # Errors
/// As [`source::rows`].
fn rows(recipe: &Recipe, fit: Fit) -> Result<Vec<SourceRow>, TrainError> {
    let rows = match &recipe.monitor_metadata_path {
        Some(_) => source::rows(&of_its_own(recipe), fit)?,
        None => {
            let rows = source::rows(recipe, fit)?;
            let chosen = Chosen::new(recipe, &rows);
            rows.into_iter().filter(|row| chosen.prompts.contains(&row.prompt)).collect()
        }
    };
    match recipe.task.objective() {
        Objective::Distillation => with_more_seeds(recipe, rows, fit),
        Objective::FlowMatching => Ok(rows),
    }
}

/// The recipe as if it trained on the monitor's own data set.
pub(super) fn of_its_own(recipe: &Recipe) -> Recipe {
    let Some(path) = &recipe.monitor_metadata_path else { return recipe.clone() };
    Recipe {
        dataset_base_path: folder_of(path).to_owned(),
        dataset_metadata_path: Some(path.clone()),
        // The teacher's pictures are there.
        online_teacher: false,
        ..recipe.clone()
    }
}

fn folder_of(metadata: &Path) -> &Path {
    metadata.parent().unwrap_or(Path::new(""))
}

/// What is held out of a training set.
struct Chosen {
    prompts: HashSet<String>,
    /// Their pictures, which other captions may tell of too.
    pictures: HashSet<String>,
}

impl Chosen {
    /// So many prompts of the data set as the recipe asks for, by its seed.
    fn new(recipe: &Recipe, rows: &[SourceRow]) -> Self {
        let draw = Draw { seed: recipe.seed, epoch: 0, row: 0 };
        let mut prompts = HashSet::new();
        for at in draw.generator(Purpose::HeldOut).randperm(rows.len()) {
            if prompts.len() == recipe.monitor_rows {
                break;
            }
            prompts.insert(rows[at].prompt.clone());
        }
        let held_out = rows.iter().filter(|row| prompts.contains(&row.prompt));
        let pictures = held_out.filter_map(|row| Some(row.picture.as_ref()?.name().into_owned()));
        Self { pictures: pictures.collect(), prompts }
    }

    fn touches(&self, row: &SourceRow) -> bool {
        let picture = row.picture.as_ref();
        self.prompts.contains(&row.prompt)
            || picture.is_some_and(|picture| self.pictures.contains(&*picture.name()))
    }
}

/// Adds rows without a picture until each prompt has as many as the recipe asks for, and gives those without a seed one.
fn with_more_seeds(recipe: &Recipe, rows: Vec<SourceRow>, fit: Fit) -> Result<Vec<SourceRow>, TrainError> {
    let mut prompts: Vec<Vec<SourceRow>> = Vec::new();
    let mut index = HashMap::new();
    for row in rows {
        let at = *index.entry(row.prompt.clone()).or_insert(prompts.len());
        if at == prompts.len() {
            prompts.push(Vec::new());
        }
        prompts[at].push(row);
    }
    for (number, rows) in prompts.iter_mut().enumerate() {
        let more = SourceRow {
            picture: None,
            seed: None,
            extent: Some(extent_of(&rows[0], fit)?),
            ..rows[0].clone()
        };
        rows.resize(rows.len().max(recipe.monitor_seeds), more);
        for (copy, row) in rows.iter_mut().enumerate() {
            let draw = Draw { seed: recipe.seed, epoch: copy as u64, row: number as u64 };
            row.seed.get_or_insert(draw.seed(Purpose::HeldOut));
        }
    }
    Ok(prompts.concat())
}

/// The size a row is drawn at.
fn extent_of(row: &SourceRow, fit: Fit) -> Result<Extent, TrainError> {
    match &row.picture {
        Some(picture) => picture.target(fit),
        None => Ok(row.extent.expect("a row without a picture has the run's size")),
    }
}

fn groups(data: &Dataset) -> Vec<Group> {
    data.samples().iter().map(|sample| sample.group).collect()
}
