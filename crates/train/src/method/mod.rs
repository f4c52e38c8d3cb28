//! What one optimiser step learns from: a method turns batches into gradients.
//!
//! A method is one file here and one line in [`Method`]. It alone decides which network is evaluated how; it never
//! touches the optimiser.

mod direct;
mod flow_matching;
mod rollout;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};
use fewstep_kernels::{GradientSums, added};
use fewstep_models::Model;

pub use direct::{Direct, OnlineTeacher};
pub use flow_matching::FlowMatching;
pub(crate) use flow_matching::TRAINING_LEVELS;
pub use rollout::Rollout;

use crate::TrainError;
use crate::batch::Batch;
use crate::recipe::{Objective, Recipe};

/// All methods.
pub enum Method {
    /// Regression of the velocity on real pictures.
    FlowMatching(FlowMatching),
    /// Regression of the student's final picture on the teacher's.
    Direct(Direct),
}

impl Method {
    /// The method of a recipe's task; `start` is the model before training.
    pub fn new(recipe: &Recipe, start: &Model) -> Self {
        match recipe.task.objective() {
            Objective::FlowMatching => Self::FlowMatching(FlowMatching::new(recipe)),
            Objective::Distillation => Self::Direct(Direct::new(recipe, start)),
        }
    }

    /// Adds the gradient of `share` times the batch's mean loss; returns that mean loss.
    ///
    /// `share` is the batch's part of the samples of an optimiser step, so that a step's gradient is that of the mean
    /// over all its samples however they are split into batches.
    ///
    /// # Errors
    /// If a prompt cannot be encoded or a sigma grid cannot be computed.
    pub fn step(
        &self,
        model: &Model,
        batch: &Batch<'_>,
        share: f32,
        sum: &mut GradientSum,
    ) -> Result<f64, TrainError> {
        match self {
            Self::FlowMatching(method) => method.step(model, batch, share, sum),
            Self::Direct(method) => method.step(model, batch, share, sum),
        }
    }
}

/// Gradients of a model's parameters, summed over backward passes.
#[derive(Default)]
pub struct GradientSum(GradientsParams);

impl GradientSum {
    /// Adds the parameter gradients of one backward pass, and gives what else it leaves.
    pub fn add<T>(&mut self, model: &Model, backward: impl FnOnce() -> (Gradients, T)) -> T {
        let mut lending = Lending { sum: &mut self.0, lent: GradientSums::default() };
        model.visit(&mut lending);
        let ((gradients, rest), lent) = lending.lent.filled_by(backward);
        model.visit(&mut Adding { sum: &mut self.0, lent, gradients });
        rest
    }

    /// The sum.
    pub fn finish(self) -> GradientsParams {
        self.0
    }
}

/// Hands the sum so far to a backward pass, one parameter after the other.
struct Lending<'a> {
    sum: &'a mut GradientsParams,
    lent: GradientSums,
}

impl ModuleVisitor for Lending<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        if !parameter.is_require_grad() {
            return;
        }
        if let Some(sum) = self.lent.insert(parameter.val(), self.sum.remove(parameter.id)) {
            self.sum.register(parameter.id, sum);
        }
    }
}

/// Takes the sum back, and adds the gradients that the pass left, one parameter after the other.
struct Adding<'a> {
    sum: &'a mut GradientsParams,
    lent: GradientSums,
    gradients: Gradients,
}

impl ModuleVisitor for Adding<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        let gradient = parameter.val().grad_remove(&mut self.gradients);
        let sum =
            match (self.lent.remove(parameter.val()).or_else(|| self.sum.remove(parameter.id)), gradient) {
                (Some(sum), Some(gradient)) => added(sum, gradient),
                (Some(sum), None) => sum,
                (None, Some(gradient)) => gradient,
                (None, None) => return,
            };
        self.sum.register(parameter.id, sum);
    }
}

/// A loss of one element on the host; on a GPU this waits for it.
fn scalar(loss: Tensor<1>) -> f64 {
    f64::from(loss.inner().into_scalar::<f32>())
}
