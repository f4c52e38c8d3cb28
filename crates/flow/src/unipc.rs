//! UniPC of second order with the B₂(h) solver, on predictions of the clean sample (Zhao et al., arXiv 2302.04867,
//! algorithms 5 and 7), as diffusers' `UniPCMultistepScheduler` runs it on flow-matching models.
//!
//! Each step evaluates the network once. What it finds first corrects the state that the step before predicted, and then
//! predicts the next one. With α = 1 − σ, λ = ln(α / σ) and x₀ the clean sample that a state and its velocity stand for.

use burn::tensor::Tensor;

/// The peer starts a millionth below pure noise, where ln α is finite.
const HIGHEST: f32 = 1.0 - 1e-6;

/// What a run remembers from step to step.
#[derive(Debug, Clone)]
pub(crate) struct UniPc<const D: usize> {
    /// The sigmas of the last two steps with the clean samples predicted there, the newest last.
    predictions: Vec<(f32, Tensor<D>)>,
    /// The corrected state that the last step began at, and that step's order.
    last: Option<(Tensor<D>, usize)>,
}

impl<const D: usize> UniPc<D> {
    pub(crate) fn new() -> Self {
        Self { predictions: Vec::new(), last: None }
    }

    /// As [`crate::sampler::Stepper::step`].
    pub(crate) fn step(
        &mut self,
        state: Tensor<D>,
        (sigma, next): (f32, f32),
        is_last: bool,
        mut velocity: impl FnMut(Tensor<D>, f32) -> Tensor<D>,
    ) -> Tensor<D> {
        let sigma = sigma.min(HIGHEST);
        let clean = state.clone() - velocity(state.clone(), sigma) * sigma;
        let state = match self.last.take() {
            None => state,
            Some((before, order)) => self.corrected(before, order, sigma, &clean),
        };
        self.predictions.drain(..self.predictions.len().saturating_sub(1));
        self.predictions.push((sigma, clean));
        // The first step remembers nothing, and the last one goes to the clean sample itself.
        let order = if is_last { 1 } else { self.predictions.len() };
        self.last = Some((state.clone(), order));
        self.predicted(state, order, next)
    }

    /// The state at `next`, UniP.
    fn predicted(&self, state: Tensor<D>, order: usize, next: f32) -> Tensor<D> {
        let (sigma, clean) = self.newest();
        let step = Step::between(*sigma, next);
        let predicted = step.first_order(state, clean);
        match order {
            1 => predicted,
            _ => predicted - self.slope(&step) * (step.scale() * 0.5) as f32,
        }
    }

    /// The state at `sigma` that began at `before`, once the clean sample there is known: UniC.
    fn corrected(&self, before: Tensor<D>, order: usize, sigma: f32, clean: &Tensor<D>) -> Tensor<D> {
        let (from, newest) = self.newest();
        let step = Step::between(*from, sigma);
        let corrected = step.first_order(before, newest);
        let change = clean.clone() - newest.clone();
        if order == 1 {
            return corrected - change * (step.scale() * 0.5) as f32;
        }
        let [by_slope, by_change] = step.weights(self.ratio(&step));
        corrected
            - self.slope(&step) * (step.scale() * by_slope) as f32
            - change * (step.scale() * by_change) as f32
    }

    fn newest(&self) -> &(f32, Tensor<D>) {
        self.predictions.last().expect("there is one after the first step")
    }

    /// How far the prediction before the newest lies behind it, in steps; negative.
    fn ratio(&self, step: &Step) -> f64 {
        let [(before, _), (from, _)] = &self.predictions[..] else {
            unreachable!("second order remembers two")
        };
        (lambda(*before) - lambda(*from)) / step.length
    }

    /// The change of the clean sample in one step, as the last two predictions have it.
    fn slope(&self, step: &Step) -> Tensor<D> {
        let difference = self.predictions[0].1.clone() - self.predictions[1].1.clone();
        difference / self.ratio(step) as f32
    }
}

/// One step from a sigma to a lower one.
struct Step {
    from: f64,
    to: f64,
    /// h, the difference of λ; infinite for a step to 0.
    length: f64,
}

impl Step {
    fn between(from: f32, to: f32) -> Self {
        Self { from: from.into(), to: to.into(), length: lambda(to) - lambda(from) }
    }

    /// e^(−h) − 1, which is B(−h) too.
    fn growth(&self) -> f64 {
        (-self.length).exp_m1()
    }

    /// α of the end, times B.
    fn scale(&self) -> f64 {
        (1.0 - self.to) * self.growth()
    }

    /// The exact solution for a clean sample that does not change.
    fn first_order<const D: usize>(&self, state: Tensor<D>, clean: &Tensor<D>) -> Tensor<D> {
        state * (self.to / self.from) as f32 - clean.clone() * self.scale() as f32
    }

    /// ρ of the slope behind, `ratio` steps away, and of the change to the end: the solution of
    /// ρ₁ + ρ₂ = b₁, ratio · ρ₁ + ρ₂ = b₂.
    fn weights(&self, ratio: f64) -> [f64; 2] {
        let (h, b) = (-self.length, self.growth());
        let phi_1 = b / h - 1.0;
        let phi_2 = phi_1 / h - 0.5;
        let (b_1, b_2) = (phi_1 / b, 2.0 * phi_2 / b);
        let by_slope = (b_1 - b_2) / (1.0 - ratio);
        [by_slope, b_1 - by_slope]
    }
}

fn lambda(sigma: f32) -> f64 {
    let sigma = f64::from(sigma);
    (1.0 - sigma).ln() - sigma.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::GaussianFlow;
    use crate::{SigmaGrid, Solver, sample};
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, random, values};

    const FLOW: GaussianFlow = GaussianFlow { mean: 0.7, deviation: 0.4 };

    /// From σ = 0.9, where all steps are of a like length in λ, to a σ that is not 0.
    fn largest_error(steps: usize) -> f32 {
        let start = random::<3>([2, 4, 8], 5, &Device::flex());
        let (first, last) = (lambda(0.9), lambda(0.04));
        let sigma = |at: usize| {
            let lambda = first + (last - first) * at as f64 / steps as f64;
            (1.0 / (1.0 + lambda.exp())) as f32
        };
        let grid = SigmaGrid::new((0..=steps).map(sigma).collect()).unwrap();
        let found = sample(Solver::UniPc, &grid, start.clone(), |x, sigma| FLOW.velocity(x, sigma));
        let expected = FLOW.transport(start, grid.as_slice()[0], grid.end());
        (found - expected).abs().max().into_scalar()
    }

    #[test]
    fn the_error_falls_at_least_fourfold_when_steps_double() {
        // The last step is of first order and is one of ever shorter ones: second order overall.
        let ratio = largest_error(10) / largest_error(20);
        assert!(ratio > 3.5, "{ratio}");
        assert!(largest_error(20) < 2e-3, "{}", largest_error(20));
    }

    #[test]
    fn two_steps_to_zero_equal_the_hand_computed_ones() {
        let device = Device::flex();
        let grid = SigmaGrid::new(vec![0.8, 0.5, 0.0]).unwrap();
        let start = Tensor::<2>::from_floats([[1.0]], &device);
        let mut clean = [0.5_f32, 0.3].into_iter();
        // Velocities that stand for clean samples of 0.5 and then 0.3.
        let end = sample(Solver::UniPc, &grid, start, |x, sigma| (x - clean.next().unwrap()) / sigma);
        // The last step goes to the last prediction, whatever was corrected.
        assert_close(&values(end), &[0.3], 1e-6);
    }

    #[test]
    fn a_correction_takes_half_of_the_change_at_first_order() {
        let device = Device::flex();
        let mut run = UniPc::<1>::new();
        let at = |value: f32| Tensor::<1>::from_floats([value], &device);
        let first = run.step(at(1.0), (0.8, 0.5), false, |x, sigma| (x - 0.5) / sigma);
        // σ 0.8 → 0.5: 0.5/0.8 · 1 − 0.5 · (e^(−h) − 1) · 0.5 with e^(−h) = (0.2/0.8)/(0.5/0.5) = 1/4.
        assert_close(&values(first.clone()), &[0.625 + 0.5 * 0.75 * 0.5], 1e-6);
        run.step(first, (0.5, 0.2), false, |x, sigma| (x - 0.3) / sigma);
        let (corrected, order) = run.last.unwrap();
        assert_eq!(order, 2);
        // Half of the change 0.3 − 0.5, times 0.5 · 0.75, on top.
        assert_close(&values(corrected), &[0.8125 + 0.5 * 0.75 * 0.5 * -0.2], 1e-6);
    }
}
