//! The peers' choices as keys of a recipe, and their flags that are none.

use clap::Args;
use fewstep_models::{Conventions, Defaults, KeptSteps, Peer};
use toml::{Table, toml};

use super::{Activation, Compat, Dtype, OptimizerName, Recipe, StateNumbers};
use crate::TrainError;

impl Compat {
    /// Where the peer chooses otherwise than the defaults. The reasons for the defaults: `docs/compat.md`.
    pub(super) fn choices(self) -> Table {
        let mut choices = match self {
            Self::Diffusers => Table::new(),
            Self::Diffsynth => toml! {
                task = "sft"
                random_numbers = "torch_global"
                resized_targets = "allow"
                lr_schedule = "constant_lr"
                weight_decay_on = "all"
                state_numbers = "dtype"
                max_grad_norm = 0.0
                max_spike = 0.0
                guidance_dropout = 0.0
                timestep_sampling = "schedule"
                loss_weighting = "bell"
                training_grid = "diffsynth"
                student_guidance = "ignore"
                embedded_guidance = 1.0
                student_start = "noised_target"
                output_layout = "diffsynth"
                log_steps = 1
            },
        };
        choices.insert("compat".into(), toml::Value::try_from(self).expect("a name is a TOML string"));
        choices
    }
}

impl From<Compat> for Peer {
    fn from(compat: Compat) -> Self {
        match compat {
            Compat::Diffsynth => Self::Diffsynth,
            Compat::Diffusers => Self::Diffusers,
        }
    }
}

/// The last student steps of which something is kept: as many as most students have, so that memory does not grow with
/// their number. Where blocks are computed again all of them are recorded: what is kept of each is little beside the weights.
const KEPT_STEPS: usize = 4;

impl Recipe {
    /// How the model computes: as the peer where one is named, with the recipe's own choices where it has any.
    pub fn conventions(&self) -> Conventions {
        let conventions = Conventions::of(self.compat.map(Peer::from));
        Conventions {
            gelu: self.activation.map_or(conventions.gelu, Activation::into),
            max_prompt_tokens: self.max_prompt_tokens,
            ..conventions
        }
    }

    /// The type of trained parameters and of the optimiser's moments.
    pub fn state_dtype(&self) -> Dtype {
        match self.state_numbers {
            StateNumbers::F32 => Dtype::F32,
            StateNumbers::Dtype => self.dtype,
        }
    }

    /// Whether the denoiser's blocks are recomputed in backward passes.
    pub fn checkpoints_gradients(&self) -> bool {
        self.use_gradient_checkpointing || self.use_gradient_checkpointing_offload
    }

    /// The student steps of direct distillation of which something is kept, where there are as many.
    pub fn kept_steps(&self) -> KeptSteps {
        let usual = if self.checkpoints_gradients() { KEPT_STEPS } else { 1 };
        let recorded = self.recorded_steps.unwrap_or(usual);
        KeptSteps { recorded, remembered: KEPT_STEPS.saturating_sub(recorded) }
    }

    /// Steps and guidance of an online teacher of a model that is usually run so.
    pub(crate) fn teacher(&self, usual: Defaults) -> (usize, f32) {
        let cfg_scale = self.teacher_cfg_scale.map_or(usual.cfg_scale, |scale| scale as f32);
        (self.teacher_num_inference_steps.unwrap_or(usual.num_inference_steps), cfg_scale)
    }

    /// Whether the layers for adapters are left to be found.
    pub(crate) fn finds_lora_targets(&self) -> bool {
        let all_empty = |names: &Vec<String>| names.iter().all(|name| name.trim().is_empty());
        self.lora_target_modules.as_ref().is_some_and(all_empty)
    }

    /// Optimiser steps between checkpoints that a run continues from; 0 is only at the end.
    pub fn checkpoint_steps(&self) -> u64 {
        const DEFAULT: u64 = 500;
        self.save_steps.unwrap_or(DEFAULT)
    }

    /// What an adapter's update is multiplied by. Adapters of a file have theirs folded in.
    pub fn lora_scale(&self) -> f32 {
        match (&self.lora_checkpoint, self.lora_alpha) {
            (None, Some(alpha)) => (alpha / self.lora_rank as f64) as f32,
            _ => 1.0,
        }
    }

    /// A sentence for each key that has not the effect its value lets one expect.
    pub fn notes(&self) -> Vec<&'static str> {
        let slow = self.optimizer == OptimizerName::Prodigy && self.learning_rate < 0.1;
        let notes = [
            (
                slow,
                "learning_rate multiplies the rate that prodigy finds: with less than 0.1 little is learned, 1 is usual",
            ),
            (
                self.find_unused_parameters,
                "find_unused_parameters has no effect: parameters without a gradient are skipped in any case",
            ),
            (
                self.use_gradient_checkpointing_offload,
                "use_gradient_checkpointing_offload has the effect of use_gradient_checkpointing: nothing is moved \
                 elsewhere",
            ),
        ];
        notes.into_iter().filter(|(given, _)| *given).map(|(_, note)| note).collect()
    }
}

/// DiffSynth-Studio's flags for what does not exist here. Each is refused with a reason, and none is a key of a recipe.
#[derive(Args, Clone, Debug, Default)]
pub struct PeerFlags {
    #[arg(long, hide = true)]
    fp8_models: Option<String>,
    #[arg(long, hide = true)]
    offload_models: Option<String>,
    #[arg(long, hide = true)]
    quant_options: Option<String>,
    #[arg(long, hide = true)]
    template_model_id_or_path: Option<String>,
    #[arg(long, hide = true)]
    enable_lora_hot_loading: bool,
    #[arg(long, hide = true)]
    processor_path: Option<String>,
    #[arg(long, hide = true)]
    zero_cond_t: bool,
    #[arg(long, hide = true)]
    enable_model_cpu_offload: bool,
    #[arg(long, hide = true)]
    max_timestep_boundary: Option<String>,
    #[arg(long, hide = true)]
    enable_optimizer_cpu_offload: bool,
    #[arg(long, hide = true)]
    min_timestep_boundary: Option<String>,
    #[arg(long, hide = true)]
    enable_swanlab_log: bool,
    #[arg(long, hide = true)]
    swanlab_project: Option<String>,
    #[arg(long, hide = true)]
    enable_wandb_log: bool,
    #[arg(long, hide = true)]
    wandb_project: Option<String>,
    #[arg(long, hide = true)]
    cpu_offload_split_threshold: Option<String>,
    /// Accepted: a model is always built on the CPU
    #[arg(long, hide = true)]
    initialize_model_on_cpu: bool,
}

impl PeerFlags {
    /// Refuses the first flag given, save `initialize_model_on_cpu`, which changes nothing.
    ///
    /// # Errors
    /// If there is one.
    pub fn check(&self) -> Result<(), TrainError> {
        match self.given().into_iter().find(|(_, given, _)| *given) {
            Some((flag, _, reason)) => Err(TrainError::Unsupported { flag, reason }),
            None => Ok(()),
        }
    }

    fn given(&self) -> [(&'static str, bool, &'static str); 16] {
        const OFFLOAD: &str = "weights stay where they are; dtype bf16 halves the memory of frozen ones";
        const EDIT: &str = "picture editing models are not supported";
        const VIDEO: &str = "models of two denoisers are not supported";
        const LOGS: &str = "loss.csv and the TensorBoard file are always written; nothing is sent anywhere";
        const QUANTISED: &str = "weights are kept in f32, bf16 or f16";
        [
            ("fp8_models", self.fp8_models.is_some(), QUANTISED),
            ("offload_models", self.offload_models.is_some(), OFFLOAD),
            ("quant_options", self.quant_options.is_some(), QUANTISED),
            (
                "template_model_id_or_path",
                self.template_model_id_or_path.is_some(),
                "template models are not supported",
            ),
            ("enable_lora_hot_loading", self.enable_lora_hot_loading, "template models are not supported"),
            ("processor_path", self.processor_path.is_some(), EDIT),
            ("zero_cond_t", self.zero_cond_t, EDIT),
            ("enable_model_cpu_offload", self.enable_model_cpu_offload, OFFLOAD),
            ("max_timestep_boundary", self.max_timestep_boundary.is_some(), VIDEO),
            ("enable_optimizer_cpu_offload", self.enable_optimizer_cpu_offload, OFFLOAD),
            ("min_timestep_boundary", self.min_timestep_boundary.is_some(), VIDEO),
            ("enable_swanlab_log", self.enable_swanlab_log, LOGS),
            ("swanlab_project", self.swanlab_project.is_some(), LOGS),
            ("enable_wandb_log", self.enable_wandb_log, LOGS),
            ("wandb_project", self.wandb_project.is_some(), LOGS),
            ("cpu_offload_split_threshold", self.cpu_offload_split_threshold.is_some(), OFFLOAD),
        ]
    }
}
