//! Sigma schedules: how the levels of a run are spaced, shifted and stretched.
//!
//! One formula serves every flow-matching model; a [`Schedule`] holds its constants. They come from a model's
//! `scheduler_config.json` ([`FlowMatchConfig`]) or from the table of the families ([`Schedule::QWEN_IMAGE`] and
//! its neighbours). It is evaluated in f32 in the order of either peer ([`SigmaRounding`]): the grids of both come out
//! bit for bit.
//!
//! Schedules of models that were trained to predict noise are in [`crate::diffusion`]; a [`SchedulerConfig`] is of either
//! kind.

mod config;
mod request;
mod scheduler;
mod templates;
mod training;
mod unipc;

pub use config::FlowMatchConfig;
pub use request::{GridRequest, ShiftOverride, SigmaRounding, StrengthRule};
pub use scheduler::SchedulerConfig;
pub use training::TrainingLevels;
pub use unipc::UniPcConfig;

use crate::{FlowError, SigmaGrid};

/// What a model family fixes about its sigma grids, whatever the number of steps and the size of the picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The levels before the shift.
    pub spacing: Spacing,
    /// How levels are moved towards noise.
    pub shift: Shift,
    /// The sigma at which the last step starts: the shifted levels are stretched to it.
    pub terminal: Option<f64>,
}

/// Equally spaced levels from the start of the run, which is 1 or the denoising strength, named by their
/// end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Spacing {
    /// n steps end at 0.
    ToZero,
    /// n − 1 steps end at 1/n, and a last one at 0. The same as [`Self::ToZero`] when the run starts from pure
    /// noise, but a lower start does not lower the end.
    ToOneStep,
    /// n − 1 steps end at this sigma, and a last one at 0.
    To(f64),
    /// n steps would end at this sigma, but the last one goes on to 0.
    Towards(f64),
}

/// The factor f of the shift s' = f·s / (1 + (f − 1)·s), often written as f = e^μ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shift {
    /// The same f for every size.
    Factor(f64),
    /// μ is linear in the number of image tokens.
    Linear(MuLine),
    /// μ is linear in the number of image tokens and in that of steps: FLUX.2's fit.
    TokensAndSteps,
}

/// The line through two (image tokens, μ), which goes on beyond both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuLine {
    /// Image tokens and μ of the smaller reference picture.
    pub base: (usize, f64),
    /// Image tokens, more than those of `base`, and μ of the larger one.
    pub max: (usize, f64),
}

impl Schedule {
    /// The grid of one run: spaced, shifted, stretched, then 0.
    ///
    /// A run of one step from pure noise has no distance to stretch and goes from 1 to 0, where the peers divide 0 by 0.
    ///
    /// # Errors
    /// When the request asks for no steps, for a strength outside (0, 1], for a shift that is no positive number,
    /// or for so many or so lopsided steps that two levels coincide in f32.
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, FlowError> {
        request.check()?;
        let (shift, rounding) = (self.resolve(request)?, request.rounding);
        let spaced = self.spacing.levels(request.first_level(), request.num_inference_steps, rounding);
        let sigmas = match (self.terminal, spaced.as_slice()) {
            (Some(_), [1.0]) => spaced,
            _ => {
                stretch(spaced.into_iter().map(|sigma| shift.apply(sigma, rounding)).collect(), self.terminal)
            }
        };
        SigmaGrid::new(sigmas.into_iter().skip(request.skipped_steps()).chain([0.0]).collect())
    }

    fn resolve(&self, request: &GridRequest) -> Result<ResolvedShift, FlowError> {
        let shift = match (request.shift, self.shift) {
            (Some(ShiftOverride::Mu(mu)), _) => ResolvedShift::Mu(mu),
            (Some(ShiftOverride::Factor(factor)), _) => ResolvedShift::Factor(factor),
            (None | Some(ShiftOverride::DiffsynthTraining), Shift::Factor(factor)) => {
                ResolvedShift::Factor(factor)
            }
            (Some(ShiftOverride::DiffsynthTraining), _) => {
                ResolvedShift::Mu(templates::DIFFSYNTH_TRAINING_MU)
            }
            (None, Shift::Linear(line)) => ResolvedShift::Mu(line.mu(request.image_tokens)),
            (None, Shift::TokensAndSteps) => {
                ResolvedShift::Mu(templates::flux_2_mu(request.image_tokens, request.num_inference_steps))
            }
        };
        shift.check()?;
        Ok(shift)
    }
}

/// The shift of one run.
#[derive(Clone, Copy)]
enum ResolvedShift {
    Factor(f64),
    Mu(f64),
}

impl ResolvedShift {
    fn check(self) -> Result<(), FlowError> {
        let (field, found, factor, expected) = match self {
            Self::Factor(factor) => ("shift", factor, factor, "a positive number"),
            Self::Mu(mu) => ("exponential_shift_mu", mu, mu.exp(), "a number between -80 and 80"),
        };
        // The f32 formula needs the factor and its inverse.
        if factor > 1e-35 && factor < 1e35 {
            return Ok(());
        }
        Err(FlowError::Request { field, found: found.to_string(), expected })
    }

    /// Forms of one formula, because their last bits differ; what those of pure noise leave above 1 is cut.
    fn apply(self, sigma: f32, rounding: SigmaRounding) -> f32 {
        let shifted = match self {
            Self::Factor(factor) => factor as f32 * sigma / (1.0 + (factor - 1.0) as f32 * sigma),
            Self::Mu(mu) => {
                let factor = mu.exp() as f32;
                let sum = factor + (1.0 / sigma - 1.0);
                match rounding {
                    SigmaRounding::Diffusers => factor / sum,
                    SigmaRounding::Diffsynth => 1.0 / sum * factor,
                }
            }
        };
        shifted.min(1.0)
    }
}

impl Spacing {
    fn levels(self, start: f64, steps: usize, rounding: SigmaRounding) -> Vec<f32> {
        let (lowest, count) = match self {
            Self::ToZero => (0.0, steps + 1),
            Self::ToOneStep => (1.0 / steps as f64, steps),
            Self::To(lowest) => (lowest, steps),
            Self::Towards(lowest) => (lowest, steps + 1),
        };
        let first = lowest + (1.0 - lowest) * start;
        match (rounding, self) {
            (SigmaRounding::Diffsynth, _) => {
                linspace(first as f32, lowest as f32, count).take(steps).collect()
            }
            (SigmaRounding::Diffusers, Self::ToZero) => numpy_linspace(first, first / steps as f64, steps),
            (SigmaRounding::Diffusers, _) => {
                let mut levels = numpy_linspace(first, lowest, count);
                levels.truncate(steps);
                levels
            }
        }
    }
}

/// `numpy.linspace`, then rounded to f32.
fn numpy_linspace(first: f64, last: f64, count: usize) -> Vec<f32> {
    let step = (last - first) / (count.max(2) - 1) as f64;
    let value = |k: usize| if k > 0 && k + 1 == count { last } else { k as f64 * step + first };
    (0..count).map(|k| value(k) as f32).collect()
}

/// `torch.linspace` on the CPU: from the nearer end, with one rounding.
pub(crate) fn linspace(first: f32, last: f32, count: usize) -> impl Iterator<Item = f32> {
    let step = (last - first) / (count.max(2) - 1) as f32;
    (0..count).map(move |k| {
        if k < count / 2 || count == 1 {
            step.mul_add(k as f32, first)
        } else {
            (-step).mul_add((count - 1 - k) as f32, last)
        }
    })
}

impl MuLine {
    fn mu(&self, image_tokens: usize) -> f64 {
        let ((base, base_mu), (max, max_mu)) = (self.base, self.max);
        let slope = (max_mu - base_mu) / (max as f64 - base as f64);
        base_mu + slope * (image_tokens as f64 - base as f64)
    }
}

/// Moves the last of `sigmas` to `terminal` by scaling the distances from 1. A last level of 1 has no distance and
/// stays.
fn stretch(sigmas: Vec<f32>, terminal: Option<f64>) -> Vec<f32> {
    let (Some(terminal), Some(&last)) = (terminal, sigmas.last()) else { return sigmas };
    if last == 1.0 {
        return sigmas;
    }
    let scale = (1.0 - last) / (1.0 - terminal) as f32;
    sigmas.into_iter().map(|sigma| 1.0 - (1.0 - sigma) / scale).collect()
}

#[cfg(test)]
mod tests;
