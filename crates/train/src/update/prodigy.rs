//! Prodigy (arXiv 2306.06101): AdamW whose rate is an estimate of the distance to the solution, times the rate given.
//!
//! The numbers of `prodigyopt.Prodigy` with `use_bias_correction`, `safeguard_warmup` and decoupled decay, as its
//! authors advise for diffusion models.

use fewstep_kernels::{AdamW, Moments};
use rayon::prelude::*;

use super::{PIECE, Step};

/// The estimate before the first step; it grows from there.
const FIRST_ESTIMATE: f64 = 1e-6;

/// The settings, and what is shared by all parameters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prodigy {
    pub(crate) adamw: AdamW,
    /// Factor of the estimate.
    pub(crate) coefficient: f64,
    pub(crate) estimate: Estimate,
    /// Of the step that is under way; none where all gradients are zero.
    rates: Option<Rates>,
}

/// The distance to the solution, and what it is computed from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) distance: f64,
    pub(crate) largest: f64,
    pub(crate) numerator: f64,
}

/// What is remembered of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct Travelled {
    pub(crate) moments: Moments,
    /// Running sum of gradients.
    pub(crate) sum: Vec<f32>,
    /// Where the parameter began.
    pub(crate) start: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Rates {
    step: f32,
    epsilon: f32,
    decay: f64,
}

/// What a parameter adds to the estimate's fraction.
#[derive(Clone, Copy, Default)]
pub(crate) struct Fraction {
    numerator: f64,
    denominator: f64,
}

impl std::ops::AddAssign for Fraction {
    fn add_assign(&mut self, other: Self) {
        self.numerator += other.numerator;
        self.denominator += other.denominator;
    }
}

impl Default for Estimate {
    fn default() -> Self {
        Self { distance: FIRST_ESTIMATE, largest: FIRST_ESTIMATE, numerator: 0.0 }
    }
}

impl Travelled {
    /// Before the first step.
    pub(crate) fn from(start: &[f32]) -> Self {
        Self { moments: Moments::zeros(start.len()), sum: vec![0.0; start.len()], start: start.to_vec() }
    }
}

impl Prodigy {
    /// With the first estimate.
    pub(crate) fn new(adamw: AdamW, coefficient: f64) -> Self {
        Self { adamw, coefficient, estimate: Estimate::default(), rates: None }
    }

    /// The first half of a step for one parameter: takes its gradient into moments and sum.
    pub(crate) fn take_in(
        &self,
        parameter: &[f32],
        gradient: &[f32],
        travelled: &mut Travelled,
        at: &Step,
    ) -> Fraction {
        let weights = Weights::new(self, at);
        let Travelled { moments, sum, start } = travelled;
        let values = parameter.par_chunks(PIECE).zip(gradient.par_chunks(PIECE)).zip(start.par_chunks(PIECE));
        let [first, second] = moments.on_host().map(|moment| moment.par_chunks_mut(PIECE));
        let pieces: Vec<Fraction> = values
            .zip(first.zip(second))
            .zip(sum.par_chunks_mut(PIECE))
            .map(|((((parameter, gradient), start), (first, second)), sum)| {
                weights.take_in([parameter, gradient, start], [first, second, sum])
            })
            .collect();
        let mut total = Fraction::default();
        pieces.into_iter().for_each(|piece| total += piece);
        total.numerator *= self.estimate.distance / FIRST_ESTIMATE * self.rate(at);
        total
    }

    /// Between the halves: the estimate after all parameters' gradients.
    pub(crate) fn advance(&mut self, total: Fraction, at: &Step) {
        self.rates = None;
        if total.denominator == 0.0 {
            return;
        }
        let rate = self.rate(at);
        let estimate = &mut self.estimate;
        estimate.numerator = estimate.numerator * self.adamw.beta_2.sqrt() + total.numerator;
        let found = self.coefficient * estimate.numerator / total.denominator;
        if estimate.distance == FIRST_ESTIMATE {
            estimate.distance = estimate.distance.max(found);
        }
        estimate.largest = estimate.largest.max(found);
        estimate.distance = estimate.largest;
        self.rates = Some(Rates {
            step: rate as f32,
            epsilon: (estimate.distance * self.adamw.epsilon) as f32,
            decay: rate,
        });
    }

    /// The second half: moves the parameter.
    pub(crate) fn apply(&self, parameter: &mut [f32], travelled: &Travelled, weight_decay: f64) {
        let Some(Rates { step, epsilon, decay }) = self.rates else { return };
        let keep = (1.0 - decay * weight_decay) as f32;
        let [first, second] = travelled.moments.read();
        let moments = first.par_chunks(PIECE).zip(second.par_chunks(PIECE));
        parameter.par_chunks_mut(PIECE).zip(moments).for_each(|(parameter, (first, second))| {
            for ((parameter, first), second) in parameter.iter_mut().zip(first).zip(second) {
                *parameter = *parameter * keep - step * (first / (second.sqrt() + epsilon));
            }
        });
    }

    /// The step size: estimate · given rate, with Adam's correction for the moments' start at zero.
    fn rate(&self, at: &Step) -> f64 {
        let correction = |beta: f64| 1.0 - beta.powf(at.number as f64);
        let corrected = correction(self.adamw.beta_2).sqrt() / correction(self.adamw.beta_1);
        self.estimate.distance * at.learning_rate * corrected
    }
}

/// The factors of the first half of a step.
struct Weights {
    gradient_scale: f32,
    first: [f32; 2],
    second: [f32; 2],
    sum: [f32; 2],
}

impl Weights {
    fn new(prodigy: &Prodigy, at: &Step) -> Self {
        let (adamw, distance) = (&prodigy.adamw, prodigy.estimate.distance);
        Self {
            gradient_scale: at.gradient_scale,
            first: [adamw.beta_1 as f32, (distance * (1.0 - adamw.beta_1)) as f32],
            second: [adamw.beta_2 as f32, (distance * distance * (1.0 - adamw.beta_2)) as f32],
            sum: [adamw.beta_2.sqrt() as f32, (distance / FIRST_ESTIMATE * distance) as f32],
        }
    }

    fn take_in(
        &self,
        [parameter, gradient, start]: [&[f32]; 3],
        [first, second, sum]: [&mut [f32]; 3],
    ) -> Fraction {
        let mut fraction = Fraction::default();
        let follow =
            |value: &mut f32, [keep, weight]: [f32; 2], new: f32| *value = *value * keep + weight * new;
        for (index, gradient) in gradient.iter().enumerate() {
            let gradient = gradient * self.gradient_scale;
            fraction.numerator += f64::from(gradient) * f64::from(start[index] - parameter[index]);
            follow(&mut first[index], self.first, gradient);
            follow(&mut second[index], self.second, gradient * gradient);
            follow(&mut sum[index], self.sum, gradient);
            fraction.denominator += f64::from(sum[index].abs());
        }
        fraction
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum of |w − target| has the gradient sign(w − target); the paper's claim is that the estimate reaches
    /// the order of the distance from the start, which here is 5.
    #[test]
    fn the_estimate_grows_to_the_order_of_the_distance_and_no_further() {
        let mut prodigy = Prodigy::new(AdamW { weight_decay: 0.0, ..AdamW::default() }, 1.0);
        let mut parameter = vec![0.0_f32; 3];
        let mut travelled = Travelled::from(&parameter);
        let targets = [5.0, -5.0, 5.0];
        for number in 1..=400 {
            let at = Step { learning_rate: 1.0, gradient_scale: 1.0, number, weight_decay: 0.0 };
            let gradient: Vec<f32> =
                parameter.iter().zip(targets).map(|(value, target)| (value - target).signum()).collect();
            let total = prodigy.take_in(&parameter, &gradient, &mut travelled, &at);
            prodigy.advance(total, &at);
            prodigy.apply(&mut parameter, &travelled, 0.0);
        }
        let distance = prodigy.estimate.distance;
        assert!((0.5..=5.0).contains(&distance), "estimate {distance}");
        for (value, target) in parameter.iter().zip(targets) {
            assert!((value - target).abs() < 1.0, "{value} is not near {target}");
        }
    }

    #[test]
    fn zero_gradients_move_nothing() {
        let mut prodigy = Prodigy::new(AdamW::default(), 1.0);
        let mut parameter = vec![2.0];
        let mut travelled = Travelled::from(&parameter);
        let at = Step { learning_rate: 1.0, gradient_scale: 1.0, number: 1, weight_decay: 0.5 };
        let total = prodigy.take_in(&parameter, &[0.0], &mut travelled, &at);
        prodigy.advance(total, &at);
        prodigy.apply(&mut parameter, &travelled, at.weight_decay);
        assert_eq!((parameter, prodigy.estimate), (vec![2.0], Estimate::default()));
    }
}
