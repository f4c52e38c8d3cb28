//! A picture that a student draws, and the gradient through all steps of its drawing.
//!
//! It is the discrete adjoint ([`fewstep_flow::adjoint`]), so memory is that of one network evaluation with a graph, or
//! of as many as are recorded on the way. Steps that are not are evaluated again on the way back, and the last of them
//! take over what was dear of their first evaluation.

use burn::module::Module;
use burn::tensor::Tensor;
use fewstep_flow::{SigmaGrid, adjoint};
use fewstep_kernels::Remembered;
use fewstep_models::sampling::{Guidance, euler_trajectory, guided_velocity};
use fewstep_models::{Condition, KeptSteps, Model};

use super::{GradientSum, scalar};

/// Euler steps from a state, under a guidance.
pub struct Rollout {
    /// The steps.
    pub grid: SigmaGrid,
    /// `[B, C, H, W]`, at the first sigma; on the plain side of the device.
    pub start: Tensor<4>,
    /// Of the student; without a graph.
    pub guidance: Guidance,
}

impl Rollout {
    /// The loss of the last state; adds the gradient of `share` times it by the model's parameters to `sum`.
    ///
    /// `loss` gets that state with a graph, `[B, C, H, W]`, and gives `[1]`. `kept` is what is bought with memory: the
    /// gradient is the same whatever it is.
    pub fn add_gradient(
        self,
        model: &Model,
        kept: KeptSteps,
        (share, sum): (f32, &mut GradientSum),
        loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
    ) -> f64 {
        let Self { grid, start, guidance } = self;
        let tracked = autodiff(guidance.clone());
        let record = |state, sigma| {
            adjoint::Recorded::new(state, |state| guided_velocity(model, state, sigma, &tracked))
        };
        let kept = kept.among(grid.steps());
        let first_recorded = grid.steps() - kept.recorded;
        let first_remembered = first_recorded - kept.remembered;
        let (mut recorded, mut remembered) = (Vec::new(), Vec::new());
        let states = {
            // Dropped before the optimiser runs, which updates weights in place only if it holds the one handle.
            let frozen = model.valid();
            euler_trajectory(&frozen, &grid, start, |step, state, sigma| {
                if step >= first_recorded {
                    let step = record(state, sigma);
                    let velocity = step.velocity();
                    recorded.push(step);
                    return velocity;
                }
                let evaluate = || guided_velocity(&frozen, state, sigma, &guidance);
                if step < first_remembered {
                    return evaluate();
                }
                let (velocity, results) = Remembered::of(evaluate);
                remembered.push(results);
                velocity
            })
        };
        let drawn = states.last().expect("a rollout has a last state").clone();
        let (loss, cotangent) = loss_gradient(drawn, share, loss);
        adjoint::backward(&grid, &states, cotangent, |_, state, sigma, cotangent| {
            let step = recorded.pop().unwrap_or_else(|| {
                remembered.pop().unwrap_or_default().taken_over_in(|| record(state, sigma))
            });
            sum.add(model, || {
                let product = step.pull_back(cotangent);
                (product.parameters, product.input_gradient)
            })
        });
        loss
    }

    /// The same from one graph over all steps: the tests' reference, whose memory grows with the steps.
    #[cfg(test)]
    pub(super) fn add_gradient_on_tape(
        self,
        model: &Model,
        (share, sum): (f32, &mut GradientSum),
        loss: impl FnOnce(Tensor<4>) -> Tensor<1>,
    ) -> f64 {
        use fewstep_flow::Solver;
        use fewstep_models::sampling::sample_latents;
        let guidance = autodiff(self.guidance);
        let drawn = sample_latents(model, Solver::Euler, &self.grid, self.start.autodiff(), &guidance);
        let loss = loss(drawn);
        sum.add(model, || (loss.clone().mul_scalar(share).backward(), ()));
        scalar(loss)
    }
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

fn autodiff(guidance: Guidance) -> Guidance {
    Guidance {
        condition: guidance.condition.autodiff(),
        unconditional: guidance.unconditional.map(Condition::autodiff),
        cfg_scale: guidance.cfg_scale,
    }
}
