//! What one run asks of a schedule.

use serde::{Deserialize, Serialize};

use crate::FlowError;
use crate::grid::check_steps;

/// The run that a grid is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GridRequest {
    /// Sampling steps, at least 1.
    pub num_inference_steps: usize,
    /// Image tokens of the picture; enters where the shift depends on the size.
    pub image_tokens: usize,
    /// A shift in place of the schedule's own.
    pub shift: Option<ShiftOverride>,
    /// How much of an input picture is drawn anew, in (0, 1]. At 1 the run starts from pure noise.
    pub denoising_strength: f64,
    /// What a strength below 1 does to the grid.
    pub strength_rule: StrengthRule,
    /// Whose last bits the sigmas have.
    pub rounding: SigmaRounding,
}

/// In which order the one formula is evaluated in f32.
///
/// A network is told 1000 times the sigma and takes sines of it, so that one last bit becomes 1e-5 in its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SigmaRounding {
    /// diffusers' numpy: levels are spaced in f64 and then rounded; f / (f + (1/s − 1)).
    #[default]
    Diffusers,
    /// DiffSynth's torch: levels are spaced in f32; the reciprocal of the same sum, times f. Pure noise may come out a
    /// few last bits below 1.
    Diffsynth,
}

/// A shift in place of a schedule's own.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShiftOverride {
    /// μ: the shift's factor is e^μ (the peers' `exponential_shift_mu`).
    Mu(f64),
    /// The factor itself (the peers' `shift` and `sigma_shift`).
    Factor(f64),
    /// DiffSynth's habit in training, where it passes no picture size: μ = 0.8 in the place of a shift that
    /// depends on the size, so that its student is trained on another grid than it samples on. Static shifts
    /// stay.
    DiffsynthTraining,
}

/// Where a run that keeps part of an input picture starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StrengthRule {
    /// All steps are taken, from a first level that is the strength before the shift (DiffSynth).
    #[default]
    LowerStart,
    /// The first steps of the whole grid are left out, so that the strength's part of them remains, rounded up
    /// (diffusers).
    SkipSteps,
}

impl GridRequest {
    /// A run from pure noise with the schedule's own shift.
    pub fn new(num_inference_steps: usize, image_tokens: usize) -> Self {
        Self {
            num_inference_steps,
            image_tokens,
            shift: None,
            denoising_strength: 1.0,
            strength_rule: StrengthRule::default(),
            rounding: SigmaRounding::default(),
        }
    }

    pub(super) fn check(&self) -> Result<(), FlowError> {
        check_steps(self.num_inference_steps)?;
        self.check_strength()
    }

    pub(crate) fn check_strength(&self) -> Result<(), FlowError> {
        if self.denoising_strength > 0.0 && self.denoising_strength <= 1.0 {
            return Ok(());
        }
        Err(FlowError::Request {
            field: "denoising_strength",
            found: self.denoising_strength.to_string(),
            expected: "more than 0 and at most 1",
        })
    }

    /// Before the shift.
    pub(super) fn first_level(&self) -> f64 {
        match self.strength_rule {
            StrengthRule::LowerStart => self.denoising_strength,
            StrengthRule::SkipSteps => 1.0,
        }
    }

    pub(crate) fn skipped_steps(&self) -> usize {
        let steps = self.num_inference_steps as f64;
        match self.strength_rule {
            StrengthRule::LowerStart => 0,
            StrengthRule::SkipSteps => (steps - steps * self.denoising_strength) as usize,
        }
    }
}
