//! Flags that say how a model computes: whose conventions, in which number type, where.

use anyhow::Result;
use clap::Args;
use fewstep_data::image::Rounding;
use fewstep_device::DeviceName;
use fewstep_flow::schedule::SigmaRounding;
use fewstep_kernels::Gelu;
use fewstep_models::conventions::{
    ACTIVATIONS, DECODE_RANGES, GUIDANCE_RULES, PEERS, ROUNDINGS, SIGMA_ROUNDINGS,
};
use fewstep_models::{Conventions, DTYPES, DecodeRange, GuidanceRule, LoadOptions, Peer, WeightType};

use crate::parse::named;

/// Flags of what the peers compute differently from the same weights.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Conventions")]
pub struct ConventionArgs {
    /// Compute what this program computes [default: what the published model's own pipeline does]
    #[arg(long, value_name = "PROGRAM", value_parser = named(&PEERS))]
    pub compat: Option<Peer>,
    /// Activation of the transformer's MLPs, in place of --compat's
    #[arg(long, value_name = "NAME", value_parser = named(&ACTIVATIONS))]
    pub activation: Option<Gelu>,
    /// How guidance combines two predictions, in place of --compat's
    #[arg(long, value_name = "NAME", value_parser = named(&GUIDANCE_RULES))]
    pub guidance_rule: Option<GuidanceRule>,
    /// Range of decoded pixels, in place of --compat's
    #[arg(long, value_name = "NAME", value_parser = named(&DECODE_RANGES))]
    pub decode_range: Option<DecodeRange>,
    /// How pixels become 8 bits, in place of --compat's
    #[arg(long, value_name = "NAME", value_parser = named(&ROUNDINGS))]
    pub pixel_rounding: Option<Rounding>,
    /// Tokens of a prompt that are read, in place of the model's or --compat's
    #[arg(long, value_name = "TOKENS", alias = "max-sequence-length")]
    pub max_prompt_tokens: Option<usize>,
    /// Last bits of the sigmas, in place of --compat's
    #[arg(long, value_name = "NAME", value_parser = named(&SIGMA_ROUNDINGS))]
    pub sigma_rounding: Option<SigmaRounding>,
}

impl ConventionArgs {
    /// `--compat`'s conventions with the single flags' choices in them.
    pub fn conventions(&self) -> Conventions {
        let of_peer = Conventions::of(self.compat);
        Conventions {
            peer: self.compat,
            gelu: self.activation.unwrap_or(of_peer.gelu),
            guidance: self.guidance_rule.unwrap_or(of_peer.guidance),
            decode: self.decode_range.unwrap_or(of_peer.decode),
            rounding: self.pixel_rounding.unwrap_or(of_peer.rounding),
            max_prompt_tokens: self.max_prompt_tokens,
            sigma_rounding: self.sigma_rounding.unwrap_or(of_peer.sigma_rounding),
        }
    }
}

/// Flags of loading a model.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// Number type that weights, text states, latents and pixels are rounded to; arithmetic is f32
    #[arg(long, default_value = "f32", value_parser = named(&DTYPES))]
    pub dtype: WeightType,
    /// Where to compute: cpu, cuda:N (an NVIDIA GPU) or wgpu, as far as the build has them
    #[arg(long, default_value = "cpu")]
    pub device: DeviceName,
    /// What the peers compute differently.
    #[command(flatten)]
    pub conventions: ConventionArgs,
}

impl LoadArgs {
    /// What the library takes.
    ///
    /// # Errors
    /// If the device cannot be used.
    pub fn options(&self) -> Result<LoadOptions> {
        Ok(LoadOptions {
            device: self.device.open_for(self.dtype.dtype())?,
            conventions: self.conventions.conventions(),
            dtype: self.dtype,
            ..LoadOptions::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::with_defaults;

    #[test]
    fn a_single_flag_wins_over_compat() {
        let flags: ConventionArgs =
            with_defaults(&[("compat", "diffsynth".into()), ("pixel-rounding", "nearest".into())]);
        let expected = Conventions { rounding: Rounding::Nearest, ..Conventions::of(Some(Peer::Diffsynth)) };
        assert_eq!(flags.conventions(), expected);
        assert_eq!(ConventionArgs::default().conventions(), Conventions::default());
    }
}
