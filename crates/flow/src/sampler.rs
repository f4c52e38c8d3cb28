//! Solvers of the sampling equation dx/ds = v(x, s), from noise at the first sigma of a grid to the picture
//! at 0.
//!
//! They are plain functions of tensors. Under autodiff the gradient runs through every step, at the memory of
//! all of them; [`crate::adjoint`] gives the same gradient at the memory of one.

use burn::tensor::Tensor;

use crate::SigmaGrid;

/// How one step of the grid is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// x + h·v(x, s): one velocity per step, first order. What the peers' flow-matching pipelines use.
    #[default]
    Euler,
    /// The trapezoidal rule on an Euler prediction: two velocities per step, second order. The last step is
    /// Euler's, so that no network is asked about a sigma of 0 (EDM, arXiv 2206.00364, algorithm 1).
    Heun,
}

/// Solves from `noise` to the picture at sigma 0.
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
    grid.pairs().fold(noise, |state, pair| step(solver, state, pair, &mut velocity))
}

/// Every state of [`sample`], the noise first and the picture last: one more than there are steps.
pub fn trajectory<const D: usize>(
    solver: Solver,
    grid: &SigmaGrid,
    noise: Tensor<D>,
    mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
) -> Vec<Tensor<D>> {
    let mut states = Vec::with_capacity(grid.steps() + 1);
    let mut state = noise;
    for pair in grid.pairs() {
        states.push(state.clone());
        state = step(solver, state, pair, &mut velocity);
    }
    states.push(state);
    states
}

/// One step of [`sample`], from a state at the first sigma of a pair to the second.
///
/// # Shapes
/// `state`, the velocities and the result: `[B, …]`, equal.
pub fn step<const D: usize>(
    solver: Solver,
    state: Tensor<D>,
    (sigma, next): (f32, f32),
    mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
) -> Tensor<D> {
    let slope = velocity(state.clone(), sigma);
    let predicted = state.clone() + slope.clone() * (next - sigma);
    if solver == Solver::Euler || next == 0.0 {
        return predicted;
    }
    let slope_there = velocity(predicted, next);
    state + (slope + slope_there) * (0.5 * (next - sigma))
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
