//! How an optimiser moves one parameter, and what it remembers of it.
//!
//! An optimiser is one file here, one line in [`Rule`] and one in [`Memory`].

mod adafactor;
mod memory;
mod muon;
mod prodigy;
mod rounded_adamw;
#[cfg(test)]
mod tests;

use burn::tensor::Tensor;
use fewstep_kernels::{AdamW, AdamWStep, Moments, Moments8bit, updated, with_values};

pub(crate) use memory::{Memory, SavedState, restore, save};
pub(crate) use prodigy::{Estimate, Fraction, Prodigy};

use crate::recipe::{Dtype, OptimizerName, Recipe};
use adafactor::MeanSquares;

/// Elements of one piece of work.
const PIECE: usize = 16 * 1024;

/// Tensors of fewer elements keep moments in f32: the memory is not worth the error (bitsandbytes' `min_8bit_size`).
const SMALLEST_8BIT: usize = 4096;

/// An optimiser's rule and settings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Rule {
    AdamW(AdamW),
    /// In numbers of a type, every operation rounded to it.
    RoundedAdamW(AdamW, Dtype),
    AdamW8bit(AdamW),
    Adafactor,
    Prodigy(Prodigy),
    /// The momentum's decay; AdamW is for what is no matrix.
    Muon(f64, AdamW),
}

/// What changes from step to step, and the decay of the parameter at hand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) learning_rate: f64,
    /// Multiplies the gradient first, as clipping does.
    pub(crate) gradient_scale: f32,
    /// Counted from 1.
    pub(crate) number: u64,
    pub(crate) weight_decay: f64,
}

/// What a parameter is for a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// A matrix that its input is multiplied by.
    Matrix,
    /// A bias, the weight of a norm, or a table whose rows are looked up.
    Other,
}

impl Rule {
    /// The rule of a recipe.
    pub(crate) fn new(recipe: &Recipe) -> Self {
        let adamw = AdamW {
            beta_1: recipe.adam_beta_1,
            beta_2: recipe.adam_beta_2,
            epsilon: recipe.adam_epsilon,
            weight_decay: recipe.weight_decay,
        };
        match (recipe.optimizer, recipe.state_dtype()) {
            (OptimizerName::Adamw, Dtype::F32) => Self::AdamW(adamw),
            (OptimizerName::Adamw, small) => Self::RoundedAdamW(adamw, small),
            (OptimizerName::Adamw8bit, _) => Self::AdamW8bit(adamw),
            (OptimizerName::Adafactor, _) => Self::Adafactor,
            (OptimizerName::Prodigy, _) => Self::Prodigy(Prodigy::new(adamw, recipe.prodigy_d_coef)),
            (OptimizerName::Muon, _) => Self::Muon(recipe.muon_momentum, adamw),
        }
    }

    /// The memory of a parameter before its first step.
    pub(crate) fn fresh<const D: usize>(&self, parameter: &Tensor<D>, kind: Kind) -> Memory {
        let shape = parameter.dims();
        let len = shape.iter().product();
        match self {
            Self::AdamW8bit(_) if len >= SMALLEST_8BIT => Memory::Moments8bit(Moments8bit::zeros(len)),
            Self::Adafactor => Memory::MeanSquares(MeanSquares::zeros(&shape)),
            Self::Prodigy(_) => with_values(parameter.clone(), Memory::travelled),
            Self::Muon(..) if kind == Kind::Matrix => Memory::Momentum(vec![0.0; len]),
            _ => Memory::Moments(Moments::zeros(len)),
        }
    }

    /// The parameter after one step; its memory moves along. All are without autodiff history.
    ///
    /// # Panics
    /// If the memory is another rule's, which is ruled out when a state is restored.
    pub(crate) fn apply<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        memory: &mut Memory,
        at: &Step,
    ) -> Tensor<D> {
        let adamw_step =
            AdamWStep { learning_rate: at.learning_rate, gradient_scale: at.gradient_scale, step: at.number };
        let decaying = |adamw: &AdamW| AdamW { weight_decay: at.weight_decay, ..*adamw };
        match (self, memory) {
            (Self::RoundedAdamW(adamw, dtype), Memory::Moments(moments)) => {
                let step = |parameter: &mut [f32], gradient: &[f32]| {
                    rounded_adamw::step(&decaying(adamw), parameter, gradient, moments, (adamw_step, *dtype));
                };
                on_host(parameter, gradient, step)
            }
            (
                Self::AdamW(adamw) | Self::AdamW8bit(adamw) | Self::Muon(_, adamw),
                Memory::Moments(moments),
            ) => decaying(adamw).step(parameter, gradient, moments, adamw_step),
            (Self::AdamW8bit(adamw), Memory::Moments8bit(moments)) => {
                decaying(adamw).step_8bit(parameter, gradient, moments, adamw_step)
            }
            (Self::Adafactor, Memory::MeanSquares(squares)) => {
                on_host(parameter, gradient, |parameter, gradient| {
                    adafactor::step(parameter, gradient, squares, at);
                })
            }
            (Self::Prodigy(prodigy), Memory::Travelled(travelled)) => {
                updated(parameter, |parameter| prodigy.apply(parameter, travelled, at.weight_decay))
            }
            (Self::Muon(decay, _), Memory::Momentum(momentum)) => {
                let shape = parameter.dims();
                let matrix = parameter.reshape([shape[0], shape[D - 1]]);
                with_values(gradient, |gradient| muon::step(matrix, gradient, momentum, *decay, at))
                    .reshape(shape)
            }
            (rule, memory) => panic!("{rule:?} does not remember {memory:?}"),
        }
    }
}

fn on_host<const D: usize>(
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    step: impl FnOnce(&mut [f32], &[f32]),
) -> Tensor<D> {
    with_values(gradient, |gradient| updated(parameter, |parameter| step(parameter, gradient)))
}
