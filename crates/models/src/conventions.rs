//! What the peers compute differently from the same weights.
//!
//! The default is the published model's own way; [`Conventions::of`] gives a peer's. A family reads from here what
//! it has a choice in. Every choice has one name, for flags, recipes and data sets.

use std::collections::BTreeMap;

use fewstep_data::image::Rounding;
use fewstep_flow::Solver;
use fewstep_flow::schedule::SigmaRounding;
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

/// Names of [`Peer`]s.
pub const PEERS: [(&str, Peer); 2] = [("diffsynth", Peer::Diffsynth), ("diffusers", Peer::Diffusers)];
/// Names of [`Conventions::gelu`].
pub const ACTIVATIONS: [(&str, Gelu); 2] = [("gelu-tanh", Gelu::Tanh), ("gelu-sigmoid", Gelu::Sigmoid)];
/// Names of [`Conventions::guidance`].
pub const GUIDANCE_RULES: [(&str, GuidanceRule); 2] =
    [("plain", GuidanceRule::Plain), ("norm-rescaled", GuidanceRule::NormRescaled)];
/// Names of [`Conventions::decode`].
pub const DECODE_RANGES: [(&str, DecodeRange); 2] =
    [("unbounded", DecodeRange::Unbounded), ("clamped", DecodeRange::Clamped)];
/// Names of [`Conventions::rounding`].
pub const ROUNDINGS: [(&str, Rounding); 2] =
    [("nearest", Rounding::Nearest), ("truncate", Rounding::Truncate)];
/// Names of solvers.
pub const SOLVERS: [(&str, Solver); 6] = [
    ("euler", Solver::Euler),
    ("heun", Solver::Heun),
    ("ddim", Solver::Ddim),
    ("plms", Solver::Plms),
    ("plms-angular", Solver::PlmsAngular),
    ("unipc", Solver::UniPc),
];
/// Names of [`Conventions::sigma_rounding`].
pub const SIGMA_ROUNDINGS: [(&str, SigmaRounding); 2] =
    [("diffusers", SigmaRounding::Diffusers), ("diffsynth", SigmaRounding::Diffsynth)];

/// Choices that change numbers but not weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conventions {
    /// Whose pipeline is followed in what has no choice of its own here.
    pub peer: Option<Peer>,
    /// Activation of the transformer's MLPs.
    pub gelu: Gelu,
    /// How guidance combines two velocities.
    pub guidance: GuidanceRule,
    /// Range of decoded pixels.
    pub decode: DecodeRange,
    /// How pixels become 8 bits.
    pub rounding: Rounding,
    /// Longest prompt in tokens, without its template; longer ones are cut. `None` leaves it to the family.
    pub max_prompt_tokens: Option<usize>,
    /// Last bits of the sigma grids.
    pub sigma_rounding: SigmaRounding,
}

impl Default for Conventions {
    /// The published model's own.
    fn default() -> Self {
        Self {
            peer: None,
            gelu: Gelu::Tanh,
            guidance: GuidanceRule::NormRescaled,
            decode: DecodeRange::Clamped,
            rounding: Rounding::Nearest,
            max_prompt_tokens: None,
            sigma_rounding: SigmaRounding::Diffusers,
        }
    }
}

impl Conventions {
    /// A peer's conventions; the published model's own where there is none.
    pub fn of(peer: Option<Peer>) -> Self {
        match peer {
            None => Self::default(),
            Some(Peer::Diffsynth) => Self {
                peer,
                gelu: Gelu::Sigmoid,
                guidance: GuidanceRule::Plain,
                decode: DecodeRange::Unbounded,
                rounding: Rounding::Truncate,
                max_prompt_tokens: None,
                sigma_rounding: SigmaRounding::Diffsynth,
            },
            Some(Peer::Diffusers) => Self { peer, ..Self::default() },
        }
    }

    /// With a limit of prompts where none was chosen.
    pub(crate) fn or_max_prompt_tokens(self, tokens: usize) -> Self {
        Self { max_prompt_tokens: self.max_prompt_tokens.or(Some(tokens)), ..self }
    }

    /// Every choice by name, as a data set records it; a loaded model's has all of them.
    pub fn record(&self) -> BTreeMap<String, String> {
        let limit = self.max_prompt_tokens.map(|tokens| ("max_prompt_tokens", tokens.to_string()));
        let entries = [
            ("activation", name_of(&ACTIVATIONS, self.gelu).to_owned()),
            ("guidance_rule", name_of(&GUIDANCE_RULES, self.guidance).to_owned()),
            ("decode_range", name_of(&DECODE_RANGES, self.decode).to_owned()),
            ("pixel_rounding", name_of(&ROUNDINGS, self.rounding).to_owned()),
            ("sigma_rounding", name_of(&SIGMA_ROUNDINGS, self.sigma_rounding).to_owned()),
        ];
        entries.into_iter().chain(limit).map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// A choice's name in its table.
///
/// # Panics
/// If the table lacks it.
pub fn name_of<T: PartialEq>(names: &[(&'static str, T)], choice: T) -> &'static str {
    let found = names.iter().find(|(_, named)| *named == choice);
    found.expect("the tables name every choice").0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_differ_in_every_recorded_choice_and_the_default_is_diffusers() {
        let [own, diffsynth, diffusers] =
            [None, Some(Peer::Diffsynth), Some(Peer::Diffusers)].map(|peer| Conventions::of(peer).record());
        assert!(diffsynth.iter().all(|(key, value)| diffusers[key] != *value), "{diffsynth:?}");
        assert_eq!(own, diffusers);
        assert_eq!(diffsynth["activation"], "gelu-sigmoid");
        let limited = Conventions { max_prompt_tokens: Some(7), ..Conventions::default() };
        assert_eq!(limited.record()["max_prompt_tokens"], "7");
    }
}
