//! The exact gradient of a loss on the sampled picture, through all Euler steps, at the memory of one.
//!
//! For x_{k+1} = x_k + (s_{k+1} − s_k)·v(x_k, s_k) and a = ∂L/∂x_{N+1}, each step is visited from the last to
//! the first: one vector-Jacobian product through v(x_k, s_k) with cotangent (s_{k+1} − s_k)·a gives the step's
//! share of the parameter gradient, and its input part is added to a. This is the chain rule itself, not a
//! continuous approximation: it equals the gradient of the plain tape. Costs 2N velocities and N backwards, and a
//! velocity less where the last step is taken on a [`Linearization`] that its product then uses; beyond one step's
//! graph, only the N states are kept, which are as small as the noise.

use burn::tensor::{Gradients, Tensor};
use fewstep_kernels::inject;

use crate::{SigmaGrid, Solver, trajectory};

/// The states x_1 … x_{N+1} of an Euler run, the noise first and the picture last.
///
/// `velocity` must not record a graph, or the memory that [`backward`] saves is spent here.
///
/// # Shapes
/// `noise`, states and velocities: `[B, …]`, equal.
pub fn rollout<const D: usize>(
    grid: &SigmaGrid,
    noise: Tensor<D>,
    velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
) -> Vec<Tensor<D>> {
    trajectory(Solver::Euler, grid, noise, velocity)
}

/// Carries the gradient of the loss by the picture back through every step; returns the one by the noise.
///
/// `vjp(step, state, sigma, cotangent)` is called for the last step first. It rebuilds the velocity at
/// `state` with a graph, keeps the parameter part of the product with `cotangent` for itself, and returns the
/// input part; [`pull_back`] does this. `step` counts from 0.
///
/// # Shapes
/// `states` (all that [`rollout`] returned, or all but the picture), `loss_gradient`, cotangents and the
/// result: `[B, …]`, equal.
pub fn backward<const D: usize>(
    grid: &SigmaGrid,
    states: &[Tensor<D>],
    loss_gradient: Tensor<D>,
    mut vjp: impl FnMut(usize, Tensor<D>, f32, Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    assert!(states.len() >= grid.steps(), "{} states for {} steps", states.len(), grid.steps());
    grid.pairs().enumerate().rev().fold(loss_gradient, |gradient, (step, (sigma, next))| {
        let cotangent = gradient.clone() * (next - sigma);
        gradient + vjp(step, states[step].clone(), sigma, cotangent)
    })
}

/// What a vector-Jacobian product leaves behind.
pub struct PullBack<const D: usize> {
    /// The product with the Jacobian by the state; carries no graph.
    pub input_gradient: Tensor<D>,
    /// The products with the Jacobians by all parameters that took part.
    pub parameters: Gradients,
}

/// A velocity at one state with its graph, which waits for a cotangent.
pub struct Linearization<const D: usize> {
    state: Tensor<D>,
    velocity: Tensor<D>,
}

impl<const D: usize> Linearization<D> {
    /// Runs `velocity` at `state` with a graph.
    ///
    /// # Shapes
    /// `state` and the velocity: `[B, …]`, equal.
    pub fn at(state: Tensor<D>, velocity: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Self {
        let state = state.inner().autodiff().require_grad();
        Self { velocity: velocity(state.clone()), state }
    }

    /// The velocity's values.
    pub fn velocity(&self) -> Tensor<D> {
        self.velocity.clone().inner()
    }

    /// The vector-Jacobian product with a cotangent of the velocity's shape.
    pub fn pull_back(self, cotangent: Tensor<D>) -> PullBack<D> {
        let Self { state, velocity } = self;
        let mut parameters = inject(velocity, cotangent).backward();
        // A velocity that ignores its state has no gradient there, which is a gradient of zero.
        let input_gradient = state.grad_remove(&mut parameters).unwrap_or_else(|| state.inner().zeros_like());
        PullBack { input_gradient, parameters }
    }
}

/// One vector-Jacobian product through a velocity: runs it at `state` with a graph and hands `cotangent` to
/// its output.
///
/// # Shapes
/// `state`, `cotangent`, the velocity and the input gradient: `[B, …]`, equal.
pub fn pull_back<const D: usize>(
    state: Tensor<D>,
    cotangent: Tensor<D>,
    velocity: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> PullBack<D> {
    Linearization::at(state, velocity).pull_back(cotangent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, activation::tanh};
    use fewstep_testkit::{assert_close, finite_difference, random, values};

    const WIDTH: usize = 6;

    /// v(x, s) = tanh(x W)·U·(0.5 + s) − s·x, a small nonlinear network with two parameters.
    #[derive(Clone)]
    struct Net {
        inner: Tensor<2>,
        outer: Tensor<2>,
    }

    impl Net {
        fn new(device: &Device) -> Self {
            let weight = |seed| random::<2>([WIDTH, WIDTH], seed, device) * 0.6;
            Self { inner: weight(1), outer: weight(2) }
        }

        fn tracked(self) -> Self {
            let track = |weight: Tensor<2>| weight.autodiff().require_grad();
            Self { inner: track(self.inner), outer: track(self.outer) }
        }

        fn velocity(&self, x: Tensor<2>, sigma: f32) -> Tensor<2> {
            tanh(x.clone().matmul(self.inner.clone())).matmul(self.outer.clone()) * (0.5 + sigma) - x * sigma
        }
    }

    fn noise() -> Tensor<2> {
        random([3, WIDTH], 3, &Device::flex())
    }

    fn target() -> Tensor<2> {
        random([3, WIDTH], 4, &Device::flex())
    }

    fn grid() -> SigmaGrid {
        SigmaGrid::new(vec![1.0, 0.8, 0.55, 0.2, 0.0]).unwrap()
    }

    /// Gradients by inner weight, outer weight and noise.
    type ThreeGradients = [Vec<f32>; 3];

    fn by_tape() -> ThreeGradients {
        let net = Net::new(&Device::flex()).tracked();
        let noise = noise().autodiff().require_grad();
        let picture = crate::sample(Solver::Euler, &grid(), noise.clone(), |x, sigma| net.velocity(x, sigma));
        let gradients = (picture - target().autodiff()).square().mean().backward();
        [net.inner, net.outer, noise].map(|leaf| values(leaf.grad(&gradients).unwrap()))
    }

    fn by_adjoint() -> ThreeGradients {
        let plain = Net::new(&Device::flex());
        let net = plain.clone().tracked();
        let states = rollout(&grid(), noise(), |x, sigma| plain.velocity(x, sigma));
        let picture = states[grid().steps()].clone();
        let loss_gradient = (picture - target()) * (2.0 / (3 * WIDTH) as f32);
        let mut sums = [plain.inner.zeros_like(), plain.outer.zeros_like()];
        let by_noise = backward(&grid(), &states, loss_gradient, |_, state, sigma, cotangent| {
            let product = pull_back(state, cotangent, |x| net.velocity(x, sigma));
            for (sum, leaf) in sums.iter_mut().zip([&net.inner, &net.outer]) {
                *sum = sum.clone() + leaf.grad(&product.parameters).unwrap();
            }
            product.input_gradient
        });
        let [inner, outer] = sums;
        [values(inner), values(outer), values(by_noise)]
    }

    fn largest(x: &[f32]) -> f32 {
        x.iter().fold(0.0, |largest, value| largest.max(value.abs()))
    }

    #[test]
    fn the_adjoint_gradient_equals_the_plain_tape() {
        for (adjoint, tape) in by_adjoint().iter().zip(&by_tape()) {
            // The same sums in another order: some ten roundings relative to the largest element.
            assert_close(adjoint, tape, 1e-6 * largest(tape));
        }
    }

    /// The loss at given weights and noise, without any autodiff.
    fn loss(inner: &[f32], outer: &[f32], noise: &[f32]) -> f64 {
        let tensor = |x: &[f32]| Tensor::<1>::from_floats(x, &Device::flex()).reshape([-1, WIDTH as i32]);
        let net = Net { inner: tensor(inner), outer: tensor(outer) };
        let picture = crate::sample(Solver::Euler, &grid(), tensor(noise), |x, sigma| net.velocity(x, sigma));
        let errors = values(picture - target());
        errors.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>() / errors.len() as f64
    }

    #[test]
    fn the_adjoint_gradient_equals_finite_differences() {
        let net = Net::new(&Device::flex());
        let point = [values(net.inner), values(net.outer), values(noise())];
        for (which, gradient) in by_adjoint().iter().enumerate() {
            let direction = fewstep_testkit::random_values(gradient.len(), 40 + which as u64);
            let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let loss_along = |x: &[f32]| {
                let mut at = point.clone();
                at[which] = x.to_vec();
                loss(&at[0], &at[1], &at[2])
            };
            let difference = finite_difference(loss_along, &point[which], &direction, 3e-3);
            // The loss is of order 1 with f32 states: rounding 1e-7 over a step of 6e-3, plus the cubic term.
            assert!(
                (slope - difference).abs() < 1e-3 * slope.abs().max(1.0),
                "{which}: {slope}, {difference}"
            );
        }
    }

    #[test]
    fn a_velocity_that_ignores_its_state_passes_the_gradient_on() {
        let weight = Tensor::<2>::from_floats([[2.0, -1.0]], &Device::flex()).autodiff().require_grad();
        let zeros = Tensor::<2>::zeros([1, 2], &Device::flex());
        let mut by_weight = zeros.clone();
        let loss_gradient = Tensor::<2>::from_floats([[1.0, 3.0]], &Device::flex());
        let states = vec![zeros; grid().steps()];
        let by_noise = backward(&grid(), &states, loss_gradient, |_, state, _, cotangent| {
            let product = pull_back(state, cotangent, |_| weight.clone() * 1.0);
            by_weight = by_weight.clone() + weight.grad(&product.parameters).unwrap();
            product.input_gradient
        });
        assert_close(&values(by_noise), &[1.0, 3.0], 0.0);
        // picture = noise + (0 − 1)·weight, whatever the grid between.
        assert_close(&values(by_weight), &[-1.0, -3.0], 1e-6);
    }

    #[test]
    fn steps_are_visited_backwards_with_their_own_state_and_sigma() {
        let device = Device::flex();
        let states: Vec<Tensor<1>> = (0..4).map(|k| Tensor::full([1], k as f32, &device)).collect();
        let mut visits = vec![];
        backward(&grid(), &states, Tensor::ones([1], &device), |step, state, sigma, cotangent| {
            visits.push((step, values(state)[0], sigma));
            cotangent * 0.0
        });
        assert_eq!(visits, [(3, 3.0, 0.2), (2, 2.0, 0.55), (1, 1.0, 0.8), (0, 0.0, 1.0)]);
    }
}
