//! The largest values of a recipe's keys: beyond them a run would ask for memory nobody has, or a number would not fit
//! the type it is kept in.

use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::MAX_STEPS;
use fewstep_models::MAX_FRAMES;

use super::Recipe;
use crate::TrainError;

/// Guidance that no picture survives.
const MAX_CFG_SCALE: usize = 10_000;

impl Recipe {
    /// Checks that every whole number is one of TOML's, in which the run's folder keeps them.
    ///
    /// # Errors
    /// Names the first key that is not.
    pub(super) fn check_integers(&self) -> Result<(), TrainError> {
        let keys = serde_json::to_value(self).expect("plain fields always serialise");
        let too_large = |value: &&serde_json::Value| value.is_u64() && !value.is_i64();
        let mut fields = keys.as_object().into_iter().flatten();
        match fields.find(|(_, value)| too_large(value)) {
            Some((key, found)) => Err(too_much(key, found, i64::MAX)),
            None => Ok(()),
        }
    }

    /// Checks that nothing is asked for that no run needs.
    ///
    /// # Errors
    /// Names the first key whose value is too large.
    pub(super) fn check_bounds(&self) -> Result<(), TrainError> {
        self.check_integers()?;
        if let Some((key, found, limit)) = self.bounds().into_iter().find(|(_, found, limit)| found > limit) {
            return Err(too_much(key, found, limit));
        }
        let guidance = [
            ("cfg_scale", self.cfg_scale),
            ("teacher_cfg_scale", self.teacher_cfg_scale.unwrap_or(1.0)),
            ("sample_cfg_scale", self.sample_cfg_scale.unwrap_or(1.0)),
            ("embedded_guidance", self.embedded_guidance.unwrap_or(1.0)),
        ];
        match guidance.into_iter().find(|(_, found)| *found > MAX_CFG_SCALE as f64) {
            Some((key, found)) => Err(too_much(key, found, MAX_CFG_SCALE)),
            None => Ok(()),
        }
    }

    /// Keys with their values and the largest that makes sense.
    fn bounds(&self) -> [(&'static str, usize, usize); 14] {
        [
            ("max_prompt_tokens", self.max_prompt_tokens.unwrap_or(1), 1 << 20),
            ("batch_size", self.batch_size, 1 << 16),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, 1 << 20),
            ("dataset_repeat", self.dataset_repeat, 10_000),
            ("dataset_num_workers", self.dataset_num_workers, 1024),
            ("num_epochs", self.num_epochs, 1 << 32),
            ("lora_rank", self.lora_rank, 1 << 16),
            ("height", self.height.unwrap_or(0), MAX_SIDE_PX),
            ("width", self.width.unwrap_or(0), MAX_SIDE_PX),
            ("num_frames", self.num_frames.unwrap_or(1), MAX_FRAMES),
            ("num_inference_steps", self.num_inference_steps, MAX_STEPS),
            ("teacher_num_inference_steps", self.teacher_num_inference_steps.unwrap_or(1), MAX_STEPS),
            ("recorded_steps", self.recorded_steps.unwrap_or(1), MAX_STEPS),
            ("sample_num_inference_steps", self.sample_num_inference_steps.unwrap_or(1), MAX_STEPS),
        ]
    }
}

fn too_much(key: &str, found: impl ToString, limit: impl ToString) -> TrainError {
    TrainError::TooMuch { key: key.to_owned(), found: found.to_string(), limit: limit.to_string() }
}
