//! The schedules of the model families, as published or as DiffSynth ships them where nothing is published.

use super::{MuLine, Schedule, Shift, Spacing};

/// μ of DiffSynth's grids when no picture size is given, which is so in all of its training.
pub(super) const DIFFSYNTH_TRAINING_MU: f64 = 0.8;

impl Schedule {
    /// Qwen-Image: equal to its `scheduler_config.json` and to DiffSynth's template.
    pub const QWEN_IMAGE: Self = Self {
        spacing: Spacing::ToZero,
        shift: Shift::Linear(MuLine { base: (256, 0.5), max: (8192, 0.9) }),
        terminal: Some(0.02),
    };

    /// Qwen-Image-Lightning: equal to its `scheduler_config.json` and to DiffSynth's template. Not a static
    /// shift of 3, because DiffSynth trains it at its own μ too.
    pub const QWEN_IMAGE_LIGHTNING: Self = Self {
        spacing: Spacing::ToZero,
        shift: Shift::Linear(MuLine { base: (256, LN_3), max: (8192, LN_3) }),
        terminal: None,
    };

    /// FLUX.1 as DiffSynth runs it. The published schedules of dev and schnell are other ones.
    pub const DIFFSYNTH_FLUX_1: Self =
        Self { spacing: Spacing::To(0.003 / 1.002), shift: Shift::Factor(3.0), terminal: None };

    /// FLUX.2. Its `scheduler_config.json` has another shift, which the published pipeline overrides by this one.
    pub const FLUX_2: Self =
        Self { spacing: Spacing::ToOneStep, shift: Shift::TokensAndSteps, terminal: None };

    /// Wan as DiffSynth runs it. The published pipeline has a multi-step solver instead.
    pub const DIFFSYNTH_WAN: Self =
        Self { spacing: Spacing::ToZero, shift: Shift::Factor(5.0), terminal: None };

    /// Z-Image: DiffSynth's template, and the shift of its `scheduler_config.json`.
    pub const Z_IMAGE: Self = Self { spacing: Spacing::ToZero, shift: Shift::Factor(3.0), terminal: None };
}

/// ln 3, as the published config has it.
const LN_3: f64 = 1.0986122886681098;

/// FLUX.2's μ (`compute_empirical_mu` in both peers): one line in the tokens for 10 steps, one for 200, and
/// linear in the steps through both. Pictures of more than 4300 tokens have that of 200 steps.
pub(super) fn flux_2_mu(image_tokens: usize, num_inference_steps: usize) -> f64 {
    let tokens = image_tokens as f64;
    let after_200 = 0.00016927 * tokens + 0.45666666;
    if image_tokens > 4300 {
        return after_200;
    }
    let after_10 = 8.73809524e-5 * tokens + 1.89833333;
    after_200 + (after_10 - after_200) * (200.0 - num_inference_steps as f64) / 190.0
}

/// DiffSynth's templates by their names in the goldens.
#[cfg(test)]
pub(super) const DIFFSYNTH: [(&str, Schedule); 6] = [
    ("Qwen-Image", Schedule::QWEN_IMAGE),
    ("Qwen-Image-Lightning", Schedule::QWEN_IMAGE_LIGHTNING),
    ("FLUX.1", Schedule::DIFFSYNTH_FLUX_1),
    ("FLUX.2", Schedule::FLUX_2),
    ("Wan", Schedule::DIFFSYNTH_WAN),
    ("Z-Image", Schedule::Z_IMAGE),
];
