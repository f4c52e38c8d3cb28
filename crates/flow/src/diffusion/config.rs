//! The official `scheduler_config.json` of `DDIMScheduler`, `PNDMScheduler` and `EulerDiscreteScheduler`.
//!
//! What the published models do not use (Karras and other spacings of the levels, clipped or thresholded pictures,
//! continuous timesteps, Runge-Kutta warm-up) is refused by name, not ignored.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::table::{BetaSchedule, NoiseTable, clean_variances, to_zero_terminal_snr};
use super::{Prediction, scale};
use crate::grid::check_steps;
use crate::schedule::{GridRequest, ShiftOverride, SigmaRounding, StrengthRule, TrainingLevels};
use crate::{FlowError, SigmaGrid, Solver};

/// The most training timesteps: far more than models have.
const MAX_TIMESTEPS: usize = 100_000;

/// A `scheduler_config.json`; absent keys have diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiffusionConfig {
    #[serde(rename = "_class_name")]
    class: Class,
    /// What the network predicts.
    #[serde(default = "noise")]
    pub prediction_type: Prediction,
    #[serde(default = "thousand")]
    num_train_timesteps: usize,
    #[serde(default = "first_beta")]
    beta_start: f64,
    #[serde(default = "last_beta")]
    beta_end: f64,
    #[serde(default = "linear")]
    beta_schedule: BetaSchedule,
    #[serde(default)]
    timestep_spacing: Option<TimestepSpacing>,
    #[serde(default)]
    steps_offset: usize,
    /// Whether DDIM's and PNDM's last step leaves no noise.
    #[serde(default)]
    set_alpha_to_one: Option<bool>,
    /// The same of Euler's.
    #[serde(default)]
    final_sigmas_type: FinalSigma,
    #[serde(default)]
    rescale_betas_zero_snr: bool,
    /// All other keys, kept for writing the file again.
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Class {
    #[serde(rename = "DDIMScheduler")]
    Ddim,
    #[serde(rename = "PNDMScheduler")]
    Pndm,
    #[serde(rename = "EulerDiscreteScheduler")]
    Euler,
}

/// Which timesteps a run visits (arXiv 2305.08891, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepSpacing {
    /// Equal distances from the first timestep to the last.
    Linspace,
    /// Multiples of a whole distance, from 0.
    Leading,
    /// The same from the last timestep down.
    Trailing,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FinalSigma {
    #[default]
    Zero,
    SigmaMin,
}

fn noise() -> Prediction {
    Prediction::Noise
}

fn thousand() -> usize {
    1000
}

fn first_beta() -> f64 {
    0.0001
}

fn last_beta() -> f64 {
    0.02
}

fn linear() -> BetaSchedule {
    BetaSchedule::Linear
}

impl DiffusionConfig {
    /// Classes of the files that are read.
    pub(crate) const CLASSES: [&str; 3] = ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"];

    /// Reads a config and checks that it can be followed.
    ///
    /// # Errors
    /// When a field is missing, asks for what is not implemented, or is out of its range.
    pub(crate) fn from_value(value: Value) -> Result<Self, FlowError> {
        let config: Self = serde_json::from_value(value)?;
        config.check()?;
        Ok(config)
    }

    /// The class that the file names.
    pub(crate) fn class_name(&self) -> &'static str {
        match self.class {
            Class::Ddim => Self::CLASSES[0],
            Class::Pndm => Self::CLASSES[1],
            Class::Euler => Self::CLASSES[2],
        }
    }

    /// σ of every training timestep.
    pub fn table(&self) -> NoiseTable {
        let betas = [self.beta_start, self.beta_end];
        let mut variances = clean_variances(self.beta_schedule, betas, self.num_train_timesteps);
        // diffusers' PNDM knows no such key.
        if self.rescale_betas_zero_snr && self.class != Class::Pndm {
            to_zero_terminal_snr(&mut variances);
            if self.class == Class::Euler {
                // Its levels are s/a, which must be finite.
                variances[self.num_train_timesteps - 1] = 2.0f32.powi(-24);
            }
        }
        NoiseTable::of_clean_variances(&variances)
    }

    /// The solver that a published pipeline with this config has.
    pub fn solver(&self) -> Solver {
        match (self.class, self.spacing(), self.prediction_type) {
            (Class::Ddim, TimestepSpacing::Linspace | TimestepSpacing::Trailing, _) => Solver::Ddim,
            (Class::Ddim | Class::Euler, ..) => Solver::Euler,
            (Class::Pndm, _, Prediction::Angular) => Solver::PlmsAngular,
            (Class::Pndm, ..) => Solver::Plms,
        }
    }

    /// The factor that makes noise the first state of a run, at the first sigma of its grid.
    ///
    /// Published models are shown the noise itself, as if it were the state there, although that still has some of the
    /// picture in it.
    pub fn start_scale(&self, sigma: f32) -> f32 {
        match (self.class, self.spacing()) {
            (Class::Euler, TimestepSpacing::Linspace | TimestepSpacing::Trailing) => sigma,
            _ => scale(sigma),
        }
    }

    /// What the last state of a run is divided by to be its latents, at the last sigma of its grid: Euler's scheduler has
    /// states x₀ + σ·e, the others variance-preserving ones.
    pub fn end_scale(&self, sigma: f32) -> f32 {
        match self.class {
            Class::Euler => 1.0 - sigma,
            Class::Ddim | Class::Pndm => scale(sigma),
        }
    }

    /// The grid of a run: the timesteps of the published pipeline, or DiffSynth's, which are equally far from the last
    /// timestep to the first, whatever the config says.
    ///
    /// # Errors
    /// When the request asks for no steps, for more than there are timesteps, for a strength outside (0, 1], or for a
    /// shift; or when two steps start at the same timestep.
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, FlowError> {
        self.check_request(request)?;
        let table = self.table();
        let levels = |timesteps: Vec<f64>, end: f32| {
            let mut sigmas: Vec<f32> = timesteps.into_iter().map(|timestep| table.sigma(timestep)).collect();
            // A step from the first timestep to itself changes nothing and is not taken.
            if sigmas.last() != Some(&end) {
                sigmas.push(end);
            }
            SigmaGrid::new(sigmas)
        };
        match (request.rounding, self.class) {
            (SigmaRounding::Diffsynth, _) => levels(self.diffsynth_timesteps(request), 0.0),
            (SigmaRounding::Diffusers, Class::Euler) => levels(self.timesteps(request), self.end(&table)),
            (SigmaRounding::Diffusers, Class::Ddim | Class::Pndm) => {
                let timesteps = self.timesteps(request);
                let mut landings = self.landings(&timesteps, request, &table);
                let grid = levels(timesteps, landings[landings.len() - 1])?;
                landings.truncate(grid.steps());
                self.check_landings(&landings, &grid)?;
                Ok(grid.with_landings(landings))
            }
        }
    }

    /// Where diffusers' steps from these timesteps end: an equal part of all timesteps further, wherever the next is.
    fn landings(&self, timesteps: &[f64], request: &GridRequest, table: &NoiseTable) -> Vec<f32> {
        let distance = (self.num_train_timesteps / request.num_inference_steps) as f64;
        let landing = |timestep: &f64| match timestep - distance {
            before if before < 0.0 => self.end(table),
            before => table.sigma(before),
        };
        timesteps.iter().map(landing).collect()
    }

    /// PNDM's steps are followed where each ends at the next one's start.
    fn check_landings(&self, landings: &[f32], grid: &SigmaGrid) -> Result<(), FlowError> {
        let is_next = landings.iter().zip(&grid.as_slice()[1..]).all(|(landing, next)| landing == next);
        if self.class != Class::Pndm || is_next {
            return Ok(());
        }
        let found = format!("{:?} with {} steps", self.spacing(), grid.steps()).to_lowercase();
        let expected = "leading, or trailing with a number of steps that divides num_train_timesteps (PNDM with steps \
                        of other lengths is not implemented)";
        Err(FlowError::Field { field: "timestep_spacing".into(), found, expected: expected.into() })
    }

    /// Every training timestep, the last one first; all weigh alike.
    pub fn training_levels(&self) -> TrainingLevels {
        TrainingLevels::alike(self.table().sigmas().iter().rev().copied().collect())
    }

    fn check_request(&self, request: &GridRequest) -> Result<(), FlowError> {
        check_steps(request.num_inference_steps)?;
        let refused = |field, found: String, expected| Err(FlowError::Request { field, found, expected });
        if request.num_inference_steps > self.num_train_timesteps {
            let found = request.num_inference_steps.to_string();
            return refused("num_inference_steps", found, "at most as many as training timesteps");
        }
        match request.shift {
            Some(ShiftOverride::Mu(mu)) => {
                refused("exponential_shift_mu", mu.to_string(), "none: the model's schedule has no shift")
            }
            Some(ShiftOverride::Factor(factor)) => {
                refused("shift", factor.to_string(), "none: the model's schedule has no shift")
            }
            Some(ShiftOverride::DiffsynthTraining) | None => request.check_strength(),
        }
    }

    /// Falling, of the published pipelines.
    fn timesteps(&self, request: &GridRequest) -> Vec<f64> {
        let (all, steps) = (self.num_train_timesteps as f64, request.num_inference_steps);
        let rounded = |timestep: f64| match self.class {
            Class::Euler => timestep,
            Class::Ddim | Class::Pndm => timestep.round_ties_even(),
        };
        let timestep = |step: usize| match self.spacing() {
            TimestepSpacing::Linspace => {
                let part = step as f64 / (steps.max(2) - 1) as f64;
                rounded((all - 1.0) * if steps == 1 { 0.0 } else { 1.0 - part })
            }
            TimestepSpacing::Leading => {
                let distance = self.num_train_timesteps / steps;
                ((steps - 1 - step) * distance + self.steps_offset) as f64
            }
            TimestepSpacing::Trailing => (all - step as f64 * (all / steps as f64)).round_ties_even() - 1.0,
        };
        let kept = GridRequest { strength_rule: StrengthRule::SkipSteps, ..*request };
        (kept.skipped_steps()..steps).map(timestep).collect()
    }

    /// Falling, from the last timestep, or the strength's part of it, to the first.
    fn diffsynth_timesteps(&self, request: &GridRequest) -> Vec<f64> {
        let started = (self.num_train_timesteps as f64 * request.denoising_strength).round_ties_even();
        let highest = (started - 1.0).max(0.0);
        let steps = request.num_inference_steps.min(highest as usize + 1);
        let distance = highest / (steps.max(2) - 1) as f64;
        (0..steps).map(|step| (highest - step as f64 * distance).round_ties_even()).collect()
    }

    /// The sigma that the published pipeline's last step leads to.
    fn end(&self, table: &NoiseTable) -> f32 {
        let to_zero = match self.class {
            Class::Ddim => self.set_alpha_to_one.unwrap_or(true),
            Class::Pndm => self.set_alpha_to_one.unwrap_or(false),
            Class::Euler => self.final_sigmas_type == FinalSigma::Zero,
        };
        if to_zero { 0.0 } else { table.sigmas()[0] }
    }

    fn spacing(&self) -> TimestepSpacing {
        let default = match self.class {
            Class::Ddim | Class::Pndm => TimestepSpacing::Leading,
            Class::Euler => TimestepSpacing::Linspace,
        };
        self.timestep_spacing.unwrap_or(default)
    }

    fn check(&self) -> Result<(), FlowError> {
        use Class::{Ddim, Euler, Pndm};
        // Each with the classes that read it; the others' schedulers ignore it.
        let only: [(&str, Value, &[Class]); 11] = [
            ("trained_betas", Value::Null, &[Ddim, Pndm, Euler]),
            ("clip_sample", false.into(), &[Ddim]),
            ("thresholding", false.into(), &[Ddim]),
            ("skip_prk_steps", true.into(), &[Pndm]),
            ("use_karras_sigmas", false.into(), &[Euler]),
            ("use_exponential_sigmas", false.into(), &[Euler]),
            ("use_beta_sigmas", false.into(), &[Euler]),
            ("interpolation_type", "linear".into(), &[Euler]),
            ("timestep_type", "discrete".into(), &[Euler]),
            ("sigma_min", Value::Null, &[Euler]),
            ("sigma_max", Value::Null, &[Euler]),
        ];
        let absent = |field| match (self.class, field) {
            (Ddim, "clip_sample") => Some(Value::from(true)),
            (Pndm, "skip_prk_steps") => Some(Value::from(false)),
            _ => None,
        };
        for (field, expected, _) in only.into_iter().filter(|(.., classes)| classes.contains(&self.class)) {
            let found = self.other.get(field).cloned().or_else(|| absent(field));
            if let Some(found) = found.filter(|found| *found != expected) {
                let expected = format!("{expected} (anything else is not implemented)");
                return Err(FlowError::Field { field: field.into(), found: found.to_string(), expected });
            }
        }
        if self.class == Class::Pndm && self.prediction_type == Prediction::Clean {
            let expected = "epsilon or v_prediction, as PNDM has it".into();
            return Err(FlowError::Field {
                field: "prediction_type".into(),
                found: "sample".into(),
                expected,
            });
        }
        self.check_ranges()
    }

    fn check_ranges(&self) -> Result<(), FlowError> {
        let betas = 0.0 < self.beta_start && self.beta_start <= self.beta_end && self.beta_end < 1.0;
        let ranges = [
            (
                "num_train_timesteps",
                self.num_train_timesteps.to_string(),
                (2..=MAX_TIMESTEPS).contains(&self.num_train_timesteps),
                format!("2 to {MAX_TIMESTEPS}"),
            ),
            (
                "beta_start",
                self.beta_start.to_string(),
                betas,
                format!("more than 0 and at most beta_end, {}, which is less than 1", self.beta_end),
            ),
            (
                "steps_offset",
                self.steps_offset.to_string(),
                self.steps_offset < self.num_train_timesteps,
                "less than num_train_timesteps".into(),
            ),
        ];
        match ranges.into_iter().find(|(_, _, valid, _)| !valid) {
            Some((field, found, _, expected)) => {
                Err(FlowError::Field { field: field.into(), found, expected })
            }
            None => Ok(()),
        }
    }
}
