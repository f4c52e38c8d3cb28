//! What the types of a recipe's values cannot say.

use std::ops::RangeInclusive;
use std::path::Path;

use fewstep_data::bounded;
use fewstep_data::metadata::Media;

use super::{Dtype, OptimizerName, Recipe, Stage};
use crate::TrainError;

/// Columns that reach a method; all others of a row are read where they are needed or not at all.
const EXTRA_INPUTS: [&str; 5] =
    ["seed", "rand_device", "num_inference_steps", "cfg_scale", "embedded_guidance"];

/// A range, how a person reads it, and the keys it holds for with their values.
type NumberRange = (RangeInclusive<f64>, &'static str, Vec<(&'static str, f64)>);

impl Recipe {
    /// Checks ranges, and keys that need each other.
    ///
    /// # Errors
    /// Names the first key whose value is out of its range.
    pub fn validate(&self) -> Result<(), TrainError> {
        if let Some((key, _)) = self.counts().into_iter().find(|(_, count)| *count == 0) {
            return wrong(key, 0, "1 or more");
        }
        if self.max_steps == Some(0) {
            return wrong("max_steps", 0, "1 or more");
        }
        for (range, expected, values) in self.numbers() {
            if let Some((key, found)) = values.into_iter().find(|(_, found)| !range.contains(found)) {
                return wrong(key, found, expected);
            }
        }
        self.check_bounds()?;
        self.check_pairs()?;
        self.check_guards()?;
        self.check_columns()
    }

    /// Keys that count something there must be one of.
    fn counts(&self) -> [(&'static str, usize); 14] {
        [
            ("max_prompt_tokens", self.max_prompt_tokens.unwrap_or(1)),
            ("batch_size", self.batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("dataset_repeat", self.dataset_repeat),
            ("num_epochs", self.num_epochs),
            ("lora_rank", self.lora_rank),
            ("keep", self.keep),
            ("log_steps", self.log_steps as usize),
            ("num_inference_steps", self.num_inference_steps),
            ("teacher_num_inference_steps", self.teacher_num_inference_steps.unwrap_or(1)),
            ("sample_num_inference_steps", self.sample_num_inference_steps.unwrap_or(1)),
            ("max_skipped_steps", self.max_skipped_steps as usize),
            ("monitor_rows", self.monitor_rows),
            ("monitor_seeds", self.monitor_seeds),
        ]
    }

    /// Keys by the range of their values.
    fn numbers(&self) -> [NumberRange; 5] {
        const LARGEST_DECAY: f64 = 1.0 - f64::EPSILON;
        let decays = [
            ("ema_decay", self.ema_decay),
            ("adam_beta_1", self.adam_beta_1),
            ("adam_beta_2", self.adam_beta_2),
            ("muon_momentum", self.muon_momentum),
        ];
        let positive = [
            ("learning_rate", self.learning_rate),
            ("huber_c", self.huber_c),
            ("prodigy_d_coef", self.prodigy_d_coef),
        ];
        let not_negative = [
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("adam_epsilon", self.adam_epsilon),
            ("lr_end", self.lr_end),
            ("cfg_scale", self.cfg_scale),
            ("teacher_cfg_scale", self.teacher_cfg_scale.unwrap_or(1.0)),
            ("sample_cfg_scale", self.sample_cfg_scale.unwrap_or(1.0)),
            ("embedded_guidance", self.embedded_guidance.unwrap_or(1.0)),
        ];
        let shares = [
            ("guidance_dropout", self.guidance_dropout),
            ("monitor_min_diversity", self.monitor_min_diversity),
            ("monitor_min_sharpness", self.monitor_min_sharpness),
        ];
        let factor = ("rollback_lr_factor", self.rollback_lr_factor);
        [
            (0.0..=1.0, "a share from 0 to 1", shares.to_vec()),
            (f64::MIN_POSITIVE..=1.0, "more than 0 and at most 1", vec![factor]),
            (0.0..=LARGEST_DECAY, "0 or more and less than 1", decays.to_vec()),
            (f64::MIN_POSITIVE..=f64::MAX, "more than 0", positive.to_vec()),
            (0.0..=f64::MAX, "0 or more", not_negative.to_vec()),
        ]
    }

    fn check_pairs(&self) -> Result<(), TrainError> {
        let half = |given, missing| Err(TrainError::Half { given, missing });
        match (self.height, self.width) {
            (Some(_), None) => return half("height", "width"),
            (None, Some(_)) => return half("width", "height"),
            _ => {}
        }
        match (&self.preset_lora_path, &self.preset_lora_model) {
            (Some(_), None) => return half("preset_lora_path", "preset_lora_model"),
            (None, Some(_)) => return half("preset_lora_model", "preset_lora_path"),
            _ => {}
        }
        if self.monitor_metadata_path.is_some() && self.monitor_steps == 0 {
            return half("monitor_metadata_path", "monitor_steps");
        }
        if self.lr_end > self.learning_rate {
            return wrong("lr_end", self.lr_end, "no more than learning_rate");
        }
        if self.state_dtype() != Dtype::F32 && self.optimizer != OptimizerName::Adamw {
            return wrong("state_numbers", "dtype", "f32 where the optimizer is not adamw");
        }
        if self.task.stage() != Stage::Whole && self.online_teacher {
            return wrong("online_teacher", true, "false where a task is split in two");
        }
        if self.task.stage() == Stage::Train && self.sample_steps > 0 {
            return wrong("sample_steps", self.sample_steps, "0 where only the denoiser is loaded");
        }
        Ok(())
    }

    fn check_guards(&self) -> Result<(), TrainError> {
        let multiples = [("max_spike", self.max_spike), ("monitor_max_drift", self.monitor_max_drift)];
        if let Some((key, found)) =
            multiples.into_iter().find(|(_, found)| *found != 0.0 && !(1.0..).contains(found))
        {
            return wrong(key, found, "0, or a multiple of 1 or more");
        }
        match self.task.stage() != Stage::Whole && self.monitor_steps > 0 {
            true => wrong("monitor_steps", self.monitor_steps, "0 where a task is split in two"),
            false => Ok(()),
        }
    }

    fn check_columns(&self) -> Result<(), TrainError> {
        let is_media = |key: &String| Media::ALL.iter().any(|media| media.column() == key);
        if !self.data_file_keys.iter().any(is_media) {
            return wrong(
                "data_file_keys",
                self.data_file_keys.join(","),
                "a list with image or video in it",
            );
        }
        match self.extra_inputs().find(|name| !EXTRA_INPUTS.contains(name)) {
            Some(found) => wrong(
                "extra_inputs",
                found,
                "seed, rand_device, num_inference_steps, cfg_scale or embedded_guidance",
            ),
            None => Ok(()),
        }
    }

    /// The columns that reach the method.
    pub(crate) fn extra_inputs(&self) -> impl Iterator<Item = &str> {
        self.extra_inputs.iter().map(|name| name.trim()).filter(|name| !name.is_empty())
    }

    /// The sample prompts, read from their file where one is given.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn sample_prompts(&self) -> Result<Vec<String>, TrainError> {
        match self.sample_prompts.as_slice() {
            [file] if file.ends_with(".txt") => {
                let path = Path::new(file);
                let text = bounded::read_text(path).map_err(TrainError::io(path))?;
                Ok(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
            }
            prompts => Ok(prompts.to_vec()),
        }
    }
}

fn wrong(key: &'static str, found: impl ToString, expected: &'static str) -> Result<(), TrainError> {
    Err(TrainError::Value { key, found: found.to_string(), expected })
}
