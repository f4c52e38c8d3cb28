//! Solvers of the sampling equation dx/ds = v(x, s), from noise at the first sigma of a grid to the picture
//! at its end.
//!
//! They are plain functions of tensors. Under autodiff the gradient runs through every step, at the memory of
//! all of them; [`crate::adjoint`] gives the same gradient at the memory of one.

use burn::tensor::Tensor;

use crate::SigmaGrid;
use crate::diffusion::{Prediction, scale};
use crate::unipc::UniPc;

/// How one step of the grid is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// x + h·v(x, s): one velocity per step, first order. What the peers' flow-matching pipelines use.
    #[default]
    Euler,
    /// The trapezoidal rule on an Euler prediction: two velocities per step, second order. The last step is
    /// Euler's, so that no network is asked about a sigma of 0 (EDM, arXiv 2206.00364, algorithm 1).
    Heun,
    /// The linear multi-step method on the noise of variance-preserving models (PNDM, arXiv 2202.09778, without its
    /// Runge-Kutta warm-up): one velocity per step and two in the first, which remembers nothing. For sampling alone: a
    /// few-step student is trained on, and runs, Euler's steps. A step from pure noise is Euler's too.
    Plms,
    /// The same of what angular models predict, which diffusers' PNDM foretells in the place of the noise.
    PlmsAngular,
    /// DDIM's steps where a scheduler's timesteps are not as far apart as it thinks (diffusers' `timestep_spacing` linspace
    /// or trailing): each ends where an equal part of all timesteps would, and the next takes the state for one of its
    /// own level. For sampling alone; Euler's where a grid knows no such ends.
    Ddim,
    /// UniPC, the multi-step predictor and corrector of second order (arXiv 2302.04867): one velocity per step. For
    /// sampling alone, as [`Solver::Plms`].
    UniPc,
}

/// Training timesteps from 0 to pure noise.
const TRAINING_TIMESTEPS: f64 = 1000.0;

impl Solver {
    /// The sigma that a network is told at a state of `sigma` on a grid. UniPC's scheduler in the peer hands on whole
    /// training timesteps, rounded down, while it computes with the sigma itself.
    pub fn told(self, grid: &SigmaGrid, sigma: f32) -> f32 {
        if self != Self::UniPc {
            return sigma;
        }
        if let Some(told) = grid.told_at(sigma) {
            return told;
        }
        let timestep = f64::from(sigma) * TRAINING_TIMESTEPS;
        let nearest = timestep.round();
        // The peer computes the timestep in f64: what the sigma's rounding to f32 took away is none.
        let whole = if (timestep - nearest).abs() < 1e-4 { nearest } else { timestep.floor() };
        (whole / TRAINING_TIMESTEPS) as f32
    }
}

/// Solves from `noise` to the picture at the end of the grid.
///
/// `velocity` is called with a state and its sigma.
///
/// # Shapes
/// `noise`, the states, the velocities and the result: `[B, …]`, equal.
pub fn sample<const D: usize>(
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<D>,
    mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
) -> Tensor<D> {
    let mut stepper = Stepper::new(solver, grid);
    grid.pairs().fold(noise, |state, pair| stepper.step(state, pair, &mut velocity))
}

/// Every state of [`sample`], the noise first and the picture last: one more than there are steps.
pub fn trajectory<const D: usize>(
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<D>,
    mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
) -> Vec<Tensor<D>> {
    let mut states = Vec::with_capacity(grid.steps() + 1);
    let (mut stepper, mut state) = (Stepper::new(solver, grid), noise);
    for pair in grid.pairs() {
        states.push(state.clone());
        state = stepper.step(state, pair, &mut velocity);
    }
    states.push(state);
    states
}

/// A run of a solver along a grid: what it remembers from step to step.
#[derive(Debug, Clone)]
pub struct Stepper<const D: usize> {
    solver: Solver,
    grid: SigmaGrid,
    /// The noise, or what the network predicted, of the last steps, the newest last. Of [`Solver::Plms`].
    predictions: Vec<Tensor<D>>,
    /// Of [`Solver::UniPc`].
    unipc: UniPc<D>,
}

impl<const D: usize> Stepper<D> {
    /// A run that has not begun.
    pub fn new(solver: Solver, grid: &SigmaGrid) -> Self {
        Self { solver, grid: grid.clone(), predictions: Vec::new(), unipc: UniPc::new() }
    }

    /// The next step, from a state at the first sigma of a pair of the grid to the second.
    ///
    /// # Shapes
    /// `state`, the velocities and the result: `[B, …]`, equal.
    pub fn step(
        &mut self,
        state: Tensor<D>,
        (sigma, next): (f32, f32),
        mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
    ) -> Tensor<D> {
        let is_last = next == self.grid.end();
        if self.solver == Solver::UniPc {
            return self.unipc.step(state, (sigma, next), is_last, velocity);
        }
        let slope = velocity(state.clone(), sigma);
        let slope = match self.solver {
            Solver::Euler => slope,
            Solver::Ddim => return self.landed(state, slope, (sigma, next)),
            Solver::Heun if is_last => slope,
            Solver::Heun => {
                let predicted = state.clone() + slope.clone() * (next - sigma);
                (slope + velocity(predicted, next)) * 0.5
            }
            Solver::Plms => self.multistep(Prediction::Noise, &state, slope, (sigma, next), velocity),
            Solver::PlmsAngular => {
                self.multistep(Prediction::Angular, &state, slope, (sigma, next), velocity)
            }
            Solver::UniPc => unreachable!("it makes its states by itself"),
        };
        state + slope * (next - sigma)
    }

    /// Euler's step to where the grid says it ends, seen as a variance-preserving state of the next level.
    fn landed(&self, state: Tensor<D>, slope: Tensor<D>, (sigma, next): (f32, f32)) -> Tensor<D> {
        match self.grid.landing_before(next) {
            None => state + slope * (next - sigma),
            Some(landing) => (state + slope * (landing - sigma)) * (scale(next) / scale(landing)),
        }
    }

    /// The slope that the predictions of the last four steps foretell, Adams and Bashforth's. The first step, which
    /// remembers nothing, takes the mean of the predictions at both of its ends.
    fn multistep(
        &mut self,
        kind: Prediction,
        state: &Tensor<D>,
        slope: Tensor<D>,
        (sigma, next): (f32, f32),
        mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
    ) -> Tensor<D> {
        if sigma == 1.0 {
            return slope; // all of the state is noise there, whatever the slope
        }
        self.predictions.drain(..self.predictions.len().saturating_sub(3));
        self.predictions.push(kind.of_velocity(slope.clone(), state, sigma));
        let foretold = match self.predictions.as_slice() {
            [only] if next == self.grid.end() => only.clone(),
            [only] => {
                let there = state.clone() + slope * (next - sigma);
                let slope_there = velocity(there.clone(), next);
                (only.clone() + kind.of_velocity(slope_there, &there, next)) * 0.5
            }
            predictions => {
                let weighted = predictions.iter().rev().zip(adams_bashforth(predictions.len()));
                weighted
                    .map(|(prediction, weight)| prediction.clone() * *weight)
                    .reduce(|sum, prediction| sum + prediction)
                    .expect("two or more")
            }
        };
        let sigmas = Tensor::full([state.dims()[0]], sigma, &state.device());
        kind.velocity(foretold, state.clone(), sigmas)
    }
}

/// Weights of the last values of equally long steps, the newest first.
fn adams_bashforth(order: usize) -> &'static [f32] {
    match order {
        2 => &[3.0 / 2.0, -1.0 / 2.0],
        3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::GaussianFlow;
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, assert_tensors_close, random, values};

    const FLOW: GaussianFlow = GaussianFlow { mean: 0.7, deviation: 0.4 };

    fn largest_error(solver: Solver, steps: usize) -> f32 {
        let noise = random::<3>([2, 4, 8], 5, &Device::flex());
        let grid = SigmaGrid::uniform(steps).unwrap();
        let picture = sample(solver, &grid, noise.clone(), |x, sigma| FLOW.velocity(x, sigma));
        (picture - FLOW.transport(noise, 1.0, 0.0)).abs().max().into_scalar()
    }

    #[test]
    fn euler_error_halves_when_steps_double() {
        // Exactly 2 in the limit of many steps; the second-order part of the error still shows at 100 steps.
        let ratio = largest_error(Solver::Euler, 100) / largest_error(Solver::Euler, 200);
        assert!((ratio - 2.0).abs() < 0.1, "{ratio}");
    }

    #[test]
    fn heun_error_falls_fourfold_when_steps_double() {
        // Exactly 4 in the limit; beyond 100 steps f32 rounding would enter.
        let ratio = largest_error(Solver::Heun, 40) / largest_error(Solver::Heun, 80);
        assert!((ratio - 4.0).abs() < 0.4, "{ratio}");
    }

    #[test]
    fn many_heun_steps_end_on_the_exact_solution() {
        // Extrapolated from the error at 80 steps by the order above, plus rounding of 400 f32 additions.
        let error = largest_error(Solver::Heun, 400);
        assert!(error < 2e-5, "{error}");
    }

    #[test]
    fn two_heun_steps_equal_the_hand_computed_ones() {
        let device = Device::flex();
        let grid = SigmaGrid::new(vec![1.0, 0.5, 0.0]).unwrap();
        let noise = Tensor::<2>::from_floats([[1.0]], &device);
        let picture = sample(Solver::Heun, &grid, noise, |x, sigma| x * sigma);
        // v = s·x. Slopes 1 and 0.5·0.5 give 1 − 0.25·1.25 = 0.6875; then Euler: 0.6875·(1 − 0.5·0.5).
        assert_close(&values(picture), &[0.515625], 0.0);
    }

    #[test]
    fn unipc_tells_whole_timesteps_rounded_down() {
        let grid = SigmaGrid::uniform(1).unwrap();
        let told = |sigma| Solver::UniPc.told(&grid, sigma) * 1000.0;
        // diffusers' of 4 steps with a shift of 3.
        let found = [0.999_999, 0.900_119_96, 0.750_374_8, 0.500_999].map(told);
        assert_close(&found, &[999.0, 900.0, 750.0, 500.0], 1e-4);
        assert_close(&[told(0.667)], &[667.0], 1e-4);
        assert_eq!(Solver::Euler.told(&grid, 0.123_456), 0.123_456);
    }

    #[test]
    fn a_trajectory_holds_noise_every_state_and_the_picture() {
        let noise = random::<2>([2, 3], 9, &Device::flex());
        let grid = SigmaGrid::uniform(3).unwrap();
        for solver in [Solver::Euler, Solver::Heun] {
            let mut sigmas = vec![];
            let states = trajectory(solver, &grid, noise.clone(), |x, sigma| {
                sigmas.push(sigma);
                FLOW.velocity(x, sigma)
            });
            let picture = sample(solver, &grid, noise.clone(), |x, sigma| FLOW.velocity(x, sigma));
            assert_eq!(states.len(), 4);
            assert_eq!(sigmas.len(), if solver == Solver::Euler { 3 } else { 5 });
            assert!(sigmas.iter().all(|&sigma| sigma > 0.0));
            assert_tensors_close(states[0].clone(), noise.clone(), 0.0);
            assert_tensors_close(states[3].clone(), picture, 0.0);
        }
    }
}
