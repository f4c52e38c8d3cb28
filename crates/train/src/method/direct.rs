//! Direct distillation (METHODS, A): the student's few Euler steps from the teacher's noise end in the teacher's picture.
//!
//! The gradient through all steps is the discrete adjoint, so memory is that of one network evaluation with a graph, or
//! of as many as are recorded on the way. Steps that are not are evaluated again on the way back, and the last of them
//! take over what was dear of their first evaluation.

use burn::module::Module;
use burn::tensor::Tensor;
#[cfg(test)]
use fewstep_flow::Solver;
use fewstep_flow::{SigmaGrid, adjoint, path};
use fewstep_kernels::Remembered;
#[cfg(test)]
use fewstep_models::sampling::sample_latents;
use fewstep_models::sampling::{Guidance, euler_trajectory, guided_velocity, latents_from_noise};
use fewstep_models::{Condition, Denoiser, KeptSteps, Model};

use super::{GradientSum, scalar};
use crate::TrainError;
use crate::batch::Batch;
use crate::recipe::{Distance, Recipe, StudentGuidance, StudentStart, TrainingGrid};

/// Direct distillation and its settings.
pub struct Direct {
    distance: Distance,
    huber_c: f64,
    training_grid: TrainingGrid,
    student_guidance: StudentGuidance,
    student_start: StudentStart,
    kept_steps: KeptSteps,
    /// Boxed: a model is hundreds of times larger than the rest.
    teacher: Option<Box<OnlineTeacher>>,
}

/// A teacher whose pictures are made during training.
pub struct OnlineTeacher {
    /// The frozen weights, on the plain side of the device.
    pub model: Model,
    /// Its sampling steps.
    pub num_inference_steps: usize,
    /// Its guidance; 1 is off.
    pub cfg_scale: f32,
}

impl Direct {
    /// The settings of a recipe; `start` is the model before training, which an online teacher keeps.
    pub fn new(recipe: &Recipe, start: &Model) -> Self {
        let teacher = || {
            let (num_inference_steps, cfg_scale) = recipe.teacher(start.defaults());
            OnlineTeacher { model: start.clone(), num_inference_steps, cfg_scale }
        };
        Self {
            distance: recipe.loss,
            huber_c: recipe.huber_c,
            training_grid: recipe.training_grid,
            student_guidance: recipe.student_guidance,
            student_start: recipe.student_start,
            kept_steps: recipe.kept_steps(),
            teacher: recipe.online_teacher.then(|| Box::new(teacher())),
        }
    }

    /// See [`super::Method::step`].
    pub(crate) fn step(
        &self,
        model: &Model,
        batch: &Batch<'_>,
        share: f32,
        sum: &mut GradientSum,
    ) -> Result<f64, TrainError> {
        let problem = self.problem(model, batch)?;
        let guidance = autodiff(problem.guidance.clone());
        let record = |state, sigma| {
            adjoint::Recorded::new(state, |state| guided_velocity(model, state, sigma, &guidance))
        };
        let steps = problem.grid.steps();
        let kept = self.kept_steps.among(steps);
        let first_recorded = steps - kept.recorded;
        let first_remembered = first_recorded - kept.remembered;
        let (mut recorded, mut remembered) = (Vec::new(), Vec::new());
        let states = {
            // Dropped before the optimiser runs, which updates weights in place only if it holds the one handle.
            let frozen = model.valid();
            euler_trajectory(&frozen, &problem.grid, problem.start, |step, state, sigma| {
                if step >= first_recorded {
                    let step = record(state, sigma);
                    let velocity = step.velocity();
                    recorded.push(step);
                    return velocity;
                }
                let evaluate = || guided_velocity(&frozen, state, sigma, &problem.guidance);
                if step < first_remembered {
                    return evaluate();
                }
                let (velocity, results) = Remembered::of(evaluate);
                remembered.push(results);
                velocity
            })
        };
        let drawn = states.last().expect("a rollout has a last state").clone();
        let loss = |state| self.loss(model.finish(state, &problem.grid), problem.target);
        let (loss, cotangent) = loss_gradient(drawn, share, loss);
        adjoint::backward(&problem.grid, &states, cotangent, |_, state, sigma, cotangent| {
            let step = recorded.pop().unwrap_or_else(|| {
                remembered.pop().unwrap_or_default().taken_over_in(|| record(state, sigma))
            });
            sum.add(model, || {
                let product = step.pull_back(cotangent);
                (product.parameters, product.input_gradient)
            })
        });
        Ok(loss)
    }

    /// The same gradient from one graph over all steps: the tests' reference, whose memory grows with the steps.
    #[cfg(test)]
    pub(crate) fn step_on_tape(
        &self,
        model: &Model,
        batch: &Batch<'_>,
        share: f32,
        sum: &mut GradientSum,
    ) -> Result<f64, TrainError> {
        let problem = self.problem(model, batch)?;
        let guidance = autodiff(problem.guidance);
        let drawn = sample_latents(model, Solver::Euler, &problem.grid, problem.start.autodiff(), &guidance);
        let loss = self.loss(model.finish(drawn, &problem.grid), problem.target);
        sum.add(model, || (loss.clone().mul_scalar(share).backward(), ()));
        Ok(scalar(loss))
    }

    fn problem(&self, model: &Model, batch: &Batch<'_>) -> Result<Problem, TrainError> {
        let group = batch.group();
        let noise = batch.initial_noise(model.dtype().into());
        let guidance = batch.guidance(model, self.student_guidance.scale(group.cfg_scale()))?;
        let target = match &self.teacher {
            Some(teacher) => teacher.latents(noise.clone(), batch)?,
            None => batch.latents(),
        };
        let grid = self.training_grid.sigmas(model, group.num_inference_steps, group.extent)?;
        let start = self.start(model, noise, &target, &grid);
        Ok(Problem { guidance, start: model.kept(start), grid, target })
    }

    /// The state at the first sigma of the grid.
    fn start(&self, model: &Model, noise: Tensor<4>, target: &Tensor<4>, grid: &SigmaGrid) -> Tensor<4> {
        let knows_pure_noise = model.highest_sigma() == 1.0;
        match self.student_start {
            StudentStart::NoisedTarget if !knows_pure_noise => {
                let sigma = Tensor::full([noise.dims()[0]], grid.as_slice()[0], &noise.device());
                path::noisy(target.clone(), noise, sigma)
            }
            _ => model.start(noise, grid),
        }
    }

    /// The loss of drawn latents; those have a graph.
    fn loss(&self, drawn: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
        let squared = (drawn - target.autodiff()).square();
        match self.distance {
            Distance::Mse => squared.mean(),
            Distance::PseudoHuber => (squared + self.huber_c * self.huber_c).sqrt().mean() - self.huber_c,
        }
    }
}

/// What a batch asks of the student: from this state, on this grid, to that target.
struct Problem {
    grid: SigmaGrid,
    guidance: Guidance,
    start: Tensor<4>,
    target: Tensor<4>,
}

/// The loss, and the gradient of `share` times it, at the last state.
fn loss_gradient(
    state: Tensor<4>,
    share: f32,
    loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
) -> (f64, Tensor<4>) {
    let state = state.autodiff().require_grad();
    let loss = loss(state.clone());
    let mut gradients = loss.clone().mul_scalar(share).backward();
    let gradient = state.grad_remove(&mut gradients).expect("the loss depends on the last state");
    (scalar(loss), gradient)
}

impl OnlineTeacher {
    /// The teacher's own ODE solution from the noise.
    fn latents(&self, noise: Tensor<4>, batch: &Batch<'_>) -> Result<Tensor<4>, TrainError> {
        let grid = self.model.sigma_grid(self.num_inference_steps, batch.group().extent)?;
        // The teacher is told what it usually is, whatever its student is told.
        let guidance = batch.guidance(&self.model, self.cfg_scale)?.told(None);
        Ok(latents_from_noise(&self.model, &grid, noise, &guidance))
    }
}

fn autodiff(guidance: Guidance) -> Guidance {
    Guidance {
        condition: guidance.condition.autodiff(),
        unconditional: guidance.unconditional.map(Condition::autodiff),
        cfg_scale: guidance.cfg_scale,
    }
}
