//! The values of recipe keys that choose among a few.

use clap::ValueEnum;
use fewstep_kernels::Gelu;
use fewstep_models::{WeightType, lora};
use serde::{Deserialize, Serialize};

/// What is trained, and which part of the work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Task {
    /// Flow matching on real pictures.
    Sft,
    /// Direct distillation: the student's few steps end in the teacher's picture.
    #[value(alias = "direct-distill")]
    DirectDistill,
    /// The first half of [`Task::Sft`].
    #[serde(rename = "sft:data_process")]
    #[value(name = "sft:data_process")]
    SftDataProcess,
    /// The second half of [`Task::Sft`].
    #[serde(rename = "sft:train")]
    #[value(name = "sft:train")]
    SftTrain,
    /// The first half of [`Task::DirectDistill`].
    #[serde(rename = "direct_distill:data_process")]
    #[value(name = "direct_distill:data_process")]
    DirectDistillDataProcess,
    /// The second half of [`Task::DirectDistill`].
    #[serde(rename = "direct_distill:train")]
    #[value(name = "direct_distill:train")]
    DirectDistillTrain,
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// The error of the velocity on real pictures.
    FlowMatching,
    /// The distance between the student's picture and the teacher's.
    Distillation,
}

/// Which part of a task is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// All of it.
    Whole,
    /// Text states and latents are computed and written.
    DataProcess,
    /// They are read, and the denoiser is trained.
    Train,
}

impl Task {
    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::DirectDistill => "direct_distill",
            Self::SftDataProcess => "sft:data_process",
            Self::SftTrain => "sft:train",
            Self::DirectDistillDataProcess => "direct_distill:data_process",
            Self::DirectDistillTrain => "direct_distill:train",
        }
    }

    /// What is minimised.
    pub fn objective(self) -> Objective {
        match self {
            Self::Sft | Self::SftDataProcess | Self::SftTrain => Objective::FlowMatching,
            _ => Objective::Distillation,
        }
    }

    /// Which part of it is done.
    pub fn stage(self) -> Stage {
        match self {
            Self::Sft | Self::DirectDistill => Stage::Whole,
            Self::SftDataProcess | Self::DirectDistillDataProcess => Stage::DataProcess,
            Self::SftTrain | Self::DirectDistillTrain => Stage::Train,
        }
    }
}

/// A program whose choices can be taken together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Compat {
    /// DiffSynth-Studio, as that package ships.
    Diffsynth,
    /// diffusers, which has no trainer for this: only how the model computes.
    Diffusers,
}

/// A number type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Dtype {
    /// 32 bits.
    #[value(alias = "float32")]
    F32,
    /// IEEE half precision.
    #[value(alias = "float16")]
    F16,
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
}

impl From<Dtype> for WeightType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

/// Activation of a denoiser's MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Activation {
    /// The tanh form of GELU, which the published weights were trained with.
    #[serde(alias = "gelu-tanh")]
    #[value(alias = "gelu-tanh")]
    Tanh,
    /// x·sigmoid(1.702 x), which DiffSynth-Studio computes.
    #[serde(alias = "gelu-sigmoid")]
    #[value(alias = "gelu-sigmoid")]
    Sigmoid,
}

impl From<Activation> for Gelu {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Tanh => Self::Tanh,
            Activation::Sigmoid => Self::Sigmoid,
        }
    }
}

/// Which generators the random numbers of a run come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum RandomNumbers {
    /// One for each position in the run: batches of another size and resumed runs draw the same.
    PerPosition,
    /// torch's global generator, drawn from in the peers' order: adapters after `seed`, then order, sigma and noise
    /// after `seed` + 1.
    TorchGlobal,
}

/// What happens to a distillation picture that has not the size of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ResizedTargets {
    /// It is an error: resized, it is no longer what the teacher makes of the noise.
    Refuse,
    /// It is resized, as the peer does without a word.
    Allow,
}

/// Numbers that trained parameters and the optimiser's moments are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum StateNumbers {
    /// f32, so that small steps are not lost.
    F32,
    /// Those of `dtype`: every operation of the update is rounded to it.
    Dtype,
}

/// Weight of the flow-matching loss by sigma.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossWeighting {
    /// 1 everywhere.
    Uniform,
    /// DiffSynth-Studio's bell around the middle of the noise levels, of mean 1.
    Bell,
}

/// Sigma grid of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TrainingGrid {
    /// The grid that pictures are drawn on.
    Inference,
    /// DiffSynth-Studio's: a shift of e^0.8 whatever the size of the picture.
    Diffsynth,
}

/// What the student's cfg_scale does in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum StudentGuidance {
    /// The student is guided by it.
    Apply,
    /// Nothing, as in the peer.
    Ignore,
}

impl StudentGuidance {
    /// The guidance that a student with this `cfg_scale` is trained with.
    pub(crate) fn scale(self, cfg_scale: f32) -> f32 {
        match self {
            Self::Apply => cfg_scale,
            Self::Ignore => 1.0,
        }
    }
}

/// What the student of a model that knows no pure noise starts from; others start from noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum StudentStart {
    /// The noise alone, as pictures are drawn.
    Noise,
    /// The teacher's picture, noised to the first sigma of the grid, as in the peer: what is left of it is a help that
    /// the student will not have.
    NoisedTarget,
}

/// Which files a run leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OutputLayout {
    /// lora.safetensors or a complete model folder, when the run ends.
    Fewstep,
    /// DiffSynth-Studio's: epoch-0.safetensors and so on, or step-100.safetensors where save_steps is given, with only
    /// the trained parameters; loss.csv with its columns.
    Diffsynth,
}

/// How LoRA files spell their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LoraFormat {
    /// `transformer_blocks.0.attn.to_q.lora_A.default.weight`.
    Diffsynth,
    /// `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    Diffusers,
}

impl From<LoraFormat> for lora::LoraFormat {
    fn from(format: LoraFormat) -> Self {
        match format {
            LoraFormat::Diffsynth => Self::Diffsynth,
            LoraFormat::Diffusers => Self::Diffusers,
        }
    }
}

/// Which weights of a run are its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ResultWeights {
    /// Those with the lowest paired error the monitor saw; without a monitor the last ones.
    Best,
    /// Those of the last step.
    Last,
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
    /// A third for the first five steps: what the peer's `ConstantLR` does with its defaults.
    #[value(alias = "constant-lr")]
    ConstantLr,
    /// Falls on a line to lr_end at the last step.
    Linear,
    /// Falls on half a cosine to lr_end at the last step.
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
    /// Uniform over 1,000 levels of the training grid, as DiffSynth-Studio draws it.
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
