//! `fewstep lora`: adapters from one spelling to another, and into full weights.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use fewstep_models::lora::{self, Fusion, LoraFormat, LoraWeights, MAX_SHARD_BYTES};
use fewstep_models::{LoraFile, WeightType};

use crate::parse::{lora_file, lora_format, weight_type};
use crate::progress::Progress;

/// Flags of `lora`.
#[derive(Args, Clone, Debug)]
pub struct LoraArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: LoraCommand,
}

/// The subcommands of `lora`.
#[derive(Subcommand, Clone, Debug)]
pub enum LoraCommand {
    /// Write a LoRA file in another program's spelling
    Convert(ConvertArgs),
    /// Add LoRA files into the weights of a model: a folder that needs no LoRA any more
    Fuse(FuseArgs),
}

/// Flags of `lora convert`.
#[derive(Args, Clone, Debug)]
pub struct ConvertArgs {
    /// LoRA file in any spelling that is read
    #[arg(long)]
    pub input: PathBuf,
    /// File to write
    #[arg(long)]
    pub output: PathBuf,
    /// Spelling of the keys: diffsynth or diffusers
    #[arg(long, value_parser = lora_format)]
    pub format: LoraFormat,
}

/// Flags of `lora fuse`.
#[derive(Args, Clone, Debug)]
pub struct FuseArgs {
    /// Model folder in the official layout
    #[arg(long)]
    pub model: PathBuf,
    /// Adapter of the model, FILE or FILE:alpha; may be given several times
    #[arg(long, required = true, value_parser = lora_file)]
    pub lora: Vec<LoraFile>,
    /// Folder to write
    #[arg(long)]
    pub output: PathBuf,
    /// Number type of the fused weights: f32, bf16 or f16 [default: that of the base]
    #[arg(long, value_parser = weight_type)]
    pub dtype: Option<WeightType>,
}

/// Converts or fuses. An output of the same command is left as it is.
///
/// # Errors
/// As [`lora::convert`] and [`lora::fuse`].
pub fn run(args: &LoraArgs, progress: &dyn Progress) -> Result<()> {
    match &args.command {
        LoraCommand::Convert(ConvertArgs { input, output, format }) => {
            lora::convert(input, output, *format)?;
            let layers = LoraWeights::open(output)?.layers().len();
            progress.say(&format!("{layers} layers, {}: {}", format.name(), output.display()));
        }
        LoraCommand::Fuse(args) => {
            lora::fuse(&Fusion {
                model: args.model.clone(),
                loras: args.lora.clone(),
                output: args.output.clone(),
                dtype: args.dtype,
                max_shard_bytes: MAX_SHARD_BYTES,
            })?;
            progress.say(&format!("fused: {}", args.output.display()));
        }
    }
    Ok(())
}
