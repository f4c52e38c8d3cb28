//! The values of recipe keys that choose among a few.

use clap::ValueEnum;
use fewstep_models::WeightType;
use serde::{Deserialize, Serialize};

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Task {
    /// Flow matching on real pictures.
    Sft,
    /// Direct distillation: the student's few steps end in the teacher's picture.
    #[value(alias = "direct-distill")]
    DirectDistill,
}

impl Task {
    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::DirectDistill => "direct_distill",
        }
    }
}

/// Number type of the trained model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OutputType {
    /// 32 bits, exact.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl From<OutputType> for WeightType {
    fn from(output: OutputType) -> Self {
        match output {
            OutputType::F32 => Self::F32,
            OutputType::F16 => Self::F16,
            OutputType::Bf16 => Self::BF16,
        }
    }
}

/// Where the weights of a run begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum InitialWeights {
    /// The model folder's weights.
    Pretrained,
    /// Random numbers from the seed; the folder gives only configs and tokenizer.
    Random,
}

/// Learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls on a line to zero at the last step.
    Linear,
    /// Falls on half a cosine to zero at the last step.
    Cosine,
}

/// How sigma is drawn in flow matching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TimestepSampling {
    /// Uniform in [0, 1).
    Uniform,
    /// 1 / (1 + e^-z), z standard normal (arXiv 2403.03206).
    #[value(alias = "logit-normal")]
    LogitNormal,
    /// Uniform over the model's own inference grid of 1,000 steps, as DiffSynth-Studio draws it.
    Schedule,
}

/// Distance between the student's picture and the teacher's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Distance {
    /// Mean squared difference.
    Mse,
    /// Mean of √(difference² + c²) − c: quadratic near zero, linear far away.
    #[value(alias = "pseudo-huber")]
    PseudoHuber,
}

/// Which parameters weight decay applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum DecayOn {
    /// Rank 2 and more; biases and norm weights are left alone.
    Matrices,
    /// Every parameter.
    All,
}
