//! The recipe of a run: one flat list of keys that are command-line flags and TOML keys alike.
//!
//! Keys the peers have carry the peers' names. A flag given on the command line wins over the TOML file, which wins
//! over the default; [`Recipe::resolve`] does that overlay.

mod choices;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches};
use serde::{Deserialize, Serialize};

pub use choices::{DecayOn, Distance, InitialWeights, OutputType, Schedule, Task, TimestepSampling};

use crate::TrainError;

/// All settings of a training run.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// What to train: sft (flow matching on pictures) or direct_distill (few-step student)
    #[arg(long, value_enum, default_value = "direct_distill", help_heading = "Run")]
    pub task: Task,
    /// Model folder in the official layout (model_index.json, transformer/, ...)
    #[arg(long, default_value = "assets/teacher", help_heading = "Run")]
    pub model: PathBuf,
    /// Start from the folder's weights or from random ones
    #[arg(long, value_enum, default_value = "pretrained", help_heading = "Run")]
    pub initial_weights: InitialWeights,
    /// Folder of the run: checkpoints, logs, samples and the result; started again with the same recipe it resumes
    #[arg(long, default_value = "runs/train", help_heading = "Run")]
    pub output_path: PathBuf,
    /// Seed of everything random in the run
    #[arg(long, default_value_t = 0, help_heading = "Run")]
    pub seed: u64,

    /// Folder that picture paths in the metadata are relative to
    #[arg(long, default_value = "assets/emoji", help_heading = "Data")]
    pub dataset_base_path: PathBuf,
    /// Metadata file (csv, json or jsonl); without it metadata.csv in the base folder, or the bundled emoji set
    #[arg(long, help_heading = "Data")]
    pub dataset_metadata_path: Option<PathBuf>,
    /// Times the data set is seen per epoch
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub dataset_repeat: usize,
    /// Picture height in px; with width, pictures are scaled and cropped to exactly this
    #[arg(long, help_heading = "Data")]
    pub height: Option<usize>,
    /// Picture width in px
    #[arg(long, help_heading = "Data")]
    pub width: Option<usize>,
    /// Without height and width: largest picture area in px; larger pictures are scaled down
    #[arg(long, default_value_t = 1024 * 1024, help_heading = "Data")]
    pub max_pixels: usize,
    /// Samples per forward pass
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub batch_size: usize,
    /// Forward passes per optimiser step
    #[arg(long, default_value_t = 1, help_heading = "Data")]
    pub gradient_accumulation_steps: usize,

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
    /// AdamW's decay of the mean of gradients
    #[arg(long, default_value_t = 0.9, help_heading = "Optimiser")]
    pub adam_beta_1: f64,
    /// AdamW's decay of the mean of squared gradients
    #[arg(long, default_value_t = 0.999, help_heading = "Optimiser")]
    pub adam_beta_2: f64,
    /// AdamW's epsilon
    #[arg(long, default_value_t = 1e-8, help_heading = "Optimiser")]
    pub adam_epsilon: f64,
    /// Decoupled weight decay per unit of learning rate
    #[arg(long, default_value_t = 0.01, help_heading = "Optimiser")]
    pub weight_decay: f64,
    /// Which parameters decay: matrices (rank 2 and more), or all as in torch
    #[arg(long, value_enum, default_value = "matrices", help_heading = "Optimiser")]
    pub weight_decay_on: DecayOn,
    /// Norm that longer gradients are scaled down to; 0 is off
    #[arg(long, default_value_t = 1.0, help_heading = "Optimiser")]
    pub max_grad_norm: f64,
    /// Decay of the running average of the weights that samples and results are made with; 0 is off
    #[arg(long, default_value_t = 0.0, help_heading = "Optimiser")]
    pub ema_decay: f64,

    /// Components trained in full, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "transformer", help_heading = "What is trained")]
    #[serde(deserialize_with = "comma_list")]
    pub trainable_models: Vec<String>,
    /// Component that gets LoRA adapters; all other weights are then frozen
    #[arg(long, help_heading = "What is trained")]
    pub lora_base_model: Option<String>,
    /// Rank of the adapters
    #[arg(long, default_value_t = 32, help_heading = "What is trained")]
    pub lora_rank: usize,
    /// Scale numerator of the adapters: they are multiplied by alpha / rank; the rank where not given
    #[arg(long, help_heading = "What is trained")]
    pub lora_alpha: Option<f64>,
    /// Layers that get adapters, by the last parts of their names, separated by commas
    #[arg(long, value_delimiter = ',', default_value = DEFAULT_TARGETS, help_heading = "What is trained")]
    #[serde(deserialize_with = "comma_list")]
    pub lora_target_modules: Vec<String>,
    /// LoRA file whose adapters the run starts from
    #[arg(long, help_heading = "What is trained")]
    pub lora_checkpoint: Option<PathBuf>,

    /// sft: share of captions replaced by the empty prompt, in [0, 1], so that guidance works later
    #[arg(long, default_value_t = 0.1, help_heading = "Method")]
    pub guidance_dropout: f64,
    /// sft: how sigma is drawn
    #[arg(long, value_enum, default_value = "logit_normal", help_heading = "Method")]
    pub timestep_sampling: TimestepSampling,
    /// direct_distill: distance between the pictures of student and teacher
    #[arg(long, value_enum, default_value = "mse", help_heading = "Method")]
    pub loss: Distance,
    /// direct_distill: c of the pseudo-Huber distance, in latent units
    #[arg(long, default_value_t = 1e-3, help_heading = "Method")]
    pub huber_c: f64,
    /// direct_distill: make the teacher's pictures during training; the metadata then needs prompts only
    #[arg(long, help_heading = "Method")]
    pub online_teacher: bool,
    /// online teacher: its sampling steps
    #[arg(long, default_value_t = 50, help_heading = "Method")]
    pub teacher_num_inference_steps: usize,
    /// online teacher: its guidance; 1 is off
    #[arg(long, default_value_t = 4.0, help_heading = "Method")]
    pub teacher_cfg_scale: f64,
    /// online teacher: the student's sampling steps (otherwise a column of the metadata)
    #[arg(long, default_value_t = 4, help_heading = "Method")]
    pub num_inference_steps: usize,
    /// online teacher: the student's guidance (otherwise a column of the metadata); 1 is off
    #[arg(long, default_value_t = 1.0, help_heading = "Method")]
    pub cfg_scale: f64,

    /// Number type of a fully trained model's files; LoRA files and checkpoints are always f32
    #[arg(long, value_enum, default_value = "f32", help_heading = "Output")]
    pub output_dtype: OutputType,
    /// Optimiser steps between checkpoints; one is also written at the end. 0 is only at the end
    #[arg(long, default_value_t = 500, help_heading = "Output")]
    pub save_steps: u64,
    /// Newest checkpoints kept
    #[arg(long, default_value_t = 2, help_heading = "Output")]
    pub keep: usize,
    /// Optimiser steps per line of the loss log (the mean over them)
    #[arg(long, default_value_t = 10, help_heading = "Output")]
    pub log_steps: u64,
    /// Optimiser steps between sample pictures; 0 is off
    #[arg(long, default_value_t = 0, help_heading = "Output")]
    pub sample_steps: u64,
    /// Prompts of the sample pictures: repeat the flag, or give one .txt file with a prompt per line
    #[arg(long, help_heading = "Output")]
    pub sample_prompts: Vec<String>,
    /// Sampling steps of the sample pictures
    #[arg(long, default_value_t = 25, help_heading = "Output")]
    pub sample_num_inference_steps: usize,
    /// Guidance of the sample pictures; 1 is off
    #[arg(long, default_value_t = 4.0, help_heading = "Output")]
    pub sample_cfg_scale: f64,
}

/// The attention and feed-forward projections of a double-stream transformer, as the peers' recipes list them.
const DEFAULT_TARGETS: &str = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1";

/// Keys that may change when a run is continued: how long it runs and what it writes on the way.
const FREE_KEYS: [&str; 11] = [
    "output_dtype",
    "max_steps",
    "num_epochs",
    "output_path",
    "save_steps",
    "keep",
    "log_steps",
    "sample_steps",
    "sample_prompts",
    "sample_num_inference_steps",
    "sample_cfg_scale",
];

impl Default for Recipe {
    fn default() -> Self {
        let command = Self::augment_args(clap::Command::new("recipe").no_binary_name(true));
        let matches = command.try_get_matches_from(std::iter::empty::<&str>());
        let parsed = matches.and_then(|matches| Self::from_arg_matches(&matches));
        parsed.expect("every flag has a default or is optional")
    }
}

impl Recipe {
    /// Overlays the flags that stood on the command line over a TOML file, and that over the defaults.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown key or a malformed value.
    pub fn resolve(&self, matches: &ArgMatches, config: Option<&Path>) -> Result<Recipe, TrainError> {
        let Some(path) = config else { return Ok(self.clone()) };
        let mut table = to_table(&Recipe::read(path)?);
        for (key, value) in to_table(self) {
            if matches.value_source(&key) == Some(ValueSource::CommandLine) {
                table.insert(key, value);
            }
        }
        table.try_into().map_err(|error| TrainError::recipe(path, &error))
    }

    /// Reads a TOML recipe; absent keys have their defaults.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown key or a malformed value.
    pub fn read(path: &Path) -> Result<Recipe, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
        toml::from_str(&text).map_err(|error| TrainError::recipe(path, &error))
    }

    /// The recipe as TOML, every key that has a value.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a flat struct of numbers, strings and lists is valid TOML")
    }

    /// The keys, with both values, that make `self` another run than `other`.
    pub fn differences(&self, other: &Recipe) -> Vec<String> {
        let (ours, theirs) = (to_table(self), to_table(other));
        let shown =
            |table: &toml::Table, key: &str| table.get(key).map_or("unset".into(), ToString::to_string);
        let mut keys: Vec<&String> =
            ours.keys().chain(theirs.keys().filter(|key| !ours.contains_key(*key))).collect();
        keys.retain(|key| !FREE_KEYS.contains(&key.as_str()) && ours.get(*key) != theirs.get(*key));
        keys.iter()
            .map(|key| format!("{key} is {} there, {} here", shown(&theirs, key), shown(&ours, key)))
            .collect()
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// Names the first key whose value is out of its range.
    pub fn validate(&self) -> Result<(), TrainError> {
        let error =
            |key, found: f64, expected| Err(TrainError::Value { key, found: found.to_string(), expected });
        if let Some((key, _)) = self.counts().into_iter().find(|(_, count)| *count == 0) {
            return error(key, 0.0, "1 or more");
        }
        for (range, expected, values) in self.numbers() {
            if let Some((key, found)) = values.into_iter().find(|(_, found)| !range.contains(found)) {
                return error(key, found, expected);
            }
        }
        match (self.height, self.width) {
            (Some(_), None) => Err(TrainError::HalfSize { given: "height", missing: "width" }),
            (None, Some(_)) => Err(TrainError::HalfSize { given: "width", missing: "height" }),
            _ => Ok(()),
        }
    }

    /// Keys that count something there must be one of.
    fn counts(&self) -> [(&'static str, usize); 10] {
        [
            ("batch_size", self.batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("dataset_repeat", self.dataset_repeat),
            ("num_epochs", self.num_epochs),
            ("lora_rank", self.lora_rank),
            ("keep", self.keep),
            ("log_steps", self.log_steps as usize),
            ("num_inference_steps", self.num_inference_steps),
            ("teacher_num_inference_steps", self.teacher_num_inference_steps),
            ("sample_num_inference_steps", self.sample_num_inference_steps),
        ]
    }

    /// Keys by the range of their values.
    fn numbers(&self) -> [NumberRange; 4] {
        const LARGEST_DECAY: f64 = 1.0 - f64::EPSILON;
        let decays = [
            ("ema_decay", self.ema_decay),
            ("adam_beta_1", self.adam_beta_1),
            ("adam_beta_2", self.adam_beta_2),
        ];
        let positive = [("learning_rate", self.learning_rate), ("huber_c", self.huber_c)];
        let not_negative = [
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("adam_epsilon", self.adam_epsilon),
            ("cfg_scale", self.cfg_scale),
            ("teacher_cfg_scale", self.teacher_cfg_scale),
            ("sample_cfg_scale", self.sample_cfg_scale),
        ];
        [
            (0.0..=1.0, "a share from 0 to 1", vec![("guidance_dropout", self.guidance_dropout)]),
            (0.0..=LARGEST_DECAY, "0 or more and less than 1", decays.to_vec()),
            (f64::MIN_POSITIVE..=f64::MAX, "more than 0", positive.to_vec()),
            (0.0..=f64::MAX, "0 or more", not_negative.to_vec()),
        ]
    }

    /// The sample prompts, read from their file where one is given.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn sample_prompts(&self) -> Result<Vec<String>, TrainError> {
        match self.sample_prompts.as_slice() {
            [file] if file.ends_with(".txt") => {
                let path = Path::new(file);
                let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
                Ok(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
            }
            prompts => Ok(prompts.to_vec()),
        }
    }
}

/// A range, how a person reads it, and the keys it holds for with their values.
type NumberRange = (RangeInclusive<f64>, &'static str, Vec<(&'static str, f64)>);

fn to_table(recipe: &Recipe) -> toml::Table {
    toml::Table::try_from(recipe).expect("a flat struct of numbers, strings and lists is a TOML table")
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
