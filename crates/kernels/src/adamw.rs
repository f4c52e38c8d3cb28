//! The optimiser's and the moving average's element-wise work.

use std::borrow::Cow;

use burn::tensor::{Device, Tensor};

use crate::extension::{Values, is_fused};
use crate::{parallel, plain, simd};

/// Elements of one piece of work.
const PIECE: usize = 16 * 1024;

/// Adam with decoupled weight decay (arXiv 1711.05101), with the numbers of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Fraction of the parameter taken off in a step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// torch's defaults.
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 }
    }
}

/// Running moments of one parameter's gradient and of its square, in its row-major order.
#[derive(Clone, Debug)]
pub enum Moments {
    /// In host memory, before the first step and for parameters on the CPU.
    Host([Vec<f32>; 2]),
    /// On the parameter's device.
    Device(Box<[Tensor<1>; 2]>),
}

impl Moments {
    /// The moments before the first step, of a parameter of `len` elements.
    pub fn zeros(len: usize) -> Self {
        Self::Host([(); 2].map(|()| vec![0.0; len]))
    }

    /// Both for reading; from a device they are copied.
    pub fn read(&self) -> [Cow<'_, [f32]>; 2] {
        match self {
            Self::Host(moments) => moments.each_ref().map(|moment| moment.into()),
            Self::Device(moments) => moments.each_ref().map(|moment| plain::download(moment.clone()).into()),
        }
    }

    /// Both for work on the host, where they stay.
    pub fn on_host(&mut self) -> [&mut [f32]; 2] {
        if let Self::Device(moments) = self {
            *self = Self::Host(moments.each_ref().map(|moment| plain::download(moment.clone())));
        }
        match self {
            Self::Host(moments) => moments.each_mut().map(Vec::as_mut_slice),
            Self::Device(_) => unreachable!("they were read back above"),
        }
    }

    /// Both on a device.
    pub(crate) fn into_tensors(self, device: &Device) -> [Tensor<1>; 2] {
        match self {
            Self::Host(moments) => moments.map(|moment| Tensor::from_data(moment.as_slice(), device)),
            Self::Device(moments) => *moments,
        }
    }
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Step size.
    pub learning_rate: f64,
    /// Multiplies the gradient first, as clipping does; 1 leaves it alone.
    pub gradient_scale: f32,
    /// Number of this step, counted from 1.
    pub step: u64,
}

impl AdamW {
    /// The parameter after one step; `moments` move along.
    ///
    /// Works in place if nobody else holds the parameter's values. Takes the parameter without its autodiff history
    /// (`inner`) and gives it back without.
    pub fn step<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        moments: &mut Moments,
        at: AdamWStep,
    ) -> Tensor<D> {
        assert!(!parameter.device().is_autodiff(), "the optimiser takes parameters without autodiff history");
        assert_eq!(parameter.dims(), gradient.dims(), "parameter and gradient");
        assert!(at.step > 0, "steps are counted from 1");
        if !is_fused(&parameter) {
            return plain::adamw_step(self, parameter, gradient, moments, at);
        }
        let gradient = Values::detached(gradient);
        let mut parameter = Values::detached(parameter);
        self.update(parameter.as_mut_slice(), &gradient, moments, at);
        parameter.into_tensor()
    }

    fn update(&self, parameter: &mut [f32], gradient: &[f32], moments: &mut Moments, at: AdamWStep) {
        let factors = Factors::new(self, at);
        let len = parameter.len();
        let moments = moments.on_host();
        assert_eq!(moments.each_ref().map(|moment| moment.len()), [len; 2], "moments of {len} elements");
        let [first, second] = moments.map(|moment| moment.chunks_mut(PIECE));
        let work = parameter.chunks_mut(PIECE).zip(gradient.chunks(PIECE)).zip(first.zip(second));
        parallel::for_each(work, |((parameter, gradient), (first, second))| {
            simd::vectorized(
                #[inline(always)]
                || factors.update(parameter, gradient, first, second),
            );
        });
    }
}

/// The constants of one step, computed in double precision and rounded once, as torch does.
pub(crate) struct Factors {
    pub(crate) gradient_scale: f32,
    pub(crate) decay: f32,
    pub(crate) first_weight: f32,
    pub(crate) second_keep: f32,
    pub(crate) second_weight: f32,
    pub(crate) root_correction: f32,
    pub(crate) epsilon: f32,
    pub(crate) step_size: f32,
}

impl Factors {
    pub(crate) fn new(options: &AdamW, at: AdamWStep) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(at.step as f64);
        Self {
            gradient_scale: at.gradient_scale,
            decay: (1.0 - at.learning_rate * options.weight_decay) as f32,
            first_weight: (1.0 - options.beta_1) as f32,
            second_keep: options.beta_2 as f32,
            second_weight: (1.0 - options.beta_2) as f32,
            root_correction: correction(options.beta_2).sqrt() as f32,
            epsilon: options.epsilon as f32,
            step_size: (at.learning_rate / correction(options.beta_1)) as f32,
        }
    }

    #[inline(always)]
    pub(crate) fn update(
        &self,
        parameter: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        for (((parameter, gradient), first), second) in
            parameter.iter_mut().zip(gradient).zip(first).zip(second)
        {
            let gradient = gradient * self.gradient_scale;
            *first += self.first_weight * (gradient - *first);
            *second = *second * self.second_keep + self.second_weight * gradient * gradient;
            let root = second.sqrt() / self.root_correction + self.epsilon;
            *parameter = *parameter * self.decay - self.step_size * (*first / root);
        }
    }
}

/// `average += weight · (parameter - average)`, the step of an exponential moving average.
pub fn lerp_in_place(average: &mut [f32], parameter: &[f32], weight: f32) {
    assert_eq!(average.len(), parameter.len(), "average and parameter");
    parallel::for_each(average.chunks_mut(PIECE).zip(parameter.chunks(PIECE)), |(average, parameter)| {
        simd::vectorized(
            #[inline(always)]
            || {
                for (average, parameter) in average.iter_mut().zip(parameter) {
                    *average += weight * (parameter - *average);
                }
            },
        );
    });
}

/// `total + more`, in the memory of `total` if nobody else holds it.
///
/// # Shapes
/// Equal, outside of any graph.
pub fn added<const D: usize>(total: Tensor<D>, more: Tensor<D>) -> Tensor<D> {
    assert_eq!(total.dims(), more.dims(), "terms of a sum");
    if !is_fused(&total) {
        return total + more;
    }
    let (mut total, more) = (Values::detached(total), Values::detached(more));
    add_in_place(total.as_mut_slice(), &more);
    total.into_tensor()
}

/// `total += more`
pub(crate) fn add_in_place(total: &mut [f32], more: &[f32]) {
    parallel::for_each(total.chunks_mut(PIECE).zip(more.chunks(PIECE)), |(total, more)| {
        simd::vectorized(
            #[inline(always)]
            || simd::add_to(total, more),
        );
    });
}

/// Sum of squares over any number of tensors; from a device it is read back once.
///
/// On the CPU it is summed in double precision and in a fixed order, elsewhere in f32 within each tensor.
#[derive(Debug, Default)]
pub struct SquaredNorm {
    read: f64,
    /// One number of each tensor.
    unread: Vec<Tensor<1>>,
}

impl SquaredNorm {
    /// Takes in the elements of `x`, which is outside of any graph.
    pub fn add<const D: usize>(&mut self, x: Tensor<D>) {
        if !is_fused(&x) {
            self.unread.push(plain::squared_norm(x));
            return;
        }
        let values = Values::detached(x);
        let partial = parallel::map(values.chunks(PIECE), |piece| simd::vectorized(|| squares(piece)));
        self.read += partial.iter().sum::<f64>();
    }

    /// The sum.
    pub fn total(self) -> f64 {
        if self.unread.is_empty() {
            return self.read;
        }
        let unread = plain::download(Tensor::cat(self.unread, 0));
        self.read + unread.into_iter().map(f64::from).sum::<f64>()
    }
}

#[inline(always)]
fn squares(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0_f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|value| f64::from(*value).powi(2)).sum();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::with_plain_twins;
    use fewstep_testkit::{assert_close, random, random_values, values};

    const LEN: usize = PIECE + 37;

    fn step_at(step: u64) -> AdamWStep {
        AdamWStep { learning_rate: 3e-3 / step as f64, gradient_scale: 0.25, step }
    }

    /// The update rule as torch documents it, in double precision.
    fn reference(
        options: &AdamW,
        parameter: &mut [f64],
        moments: &mut [[f64; 2]],
        gradient: &[f32],
        at: AdamWStep,
    ) {
        for ((parameter, moments), gradient) in parameter.iter_mut().zip(moments).zip(gradient) {
            let gradient = f64::from(*gradient) * f64::from(at.gradient_scale);
            *parameter -= at.learning_rate * options.weight_decay * *parameter;
            moments[0] = options.beta_1 * moments[0] + (1.0 - options.beta_1) * gradient;
            moments[1] = options.beta_2 * moments[1] + (1.0 - options.beta_2) * gradient * gradient;
            let first = moments[0] / (1.0 - options.beta_1.powf(at.step as f64));
            let second = moments[1] / (1.0 - options.beta_2.powf(at.step as f64));
            *parameter -= at.learning_rate * first / (second.sqrt() + options.epsilon);
        }
    }

    type Step = fn(&AdamW, Tensor<1>, Tensor<1>, &mut Moments, AdamWStep) -> Tensor<1>;

    #[test]
    fn five_steps_follow_torch_in_both_versions() {
        let options = AdamW { beta_2: 0.95, weight_decay: 0.1, ..AdamW::default() };
        for step in [AdamW::step as Step, plain::adamw_step as Step] {
            let start = random_values(LEN, 1);
            let mut parameter = random([LEN], 1, &Device::flex());
            let mut moments = Moments::zeros(LEN);
            let mut expected: Vec<f64> = start.iter().map(|value| f64::from(*value)).collect();
            let mut expected_moments = vec![[0.0; 2]; LEN];
            for number in 1..=5 {
                let gradient = random_values(LEN, 10 + number);
                reference(&options, &mut expected, &mut expected_moments, &gradient, step_at(number));
                let gradient = random([LEN], 10 + number, &Device::flex());
                parameter = step(&options, parameter, gradient, &mut moments, step_at(number));
            }
            let expected: Vec<f32> = expected.iter().map(|value| *value as f32).collect();
            // Five roundings of parameters up to 4; the whole way is near 5e-3.
            assert_close(&values(parameter), &expected, 2e-6);
        }
    }

    #[test]
    fn a_unique_parameter_is_updated_in_place_and_a_shared_one_is_not() {
        let options = AdamW::default();
        let gradient = || Tensor::<1>::ones([3], &Device::flex());
        let shared = Tensor::<1>::ones([3], &Device::flex());
        let moved = options.step(shared.clone(), gradient(), &mut Moments::zeros(3), step_at(1));
        assert_eq!(values(shared), [1.0; 3]);
        assert!(values(moved.clone()).iter().all(|value| *value < 1.0));

        let address = |tensor: &Tensor<1>| Values::detached(tensor.clone()).as_ptr();
        let before = address(&moved);
        let moved = options.step(moved, gradient(), &mut Moments::zeros(3), step_at(2));
        assert_eq!(address(&moved), before);
    }

    #[test]
    fn the_average_moves_by_its_weight() {
        let mut average = vec![1.0; LEN];
        lerp_in_place(&mut average, &vec![3.0; LEN], 0.25);
        assert_eq!(average, vec![1.5; LEN]);
    }

    #[test]
    fn a_sum_is_made_in_place_where_nobody_else_holds_it() {
        let [first, second] = [1, 2].map(|seed| random::<1>([LEN], seed, &Device::flex()));
        let expected = values(first.clone() + second.clone());
        let shared = added(first.clone(), second.clone());
        assert_eq!(values(shared), expected);
        assert_eq!(values(first.clone()), random_values(LEN, 1));
        let address = Values::detached(first.clone()).as_ptr();
        let sum = added(first, second);
        assert_eq!(Values::detached(sum.clone()).as_ptr(), address);
        assert_eq!(values(sum), expected);
    }

    #[test]
    fn the_norm_counts_every_element_of_all_tensors() {
        let squares =
            |seed| random_values(LEN, seed).iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let expected = squares(4) + squares(5);
        let found = || {
            let mut norm = SquaredNorm::default();
            for seed in [4, 5] {
                norm.add(random::<1>([LEN], seed, &Device::flex()));
            }
            norm.total()
        };
        assert!((found() / expected - 1.0).abs() < 1e-12);
        // The twin's sums are those of f32.
        assert!((with_plain_twins(found) / expected - 1.0).abs() < 1e-5);
    }

    #[test]
    fn moments_are_the_same_wherever_they_are_between_two_steps() {
        let options = AdamW::default();
        let after = |[first, second]: [Step; 2]| {
            let mut moments = Moments::zeros(LEN);
            let gradient = |seed| random([LEN], seed, &Device::flex());
            let moved = first(&options, gradient(1), gradient(10), &mut moments, step_at(1));
            let moved = second(&options, moved, gradient(11), &mut moments, step_at(2));
            [values(moved), moments.read()[0].to_vec(), moments.read()[1].to_vec()]
        };
        let expected = after([AdamW::step; 2]);
        for steps in [[plain::adamw_step as Step, AdamW::step], [AdamW::step, plain::adamw_step]] {
            for (found, expected) in after(steps).iter().zip(&expected) {
                // Two roundings of numbers up to 4.
                assert_close(found, expected, 1e-6);
            }
        }
    }
}
