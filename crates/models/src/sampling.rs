//! Drawing latents: a solver, a sigma grid, guidance, and a model.

use burn::tensor::{Tensor, TensorData};
use fewstep_flow::sampler::Stepper;
use fewstep_flow::{SigmaGrid, Solver};

use crate::{Condition, Denoiser, Model};

/// What a sampler is told about the prompts.
#[derive(Clone, Debug)]
pub struct Guidance {
    /// States of the prompts.
    pub condition: Condition,
    /// States of the negative prompts; needed where `cfg_scale` is not 1.
    pub unconditional: Option<Condition>,
    /// Guidance scale; 1 is off.
    pub cfg_scale: f32,
}

impl Guidance {
    /// Conditional sampling without guidance.
    pub fn off(condition: Condition) -> Self {
        Self { condition, unconditional: None, cfg_scale: 1.0 }
    }

    /// The same with another scale that the denoiser is told; `None` leaves it to the model.
    pub fn told(self, embedded_guidance: Option<f32>) -> Self {
        let told = |condition: Condition| condition.with_embedded_guidance(embedded_guidance);
        Self { condition: told(self.condition), unconditional: self.unconditional.map(told), ..self }
    }
}

/// Velocity under guidance at one time for the whole batch.
///
/// # Shapes
/// - `noisy` and output: `[B, C, H, W]`
///
/// # Panics
/// If guidance is on without an unconditional state.
pub fn guided_velocity(
    denoiser: &impl Denoiser,
    noisy: Tensor<4>,
    sigma: f32,
    guidance: &Guidance,
) -> Tensor<4> {
    let batch = noisy.dims()[0];
    let sigma = Tensor::<1>::from_data(TensorData::new(vec![sigma; batch], [batch]), &noisy.device());
    let conditional = denoiser.velocity(noisy.clone(), sigma.clone(), &guidance.condition);
    if guidance.cfg_scale == 1.0 {
        return conditional;
    }
    let unconditional = guidance.unconditional.as_ref().expect("guidance needs an unconditional state");
    denoiser.guide(conditional, denoiser.velocity(noisy, sigma, unconditional), guidance.cfg_scale)
}

/// Draws latents from noise.
///
/// # Shapes
/// - `noise` and output: `[B, C, H, W]`
pub fn sample_latents(
    denoiser: &impl Denoiser,
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    guidance: &Guidance,
) -> Tensor<4> {
    states(denoiser, solver, grid, noise, guidance).last().expect("a grid has steps")
}

/// Draws latents by Euler steps from pure noise, as a model begins and ends a run on a grid.
///
/// # Shapes
/// - `noise` and output: `[B, C, H, W]`
pub fn latents_from_noise(
    model: &Model,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    guidance: &Guidance,
) -> Tensor<4> {
    let start = model.kept(model.start(noise, grid));
    model.finish(sample_latents(model, Solver::Euler, grid, start, guidance), grid)
}

/// Every state of [`sample_latents`], `noise` first and the latents last: one more than there are steps.
///
/// # Shapes
/// - `noise` and each state: `[B, C, H, W]`
pub fn sample_trajectory(
    denoiser: &impl Denoiser,
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    guidance: &Guidance,
) -> Vec<Tensor<4>> {
    let states = states(denoiser, solver, grid, noise.clone(), guidance);
    std::iter::once(noise).chain(states).collect()
}

/// The states of [`sample_trajectory`] by Euler steps along velocities that the caller finds, whose calls are given the
/// step, counted from 0, the state and its sigma.
pub fn euler_trajectory(
    denoiser: &impl Denoiser,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    mut velocity: impl FnMut(usize, Tensor<4>, f32) -> Tensor<4>,
) -> Vec<Tensor<4>> {
    let mut step = 0..;
    let along = |state, sigma| velocity(step.next().expect("counts on"), state, sigma);
    let states = states_along(denoiser, Solver::Euler, grid, noise.clone(), along);
    std::iter::once(noise).chain(states).collect()
}

/// The state after each step, kept in the denoiser's number type.
fn states(
    denoiser: &impl Denoiser,
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    guidance: &Guidance,
) -> impl Iterator<Item = Tensor<4>> {
    let velocity = move |noisy, sigma| guided_velocity(denoiser, noisy, solver.told(grid, sigma), guidance);
    states_along(denoiser, solver, grid, noise, velocity)
}

fn states_along(
    denoiser: &impl Denoiser,
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<4>,
    mut velocity: impl FnMut(Tensor<4>, f32) -> Tensor<4>,
) -> impl Iterator<Item = Tensor<4>> {
    let mut stepper = Stepper::new(solver, grid);
    grid.pairs().scan(noise, move |state, pair| {
        *state = denoiser.kept(stepper.step(state.clone(), pair, &mut velocity));
        Some(state.clone())
    })
}
