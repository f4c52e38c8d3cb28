//! A watch over held-out prompts: every so many steps the student draws them as it will be used, from the same noise
//! each time, and its pictures are compared with the teacher's from that noise.
//!
//! In a run without a teacher (`sft`) the reference is the held-out rows' real pictures, which no noise leads to:
//! pictures are compared as sets, drawn with the settings of the sample pictures, and the paired error is that of the
//! velocity, at fixed noise and levels.
//!
//! What follows from what it sees is in [`history`]; a method knows nothing of it.

mod files;
mod held_out;
mod history;
mod reference;

use burn::tensor::Tensor;
use fewstep_data::image::Picture;
use fewstep_flow::path;
use fewstep_models::sampling::latents_from_noise;
use fewstep_models::{Denoiser, Model};
use fewstep_report::{Appearance, diversity, latent_mse};

use crate::batch::Batch;
use crate::checkpoint::Progress;
use crate::guard::storable;
use crate::host::{HostTensor, to_vec};
use crate::observer::{Event, Observer};
use crate::recipe::{Objective, Recipe};
use crate::{TrainError, samples};
use files::Files;
pub(crate) use held_out::{HeldOut, training_rows};
pub use history::Check;
use history::Limits;
pub(crate) use history::best;
use reference::Reference;

/// Noise levels at which the error of the velocity is taken.
const LEVELS: [f32; 4] = [0.125, 0.375, 0.625, 0.875];

/// Half a level of a picture: below it a measure is what rounding leaves, and is not divided by.
const FLOOR: f64 = 0.5 / 255.0;

/// A run's monitor.
pub(crate) struct Monitor<'a> {
    recipe: &'a Recipe,
    rows: HeldOut,
    reference: Reference,
    limits: Limits,
    files: Files,
}

impl<'a> Monitor<'a> {
    /// A monitor that continues after `progress`; `start` is the model before training.
    ///
    /// # Errors
    /// If the teacher's pictures cannot be drawn, or a file cannot be read or written.
    pub(crate) fn new(
        recipe: &'a Recipe,
        rows: HeldOut,
        start: &Model,
        progress: &Progress,
    ) -> Result<Self, TrainError> {
        Ok(Self {
            recipe,
            reference: Reference::new(recipe, &rows, start)?,
            rows,
            limits: Limits::new(recipe),
            files: Files::open(&recipe.output_path, &progress.checks)?,
        })
    }

    /// Whether a look is due that was not made yet: before the first step, and every so many.
    pub(crate) fn is_due(&self, progress: &Progress) -> bool {
        let due = |last: &Check| {
            last.step < progress.step && progress.step.is_multiple_of(self.recipe.monitor_steps)
        };
        progress.checks.last().is_none_or(due)
    }

    /// Looks at what a model, on the plain side, draws, and takes it down.
    ///
    /// # Errors
    /// If a prompt cannot be encoded or a file cannot be written.
    pub(crate) fn look(
        &mut self,
        model: &Model,
        progress: &mut Progress,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let check = self.check(model, progress.step)?;
        progress.checks.push(check);
        self.files.add(&progress.checks)?;
        observer.on(Event::Monitored { check, is_best: progress.is_best() });
        Ok(())
    }

    /// Names the best checkpoint in a file beside it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn mark_best(&self, progress: &Progress) -> Result<(), TrainError> {
        self.files.mark_best(&progress.checks)
    }

    /// Why the run should end now, for a person.
    pub(crate) fn reason_to_stop(&self, progress: &Progress) -> Option<String> {
        self.limits.reason_to_stop(&progress.checks)
    }

    fn check(&self, model: &Model, step: u64) -> Result<Check, TrainError> {
        let drawn = self.rows.per_row(|batch| self.draw(model, batch))?;
        let (latents, pictures): (Vec<_>, Vec<_>) = drawn.into_iter().unzip();
        let error = match self.recipe.task.objective() {
            Objective::Distillation => self.latent_error(&latents),
            Objective::FlowMatching => self.velocity_error(model)?,
        };
        let (found, expected) =
            (Appearance::of(&pictures).expect("a monitor has rows"), self.reference.appearance);
        let apart = diversity(&pictures, &self.rows.kin).zip(self.reference.diversity);
        Ok(Check {
            step,
            paired_error: storable(error),
            saturation_ratio: ratio(found.saturation, expected.saturation),
            contrast_ratio: ratio(found.contrast, expected.contrast),
            sharpness_ratio: ratio(found.sharpness, expected.sharpness),
            diversity_ratio: apart.map(|(found, expected)| ratio(found, expected)),
        })
    }

    /// Latents and picture of each row of a batch.
    fn draw(&self, model: &Model, batch: &Batch<'_>) -> Result<Vec<(HostTensor, Picture)>, TrainError> {
        let (recipe, group) = (self.recipe, batch.group());
        let (grid, cfg_scale) = match recipe.task.objective() {
            Objective::Distillation => (
                recipe.training_grid.sigmas(model, group.num_inference_steps, group.extent)?,
                recipe.student_guidance.scale(group.cfg_scale()),
            ),
            Objective::FlowMatching => {
                let (steps, cfg_scale) = samples::settings(recipe, group, model.defaults());
                (model.sigma_grid(steps, group.extent)?, cfg_scale)
            }
        };
        let guidance = batch.guidance(model, cfg_scale)?;
        let noise = batch.initial_noise(model.dtype().into());
        let latents = latents_from_noise(model, &grid, noise, &guidance);
        let pictures = pictures(model, latents.clone(), group.extent.frames);
        Ok(HostTensor::rows(latents).into_iter().zip(pictures).collect())
    }

    /// The mean over rows of the squared error to the reference.
    fn latent_error(&self, drawn: &[HostTensor]) -> f64 {
        let pairs = drawn.iter().zip(&self.reference.latents);
        pairs.map(|(drawn, reference)| latent_mse(&drawn.values, &reference.values)).sum::<f64>()
            / drawn.len() as f64
    }

    /// The mean over rows and [`LEVELS`] of the velocity's squared error.
    fn velocity_error(&self, model: &Model) -> Result<f64, TrainError> {
        let errors = self.rows.per_row(|batch| {
            let clean = batch.latents();
            let condition = batch.condition(model, &vec![false; batch.len()])?;
            let noise = batch.initial_noise(model.dtype().into());
            let target = path::velocity(clean.clone(), noise.clone());
            let mut errors = vec![0.0; batch.len()];
            for level in LEVELS {
                let sigma = Tensor::full([batch.len()], level, &clean.device());
                let noisy = path::noisy(clean.clone(), noise.clone(), sigma.clone());
                let velocity = model.velocity(noisy, sigma, &condition);
                let rows = HostTensor::rows(velocity).into_iter().zip(HostTensor::rows(target.clone()));
                for (error, (found, target)) in errors.iter_mut().zip(rows) {
                    *error += latent_mse(&found.values, &target.values) / LEVELS.len() as f64;
                }
            }
            Ok(errors)
        })?;
        Ok(errors.iter().sum::<f64>() / errors.len() as f64)
    }
}

/// Found over expected, both raised by [`FLOOR`].
fn ratio(found: f64, expected: f64) -> f32 {
    storable((found + FLOOR) / (expected + FLOOR))
}

/// Latents `[B, C, F · H, W]` as pictures; of videos the frames in the middle.
fn pictures(model: &Model, latents: Tensor<4>, frames: usize) -> Vec<Picture> {
    let pixels = model.decode_latents(latents, frames);
    let height = pixels.dims()[2] / frames;
    let pixels = pixels.narrow(2, frames / 2 * height, height);
    let [_, channels, height, width] = pixels.dims();
    let rounding = model.conventions().rounding;
    let values = to_vec(pixels);
    let pixels = values.chunks_exact(channels * height * width);
    pixels.map(|pixels| Picture::from_pixels(pixels, width, height, rounding)).collect()
}

impl Progress {
    /// Whether the last look, made at this very step, is the best one.
    pub(crate) fn is_best(&self) -> bool {
        best(&self.checks).is_some_and(|best| best.step == self.step)
    }
}
