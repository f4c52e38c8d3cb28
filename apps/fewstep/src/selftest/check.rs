//! One operation, or a part of a model, run twice from the same numbers: as it is and by the plain twins of all
//! operations.

use std::time::Instant;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;
use fewstep_kernels::{inject, with_plain_twins};
use fewstep_models::{Model, NamedVisitor, visit_named};

/// Sums of up to some thousand f32 products in another order.
pub(super) const SUMS: f64 = 2e-5;
/// A few roundings of each number.
pub(super) const ROUNDINGS: f64 = 5e-6;
/// Bytes of an f32.
pub(super) const F32: f64 = 4.0;

/// Gradients that are zero in exact arithmetic (of biases before a softmax) are rounding: a gradient is compared to this
/// share of the largest of all, where its own numbers are smaller.
const SMALLEST_GRADIENT: f64 = 1e-3;

/// Computes something from inputs that were made before.
pub(super) type Run = Box<dyn Fn() -> Tensor<1>>;

/// Makes the inputs.
type Operation = Box<dyn Fn(&mut Inputs) -> Run>;

/// Something at one size.
pub(super) struct Check {
    pub(super) name: String,
    pub(super) size: String,
    /// Floating point operations of the forward; 0 where memory is what limits it, or nobody has counted.
    pub(super) flops: f64,
    /// Bytes that the forward has to read and write at least; 0 as above.
    pub(super) bytes: f64,
    /// How many times the forward's work the backward does; 0 where there is none.
    pub(super) backward_passes: f64,
    /// Largest difference, relative to the largest number of each result.
    pub(super) tolerance: f64,
    pub(super) operation: Operation,
}

/// A check of an operation that memory limits: `passes` times so many numbers are read or written.
pub(super) fn memory_case(
    name: &str,
    numbers: usize,
    passes: f64,
    backward_passes: f64,
    tolerance: f64,
    operation: impl Fn(&mut Inputs) -> Run + 'static,
) -> Check {
    let (bytes, size) = (passes * F32 * numbers as f64, format!("{numbers} numbers"));
    let (name, operation) = (name.into(), Box::new(operation));
    Check { name, size, flops: 0.0, bytes, backward_passes, tolerance, operation }
}

/// What came out.
#[derive(Debug)]
pub(super) struct Found {
    /// Largest difference of output and gradients from the twin's, each relative to its largest number.
    pub(super) difference: f64,
    pub(super) tolerance: f64,
    pub(super) forward_secs: f64,
    pub(super) backward_secs: Option<f64>,
    /// The twin's forward.
    pub(super) twin_secs: f64,
}

impl Found {
    pub(super) fn agrees(&self) -> bool {
        // A NaN agrees with nothing.
        self.difference <= self.tolerance
    }
}

/// Makes the inputs, the same in every run, and remembers those that have a gradient.
pub(super) struct Inputs {
    device: Device,
    generator: TorchGenerator,
    read: Vec<ReadGradient>,
}

type ReadGradient = Box<dyn Fn(&burn::tensor::Gradients) -> Option<Vec<f32>>>;

impl Inputs {
    fn new(device: &Device) -> Self {
        Self { device: device.clone(), generator: TorchGenerator::new(0), read: Vec::new() }
    }

    /// Where the inputs are made; on its autodiff side where a graph is recorded.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Normal numbers that want a gradient where the device records a graph.
    pub(super) fn learning<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> Tensor<D> {
        let tensor = self.frozen(shape, scale);
        if !self.device.is_autodiff() {
            return tensor;
        }
        let tensor = tensor.require_grad();
        self.remember(tensor.clone());
        tensor
    }

    /// Normal numbers without a gradient.
    pub(super) fn frozen<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> Tensor<D> {
        let values = self.generator.randn(shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|value| scale * value).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// All parameters of a model want a gradient.
    pub(super) fn parameters(&mut self, model: &Model) {
        struct Leaves<'a>(&'a mut Inputs);
        impl NamedVisitor for Leaves<'_> {
            fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
                self.0.remember(parameter.val());
            }
        }
        visit_named(model, &mut Leaves(self));
    }

    fn remember<const D: usize>(&mut self, leaf: Tensor<D>) {
        self.read.push(Box::new(move |gradients| leaf.grad(gradients).map(numbers)));
    }
}

pub(super) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("operations give f32")
}

impl Check {
    /// Compares what `device` computes with the plain twins on the CPU, and times it.
    pub(super) fn run(&self, device: &Device, runs: usize) -> Found {
        let expected = with_plain_twins(|| self.results(&Device::flex()));
        let found = self.results(device);
        Found {
            difference: difference(&found, &expected),
            tolerance: self.tolerance,
            forward_secs: self.forward_secs(device, runs),
            backward_secs: (self.backward_passes > 0.0).then(|| self.backward_secs(device, runs)),
            twin_secs: with_plain_twins(|| self.forward_secs(&Device::flex(), runs.min(3))),
        }
    }

    /// The output, and the gradients by all inputs that want one.
    fn results(&self, device: &Device) -> Vec<Vec<f32>> {
        if self.backward_passes == 0.0 {
            return vec![numbers((self.operation)(&mut Inputs::new(device))())];
        }
        let mut inputs = Inputs::new(&device.clone().autodiff());
        let output = (self.operation)(&mut inputs)();
        let gradients = inject(output.clone(), cotangent(&output)).backward();
        let gradients = inputs.read.iter().map(|read| read(&gradients).unwrap_or_default());
        std::iter::once(numbers(output)).chain(gradients).collect()
    }

    fn forward_secs(&self, device: &Device, runs: usize) -> f64 {
        let run = (self.operation)(&mut Inputs::new(device));
        median((0..runs).map(|_| secs(device, || drop(run()))))
    }

    fn backward_secs(&self, device: &Device, runs: usize) -> f64 {
        let device = device.clone().autodiff();
        let run = (self.operation)(&mut Inputs::new(&device));
        median((0..runs).map(|_| {
            let output = run();
            let loss = inject(output.clone(), cotangent(&output));
            secs(&device, || drop(loss.backward()))
        }))
    }
}

/// Seconds that work takes, with all that it left to the device.
fn secs(device: &Device, work: impl FnOnce()) -> f64 {
    let wait = || device.sync().expect("the device answers");
    wait();
    let start = Instant::now();
    work();
    wait();
    start.elapsed().as_secs_f64()
}

fn cotangent(output: &Tensor<1>) -> Tensor<1> {
    let values = TorchGenerator::new(1).randn(output.dims()[0]);
    Tensor::from_data(TensorData::new(values, output.dims()), &output.device())
}

fn median(secs: impl Iterator<Item = f64>) -> f64 {
    let mut secs: Vec<f64> = secs.collect();
    secs.sort_by(f64::total_cmp);
    secs[secs.len() / 2]
}

/// The largest difference of an output and its gradients.
fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let ([found, found_gradients @ ..], [expected, expected_gradients @ ..]) = (found, expected) else {
        return f64::INFINITY;
    };
    if found_gradients.len() != expected_gradients.len() {
        return f64::INFINITY;
    }
    let most = expected_gradients.iter().map(|gradient| largest(gradient)).fold(0.0, f64::max);
    let pairs = found_gradients.iter().zip(expected_gradients);
    let gradients = pairs.map(|(found, expected)| relative(found, expected, SMALLEST_GRADIENT * most));
    gradients.fold(relative(found, expected, 0.0), worse)
}

/// Largest difference over the largest expected number, or over `least` where that is larger.
fn relative(found: &[f32], expected: &[f32], least: f64) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let differences = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    differences.fold(0.0, worse) / largest(expected).max(least).max(1e-30)
}

fn largest(numbers: &[f32]) -> f64 {
    numbers.iter().fold(0.0, |largest, value| f64::from(value.abs()).max(largest))
}

/// The larger one, and NaN where one is.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_kernels::{Gelu, gelu, takes_plain_twins};

    /// A check of an activation in which the fused one is multiplied by a factor, and its input by another.
    fn check(factor: f32, inner: f32) -> Check {
        Check {
            name: "gelu".into(),
            size: "5 x 7".into(),
            flops: 0.0,
            bytes: 280.0,
            backward_passes: 2.0,
            tolerance: 1e-6,
            operation: Box::new(move |inputs| {
                let x = inputs.learning([5, 7], 1.0);
                let [factor, inner] = if takes_plain_twins() { [1.0; 2] } else { [factor, inner] };
                Box::new(move || (gelu(x.clone() * inner, Gelu::Tanh) * factor).flatten(0, 1))
            }),
        }
    }

    #[test]
    fn a_broken_operation_is_seen_by_its_values_and_by_its_gradient_alone() {
        let run = |check: Check| check.run(&Device::flex(), 1);
        let right = run(check(1.0, 1.0));
        assert!(right.agrees(), "{right:?}");
        assert!(right.forward_secs > 0.0 && right.backward_secs.is_some_and(|secs| secs > 0.0));
        let broken = run(check(1.001, 1.0));
        assert!(!broken.agrees() && (broken.difference - 1e-3).abs() < 1e-4, "{broken:?}");
        // The value is right and the gradient, cut off from it, is none at all.
        let mut cut = check(1.0, 1.0);
        cut.operation = Box::new(|inputs| {
            let x = inputs.learning([5, 7], 1.0);
            Box::new(move || match takes_plain_twins() {
                false => (gelu(x.clone().detach(), Gelu::Tanh) + x.clone() * 0.0).flatten(0, 1),
                true => gelu(x.clone(), Gelu::Tanh).flatten(0, 1),
            })
        });
        assert!(!run(cut).agrees());
        assert!(!run(check(f32::NAN, 1.0)).agrees());
    }

    #[test]
    fn a_small_gradient_counts_by_the_largest_one_and_a_missing_one_always() {
        let (output, large) = (vec![1.0], vec![100.0, 1.0]);
        let of = |small: Vec<f32>| {
            difference(&[output.clone(), large.clone(), small], &[output.clone(), large.clone(), vec![1e-6]])
        };
        // 1e-6 off, of a thousandth of 100.
        assert!((of(vec![2e-6]) - 1e-5).abs() < 1e-9);
        assert_eq!(of(Vec::new()), f64::INFINITY);
        assert_eq!(difference(std::slice::from_ref(&output), &[output.clone(), large]), f64::INFINITY);
    }
}
