//! Pictures drawn on the way, so that a person sees what the loss does not tell: by the model as it learns, and once by
//! the teacher that a student shall equal.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use fewstep_data::image::Picture;
use fewstep_data::provenance::Provenance;
use fewstep_models::{Defaults, Model, Pipeline, Request};
use fewstep_report::grid::contact_sheet;
use fewstep_report::run::{SAMPLES_FOLDER, Sample, SampleSet, TEACHER, step_folder, step_folders};

use crate::TrainError;
use crate::dataset::Group;
use crate::recipe::{Objective, Recipe, StudentGuidance, TrainingGrid};

/// What is drawn every so many steps.
pub(crate) struct Samples {
    folder: PathBuf,
    every: u64,
    /// What the trained model draws, and on which grid.
    student: Vec<Request>,
    grid: TrainingGrid,
    /// What the teacher draws, where there is one.
    teacher: Option<Vec<Request>>,
}

/// Pictures drawn at once.
pub(crate) const BATCH: usize = 8;
/// Pixels between the pictures of a sheet.
const GAP_PX: usize = 2;

impl Samples {
    /// The sample settings of a recipe; `None` where it asks for none. `group` is the first kind of batch, whose picture
    /// size and, for a student, steps and guidance are taken.
    ///
    /// # Errors
    /// If the file of prompts or the data set's provenance cannot be read.
    pub(crate) fn new(recipe: &Recipe, group: Group, usual: Defaults) -> Result<Option<Self>, TrainError> {
        let prompts = recipe.sample_prompts()?;
        if recipe.sample_steps == 0 || prompts.is_empty() {
            return Ok(None);
        }
        let distils = recipe.task.objective() == Objective::Distillation;
        let (num_inference_steps, cfg_scale) = settings(recipe, group, usual);
        let request = |prompt: &String| Request {
            seed: recipe.seed,
            num_inference_steps,
            cfg_scale,
            embedded_guidance: group.embedded_guidance().filter(|_| distils),
            num_frames: group.extent.frames,
            ..Request::new(prompt, group.extent.height, group.extent.width)
        };
        let student: Vec<Request> = prompts.iter().map(request).collect();
        Ok(Some(Self {
            folder: recipe.output_path.join(SAMPLES_FOLDER),
            every: recipe.sample_steps,
            grid: if distils { recipe.training_grid } else { TrainingGrid::Inference },
            teacher: distils.then(|| teacher(recipe, &student, usual)).transpose()?,
            student,
        }))
    }

    /// Whether pictures are drawn after a step of so many.
    pub(crate) fn is_due(&self, step: u64, total_steps: u64) -> bool {
        step.is_multiple_of(self.every) || step == total_steps
    }

    /// Whether there is a teacher whose pictures are not there yet.
    pub(crate) fn lacks_teacher(&self) -> bool {
        let drawn = || SampleSet::read(&self.folder.join(TEACHER));
        self.teacher.as_ref().is_some_and(|requests| drawn() != Some(describe(requests)))
    }

    /// Draws the teacher's pictures; returns the path of their sheet.
    ///
    /// # Errors
    /// As [`Samples::draw`].
    ///
    /// # Panics
    /// Where there is no teacher.
    pub(crate) fn draw_teacher(&self, teacher: Model, device: &Device) -> Result<PathBuf, TrainError> {
        let requests =
            self.teacher.as_ref().expect("only a run that lacks a teacher's pictures has them drawn");
        self.write(TEACHER, requests, &Pipeline::new(teacher, device.clone()), None)
    }

    /// Removes the drawings of steps past `step`, which a continued run comes past again.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub(crate) fn continue_after(&self, step: u64) -> Result<(), TrainError> {
        let mut later = step_folders(&self.folder).into_iter().filter(|(drawn, _)| *drawn > step);
        later.try_for_each(|(_, folder)| remove(&folder))
    }

    /// Whether there are pictures of a student that has not learned yet, to be drawn before the first step.
    pub(crate) fn starts_with_student(&self) -> bool {
        self.teacher.is_some()
    }

    /// Draws the pictures of a step; returns the path of their sheet.
    ///
    /// # Errors
    /// If a prompt cannot be encoded or a file cannot be written.
    pub(crate) fn draw(&self, model: Model, device: &Device, step: u64) -> Result<PathBuf, TrainError> {
        let pipeline = Pipeline::new(model, device.clone());
        self.write(&step_folder(step), &self.student, &pipeline, Some(self.grid))
    }

    /// Draws on a training grid, or on the requests' own, and writes pictures and sheet.
    fn write(
        &self,
        name: &str,
        requests: &[Request],
        pipeline: &Pipeline,
        grid: Option<TrainingGrid>,
    ) -> Result<PathBuf, TrainError> {
        let mut pictures: Vec<Picture> = Vec::new();
        for batch in requests.chunks(BATCH) {
            let generated = match grid {
                None => pipeline.generate_batch(batch)?,
                Some(grid) => {
                    let (steps, extent) = (batch[0].num_inference_steps, batch[0].extent());
                    let sigmas = grid.sigmas(&pipeline.model, steps, extent)?;
                    pipeline.generate_on_grid(batch, sigmas)?
                }
            };
            pictures.extend(generated.iter().map(|generated| generated.picture().clone()));
        }
        let folder = self.folder.join(name);
        let path = sheet(&folder);
        let columns = (pictures.len() as f64).sqrt().ceil() as usize;
        fs::create_dir_all(&self.folder).map_err(TrainError::io(&self.folder))?;
        contact_sheet(&pictures, columns, GAP_PX).save_png(&path)?;
        // Last: a folder that is there says that its sheet is too.
        describe(requests).write(&folder, &pictures).map_err(TrainError::io(&folder))?;
        Ok(path)
    }
}

/// Steps and guidance of the sample pictures: the recipe's, or those that a student is trained for.
pub(crate) fn settings(recipe: &Recipe, group: Group, usual: Defaults) -> (usize, f32) {
    let (steps, cfg_scale) = match recipe.task.objective() {
        Objective::Distillation => student(recipe, group),
        // Half of the steps show as much on the way.
        Objective::FlowMatching => (usual.num_inference_steps.div_ceil(2), usual.cfg_scale),
    };
    let cfg_scale = recipe.sample_cfg_scale.map_or(cfg_scale, |scale| scale as f32);
    (recipe.sample_num_inference_steps.unwrap_or(steps), cfg_scale)
}

/// Steps and guidance that a student is trained for.
fn student(recipe: &Recipe, group: Group) -> (usize, f32) {
    let cfg_scale = match recipe.student_guidance {
        StudentGuidance::Apply => group.cfg_scale(),
        StudentGuidance::Ignore => 1.0,
    };
    (group.num_inference_steps, cfg_scale)
}

/// The student's requests with the settings that the teacher's pictures of the data set were drawn with.
fn teacher(recipe: &Recipe, student: &[Request], usual: Defaults) -> Result<Vec<Request>, TrainError> {
    let drawn = match recipe.online_teacher {
        true => None,
        false => Provenance::read(&recipe.dataset_base_path)?,
    };
    let settings = |request: &Request| match &drawn {
        Some(drawn) => Request {
            num_inference_steps: drawn.num_inference_steps,
            cfg_scale: drawn.cfg_scale,
            embedded_guidance: drawn.embedded_guidance,
            negative_prompt: drawn.negative_prompt.clone(),
            exponential_shift_mu: drawn.exponential_shift_mu,
            ..request.clone()
        },
        None => {
            let (num_inference_steps, cfg_scale) = recipe.teacher(usual);
            Request { num_inference_steps, cfg_scale, embedded_guidance: None, ..request.clone() }
        }
    };
    Ok(student.iter().map(settings).collect())
}

fn describe(requests: &[Request]) -> SampleSet {
    let first = &requests[0];
    let sample = |request: &Request| Sample { prompt: request.prompt.clone(), seed: request.seed };
    SampleSet {
        num_inference_steps: first.num_inference_steps,
        cfg_scale: first.cfg_scale,
        height: first.height,
        width: first.width,
        samples: requests.iter().map(sample).collect(),
    }
}

/// The contact sheet beside a drawing's folder.
fn sheet(folder: &Path) -> PathBuf {
    folder.with_extension("png")
}

/// Removes a drawing and its sheet.
fn remove(folder: &Path) -> Result<(), TrainError> {
    fs::remove_dir_all(folder).map_err(TrainError::io(folder))?;
    let sheet = sheet(folder);
    match sheet.exists() {
        true => fs::remove_file(&sheet).map_err(TrainError::io(&sheet)),
        false => Ok(()),
    }
}
