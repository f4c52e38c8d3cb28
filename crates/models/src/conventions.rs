//! What the peers compute differently from the same weights.
//!
//! The default is the published model's own way; [`Conventions::of`] gives a peer's. A family reads from here what
//! it has a choice in.

use fewstep_data::image::Rounding;
use fewstep_kernels::Gelu;

/// A program whose numbers can be reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// DiffSynth-Studio 2.1, as that package ships.
    Diffsynth,
    /// diffusers 0.42.
    Diffusers,
}

/// How guided velocities are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuidanceRule {
    /// unconditional + scale·(conditional − unconditional).
    Plain,
    /// The same, each token scaled to the norm of the conditional one.
    NormRescaled,
}

/// The range of decoded pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeRange {
    /// Whatever the autoencoder gives.
    Unbounded,
    /// Clamped to [−1, 1].
    Clamped,
}

/// Choices that change numbers but not weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conventions {
    /// Activation of the transformer's MLPs.
    pub gelu: Gelu,
    /// How guidance combines two velocities.
    pub guidance: GuidanceRule,
    /// Range of decoded pixels.
    pub decode: DecodeRange,
    /// How pixels become 8 bits.
    pub rounding: Rounding,
    /// Longest prompt in tokens, without its template; longer ones are cut.
    pub max_prompt_tokens: usize,
}

impl Default for Conventions {
    /// The published model's own.
    fn default() -> Self {
        Self {
            gelu: Gelu::Tanh,
            guidance: GuidanceRule::NormRescaled,
            decode: DecodeRange::Clamped,
            rounding: Rounding::Nearest,
            max_prompt_tokens: 1024,
        }
    }
}

impl Conventions {
    /// A peer's conventions; the published model's own where there is none.
    pub fn of(peer: Option<Peer>) -> Self {
        match peer {
            None => Self::default(),
            Some(Peer::Diffsynth) => Self {
                gelu: Gelu::Sigmoid,
                guidance: GuidanceRule::Plain,
                decode: DecodeRange::Unbounded,
                rounding: Rounding::Truncate,
                max_prompt_tokens: 4096,
            },
            Some(Peer::Diffusers) => Self { max_prompt_tokens: 512, ..Self::default() },
        }
    }
}
