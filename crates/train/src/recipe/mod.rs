//! The recipe of a run: one flat list of keys that are command-line flags and TOML keys alike.
//!
//! Keys the peers have carry the peers' names. A flag given on the command line wins over the TOML file, which wins
//! over the default; [`Recipe::resolve`] does that overlay.

mod bounds;
mod choices;
mod optimizer;
mod peers;
mod resolve;
mod validate;

use std::path::PathBuf;

use clap::{ArgAction, Args, FromArgMatches};
use fewstep_device::DeviceName;
use serde::{Deserialize, Serialize};

pub use choices::{
    Activation, Compat, DecayOn, Distance, Dtype, InitialWeights, LoraFormat, LossWeighting, Objective,
    OutputLayout, RandomNumbers, ResizedTargets, ResultWeights, Schedule, Stage, StateNumbers,
    StudentGuidance, StudentStart, Task, TimestepSampling, TrainingGrid,
};
pub use optimizer::OptimizerName;
pub use peers::PeerFlags;

/// All settings of a training run.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// What to train: sft (flow matching on pictures) or direct_distill (few-step student); with :data_process only
    /// text states and latents are computed and written, with :train they are read and only the denoiser is loaded
    #[arg(long, value_enum, default_value = "direct_distill", help_heading = "Run")]
    pub task: Task,
    /// Take a peer's choices wherever they differ from the defaults here; keys given beside it win
    #[arg(long, value_enum, help_heading = "Run")]
    pub compat: Option<Compat>,
    /// Model folder in the official layout (model_index.json, transformer/, ...)
    #[arg(long, default_value = "assets/teacher", help_heading = "Run")]
    pub model: PathBuf,
    /// Instead of model: weight files as a JSON list, the shards of one component as a list in it
    #[arg(long, value_name = "JSON", help_heading = "Run")]
    pub model_paths: Option<String>,
    /// Instead of model: OWNER/NAME:PATTERN of each component, separated by commas, downloaded where missing
    #[arg(long, value_name = "IDS", help_heading = "Run")]
    pub model_id_with_origin_paths: Option<String>,
    /// Tokenizer folder, where the model is not given as one folder
    #[arg(long, help_heading = "Run")]
    pub tokenizer_path: Option<PathBuf>,
    /// Where to train: cpu, cuda:N (an NVIDIA GPU) or wgpu, as far as the build has them
    #[arg(long, default_value = "cpu", help_heading = "Run")]
    pub device: DeviceName,
    /// Number type that weights are used in and frozen ones are stored in, norms and biases aside; arithmetic is f32
    #[arg(long, value_enum, default_value = "f32", help_heading = "Run")]
    pub dtype: Dtype,
    /// Activation of the denoiser's MLPs, where not the model's own or that of compat
    #[arg(long, value_enum, help_heading = "Run")]
    pub activation: Option<Activation>,
    /// Tokens of a prompt that are read, where not the model's own number or that of compat
    #[arg(long, value_name = "TOKENS", alias = "max-sequence-length", help_heading = "Run")]
    pub max_prompt_tokens: Option<usize>,
    /// Start from the folder's weights or from random ones
    #[arg(long, value_enum, default_value = "pretrained", help_heading = "Run")]
    pub initial_weights: InitialWeights,
    /// Folder of the run: checkpoints, logs, samples and the result; started again with the same recipe it resumes
    #[arg(long, default_value = "runs/train", help_heading = "Run")]
    pub output_path: PathBuf,
    /// Seed of everything random in the run
    #[arg(long, default_value_t = 0, help_heading = "Run")]
    pub seed: u64,
    /// Which generators draw order, noise and adapters: one per position, or torch's global one in the peers' order
    #[arg(long, value_enum, default_value = "per_position", help_heading = "Run")]
    pub random_numbers: RandomNumbers,

    /// Folder that picture paths in the metadata are relative to
    #[arg(long, default_value = "assets/emoji", help_heading = "Data")]
    pub dataset_base_path: PathBuf,
    /// Metadata file (csv, json or jsonl); without it metadata.csv in the base folder, or the bundled emoji set
    #[arg(long, help_heading = "Data")]
    pub dataset_metadata_path: Option<PathBuf>,
    /// Times the data set is seen per epoch
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub dataset_repeat: usize,
    /// Whether every epoch has a new order; false keeps the metadata's
    #[arg(long, default_value_t = true, action = ArgAction::Set, help_heading = "Data")]
    pub shuffle: bool,
    /// Threads that decode pictures and read stored latents ahead of the steps; results do not depend on their number
    #[arg(long, default_value_t = 2, help_heading = "Data")]
    pub dataset_num_workers: usize,
    /// Columns that name files, separated by commas; image or video must be one of them
    #[arg(long, value_delimiter = ',', default_value = "image,video", help_heading = "Data")]
    #[serde(deserialize_with = "comma_list")]
    pub data_file_keys: Vec<String>,
    /// Columns passed on to the method, separated by commas: seed, rand_device, num_inference_steps, cfg_scale,
    /// embedded_guidance
    #[arg(long, value_delimiter = ',', help_heading = "Data")]
    #[serde(deserialize_with = "comma_list")]
    pub extra_inputs: Vec<String>,
    /// Picture height in px; with width, pictures are scaled and cropped to exactly this
    #[arg(long, help_heading = "Data")]
    pub height: Option<usize>,
    /// Picture width in px
    #[arg(long, help_heading = "Data")]
    pub width: Option<usize>,
    /// Frames of a video: those that an online teacher draws, otherwise the most that are read of each video
    #[arg(long, help_heading = "Data")]
    pub num_frames: Option<usize>,
    /// Without height and width: largest picture area in px; larger pictures are scaled down
    #[arg(long, default_value_t = 1024 * 1024, help_heading = "Data")]
    pub max_pixels: usize,
    /// direct_distill: whether a picture of another size is refused or resized, after which no noise leads to it exactly
    #[arg(long, value_enum, default_value = "refuse", help_heading = "Data")]
    pub resized_targets: ResizedTargets,
    /// Samples per forward pass
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub batch_size: usize,
    /// Forward passes per optimiser step
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub gradient_accumulation_steps: usize,
    /// MiB of encoded pictures, and of encoded prompts, that are kept in memory; more are kept in files in the output
    /// folder and encoded only once in a run, however often it is interrupted
    #[arg(long, default_value_t = 512, help_heading = "Data")]
    pub dataset_memory_mib: usize,

    /// Passes over the data set, where max_steps is not given
    #[arg(long, default_value_t = 1, help_heading = "Optimiser")]
    pub num_epochs: usize,
    /// Optimiser steps of the whole run
    #[arg(long, help_heading = "Optimiser")]
    pub max_steps: Option<u64>,
    /// Peak learning rate
    #[arg(long, default_value_t = 1e-4, help_heading = "Optimiser")]
    pub learning_rate: f64,
    /// Course of the learning rate after the warm-up
    #[arg(long, value_enum, default_value = "constant", help_heading = "Optimiser")]
    pub lr_schedule: Schedule,
    /// Optimiser steps over which the learning rate rises from zero
    #[arg(long, default_value_t = 0, help_heading = "Optimiser")]
    pub warmup_steps: u64,
    /// Decay of the mean of gradients, in AdamW and its kin
    #[arg(long, default_value_t = 0.9, help_heading = "Optimiser")]
    pub adam_beta_1: f64,
    /// Decay of the mean of squared gradients, in AdamW and its kin
    #[arg(long, default_value_t = 0.999, help_heading = "Optimiser")]
    pub adam_beta_2: f64,
    /// Epsilon of AdamW and its kin
    #[arg(long, default_value_t = 1e-8, help_heading = "Optimiser")]
    pub adam_epsilon: f64,
    /// Decoupled weight decay per unit of learning rate
    #[arg(long, default_value_t = 0.01, help_heading = "Optimiser")]
    pub weight_decay: f64,
    /// Which parameters decay: matrices (rank 2 and more), or all as in torch
    #[arg(long, value_enum, default_value = "matrices", help_heading = "Optimiser")]
    pub weight_decay_on: DecayOn,
    /// Numbers that trained parameters and moments are kept in: f32, or dtype with each operation rounded to it
    #[arg(long, value_enum, default_value = "f32", help_heading = "Optimiser")]
    pub state_numbers: StateNumbers,
    /// Norm that longer gradients are scaled down to; 0 is off
    #[arg(long, default_value_t = 1.0, help_heading = "Optimiser")]
    pub max_grad_norm: f64,
    /// Decay of the running average of the weights that samples and results are made with; 0 is off
    #[arg(long, default_value_t = 0.0, help_heading = "Optimiser")]
    pub ema_decay: f64,
    /// How gradients move parameters
    #[arg(
        long,
        alias = "customized-optimizer",
        value_enum,
        default_value = "adamw",
        help_heading = "Optimiser"
    )]
    pub optimizer: OptimizerName,
    /// Learning rate that lr_schedule linear and cosine fall to
    #[arg(long, default_value_t = 0.0, help_heading = "Optimiser")]
    pub lr_end: f64,
    /// prodigy: factor of its estimate of the rate; 0.5 to 2 is usual
    #[arg(long, default_value_t = 1.0, help_heading = "Optimiser")]
    pub prodigy_d_coef: f64,
    /// muon: decay of the momentum
    #[arg(long, default_value_t = 0.95, help_heading = "Optimiser")]
    pub muon_momentum: f64,

    /// Components trained in full, separated by commas; dit is another name of transformer
    #[arg(long, value_delimiter = ',', default_value = "transformer", help_heading = "What is trained")]
    #[serde(deserialize_with = "comma_list")]
    pub trainable_models: Vec<String>,
    /// Accepted, without effect: parameters without a gradient are skipped in any case
    #[arg(long, help_heading = "What is trained")]
    pub find_unused_parameters: bool,
    /// Full weights the run starts from, as far as this file has them; for adapters see lora_checkpoint
    #[arg(long, help_heading = "What is trained")]
    pub resume_from_checkpoint: Option<PathBuf>,
    /// Component that gets LoRA adapters (transformer, or dit); all other weights are then frozen
    #[arg(long, help_heading = "What is trained")]
    pub lora_base_model: Option<String>,
    /// Rank of the adapters
    #[arg(long, default_value_t = 32, help_heading = "What is trained")]
    pub lora_rank: usize,
    /// Scale numerator of the adapters: they are multiplied by alpha / rank; the rank where not given
    #[arg(long, help_heading = "What is trained")]
    pub lora_alpha: Option<f64>,
    /// Layers that get adapters: last parts of their names, separated by commas, or one regular expression for whole
    /// names; empty finds the large projections of the blocks [default: those the model family's recipes name]
    #[arg(long, value_delimiter = ',', help_heading = "What is trained")]
    #[serde(deserialize_with = "some_comma_list")]
    pub lora_target_modules: Option<Vec<String>>,
    /// LoRA file whose adapters the run starts from
    #[arg(long, help_heading = "What is trained")]
    pub lora_checkpoint: Option<PathBuf>,
    /// LoRA file fused into the frozen weights before training
    #[arg(long, help_heading = "What is trained")]
    pub preset_lora_path: Option<PathBuf>,
    /// Component that preset_lora_path belongs to (transformer, or dit)
    #[arg(long, help_heading = "What is trained")]
    pub preset_lora_model: Option<String>,

    /// sft: share of captions replaced by the empty prompt, in [0, 1], so that guidance works later
    #[arg(long, default_value_t = 0.1, help_heading = "Method")]
    pub guidance_dropout: f64,
    /// sft: how sigma is drawn
    #[arg(long, value_enum, default_value = "logit_normal", help_heading = "Method")]
    pub timestep_sampling: TimestepSampling,
    /// sft: weight of the loss by sigma
    #[arg(long, value_enum, default_value = "uniform", help_heading = "Method")]
    pub loss_weighting: LossWeighting,
    /// Sigma grid of training: the one of inference, or DiffSynth-Studio's with a shift of its own
    #[arg(long, value_enum, default_value = "inference", help_heading = "Method")]
    pub training_grid: TrainingGrid,
    /// direct_distill: whether the student follows its cfg_scale
    #[arg(long, value_enum, default_value = "apply", help_heading = "Method")]
    pub student_guidance: StudentGuidance,
    /// direct_distill, models that know no pure noise: whether the student starts from noise, as pictures are drawn, or
    /// from the teacher's picture noised to its first sigma
    #[arg(long, value_enum, default_value = "noise", help_heading = "Method")]
    pub student_start: StudentStart,
    /// Keep what goes into each block of the denoiser and compute its inside again in the backward pass: less memory,
    /// more time
    #[arg(long, help_heading = "Method")]
    pub use_gradient_checkpointing: bool,
    /// direct_distill: student steps, counted from the last, whose activations are kept on the way to the picture instead
    /// of evaluating the denoiser again on the way back; each but the first takes the memory of an evaluation more. By
    /// default 1, and 4 with gradient checkpointing, which keeps little of each. On the CPU a little is kept of four in
    /// any case
    #[arg(long, help_heading = "Method")]
    pub recorded_steps: Option<usize>,
    /// direct_distill: distance between the pictures of student and teacher
    #[arg(long, value_enum, default_value = "mse", help_heading = "Method")]
    pub loss: Distance,
    /// direct_distill: c of the pseudo-Huber distance, in latent units
    #[arg(long, default_value_t = 1e-3, help_heading = "Method")]
    pub huber_c: f64,
    /// As use_gradient_checkpointing: nothing is moved elsewhere
    #[arg(long, help_heading = "Method")]
    pub use_gradient_checkpointing_offload: bool,
    /// direct_distill: make the teacher's pictures during training; the metadata then needs prompts only
    #[arg(long, help_heading = "Method")]
    pub online_teacher: bool,
    /// online teacher: its sampling steps [default: the model's usual ones]
    #[arg(long, help_heading = "Method")]
    pub teacher_num_inference_steps: Option<usize>,
    /// online teacher: its guidance; 1 is off [default: the model's usual one]
    #[arg(long, help_heading = "Method")]
    pub teacher_cfg_scale: Option<f64>,
    /// online teacher: the student's sampling steps (otherwise a column of the metadata)
    #[arg(long, default_value_t = 4, help_heading = "Method")]
    pub num_inference_steps: usize,
    /// online teacher: the student's guidance (otherwise a column of the metadata); 1 is off
    #[arg(long, default_value_t = 1.0, help_heading = "Method")]
    pub cfg_scale: f64,
    /// The guidance scale that the denoiser is told, where it takes one and the metadata has no column of that name
    /// [default: sft 1, direct_distill the model's usual one]
    #[arg(long, help_heading = "Method")]
    pub embedded_guidance: Option<f64>,

    /// Files of the result: fewstep's, or epoch-0.safetensors and so on with only what was trained, as the peer's
    #[arg(long, value_enum, default_value = "fewstep", help_heading = "Output")]
    pub output_layout: OutputLayout,
    /// output_layout diffsynth: taken off the front of keys such as pipe.dit.img_in.weight
    #[arg(long, default_value = "pipe.dit.", help_heading = "Output")]
    pub remove_prefix_in_ckpt: String,
    /// Number type of a fully trained model's files; LoRA files and checkpoints are always f32
    #[arg(long, value_enum, default_value = "f32", help_heading = "Output")]
    pub output_dtype: Dtype,
    /// Optimiser steps between checkpoints; one is also written at the end. 0 is only at the end; not given it is 500,
    /// and the files of output_layout diffsynth then come after every epoch
    #[arg(long, help_heading = "Output")]
    pub save_steps: Option<u64>,
    /// Accepted, without effect: loss.csv is always written
    #[arg(long, help_heading = "Output")]
    pub enable_csv_log: bool,
    /// Newest checkpoints kept, beside the best one and the one that a failing run would go back to
    #[arg(long, default_value_t = 2, help_heading = "Output")]
    pub keep: usize,
    /// Optimiser steps per line of the loss log (the mean over them)
    #[arg(long, default_value_t = 10, help_heading = "Output")]
    pub log_steps: u64,
    /// Accepted, without effect: the TensorBoard file is always written
    #[arg(long, help_heading = "Output")]
    pub enable_tensorboard_log: bool,
    /// Optimiser steps between sample pictures; 0 is off. They are drawn after the last step too, and by a student
    /// before the first
    #[arg(long, default_value_t = 0, help_heading = "Output")]
    pub sample_steps: u64,
    /// Prompts of the sample pictures: repeat the flag, or give one .txt file with a prompt per line
    #[arg(long, help_heading = "Output")]
    pub sample_prompts: Vec<String>,
    /// Sampling steps of the sample pictures [default: half of the model's usual ones, or what a student is trained for]
    #[arg(long, help_heading = "Output")]
    pub sample_num_inference_steps: Option<usize>,
    /// Guidance of the sample pictures; 1 is off [default: the model's usual one, or what a student is trained with]
    #[arg(long, help_heading = "Output")]
    pub sample_cfg_scale: Option<f64>,
    /// Spelling of the keys in LoRA files: DiffSynth-Studio's, which diffusers reads too, or that of diffusers and PEFT
    #[arg(long, value_enum, default_value = "diffsynth", help_heading = "Output")]
    pub lora_format: LoraFormat,
    /// Weights of the result: best (the lowest paired error the monitor saw) or last; without a monitor always last
    #[arg(long, value_enum, default_value = "best", help_heading = "Output")]
    pub result: ResultWeights,

    /// Steps in a row without an update (loss or gradient not finite, or a spike) after which the run goes back to its
    /// last good checkpoint
    #[arg(long, default_value_t = 20, help_heading = "Guards")]
    pub max_skipped_steps: u32,
    /// What the learning rate is multiplied by each time the run goes back, in (0, 1]
    #[arg(long, default_value_t = 0.5, help_heading = "Guards")]
    pub rollback_lr_factor: f64,
    /// Times a run goes back before it gives up; 0 gives up at once
    #[arg(long, default_value_t = 3, help_heading = "Guards")]
    pub max_rollbacks: u32,
    /// A step whose loss or gradient norm is more than so many times the median of the last ones is skipped; 0 is off
    #[arg(long, default_value_t = 100.0, help_heading = "Guards")]
    pub max_spike: f64,

    /// Optimiser steps between looks at held-out prompts (monitor.csv); 0 is off
    #[arg(long, default_value_t = 0, help_heading = "Monitor")]
    pub monitor_steps: u64,
    /// Held-out rows: metadata of a data set of their own, for direct_distill one that `generate` wrote
    #[arg(long, help_heading = "Monitor")]
    pub monitor_metadata_path: Option<PathBuf>,
    /// Without monitor_metadata_path: prompts taken off the training set with all their rows, chosen by the run's seed
    #[arg(long, default_value_t = 8, help_heading = "Monitor")]
    pub monitor_rows: usize,
    /// direct_distill: pictures of each held-out prompt, at least; the teacher draws those that the data set lacks
    #[arg(long, default_value_t = 3, help_heading = "Monitor")]
    pub monitor_seeds: usize,
    /// Looks without a new best after which the run stops early; 0 is off
    #[arg(long, default_value_t = 10, help_heading = "Monitor")]
    pub monitor_patience: usize,
    /// Stop early where pictures of one prompt differ less than this share of the teacher's; 0 is off
    #[arg(long, default_value_t = 0.5, help_heading = "Monitor")]
    pub monitor_min_diversity: f64,
    /// Stop early where pictures are less sharp than this share of the teacher's; 0 is off
    #[arg(long, default_value_t = 0.5, help_heading = "Monitor")]
    pub monitor_min_sharpness: f64,
    /// Stop early where saturation or contrast is more than so many times the teacher's, or less than its inverse; 0 is off
    #[arg(long, default_value_t = 1.3, help_heading = "Monitor")]
    pub monitor_max_drift: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        let command = Self::augment_args(clap::Command::new("recipe").no_binary_name(true));
        let matches = command.try_get_matches_from(std::iter::empty::<&str>());
        let parsed = matches.and_then(|matches| Self::from_arg_matches(&matches));
        parsed.expect("every flag has a default or is optional")
    }
}

/// [`comma_list`] of a key that may be absent.
fn some_comma_list<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<String>>, D::Error> {
    comma_list(deserializer).map(Some)
}

/// A list, or one string with commas as on the command line.
fn comma_list<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum StringOrList {
        String(String),
        List(Vec<String>),
    }
    Ok(match StringOrList::deserialize(deserializer)? {
        StringOrList::String(text) => text.split(',').map(|part| part.trim().to_owned()).collect(),
        StringOrList::List(list) => list,
    })
}
