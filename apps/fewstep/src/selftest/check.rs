//! One operation run twice, fused and plain, from the same numbers.

use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;
use fewstep_kernels::inject;

/// Which of two implementations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// The operation under test.
    Fused,
    /// Its formula in burn's own operations.
    Plain,
}

/// Runs an operation on inputs that were made before.
pub(super) type Run = Box<dyn Fn() -> Tensor<1>>;

/// Makes the inputs of one of the two.
type Operation = Box<dyn Fn(Which, &mut Inputs) -> Run>;

/// An operation at one size.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) size: String,
    /// Floating point operations of the forward; 0 where memory is what limits it.
    pub(super) flops: f64,
    /// Bytes that the forward has to read and write at least.
    pub(super) bytes: f64,
    /// How many times the forward's work the backward does; 0 where there is none.
    pub(super) backward_passes: f64,
    /// Largest difference, relative to the largest number of each result.
    pub(super) tolerance: f64,
    pub(super) operation: Operation,
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

/// Makes an operation's inputs, the same in every run, and remembers those that have a gradient.
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

    /// Normal numbers that want a gradient where the device records a graph.
    pub(super) fn learning<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> Tensor<D> {
        let tensor = self.frozen(shape, scale);
        if !self.device.is_autodiff() {
            return tensor;
        }
        let tensor = tensor.require_grad();
        let leaf = tensor.clone();
        self.read.push(Box::new(move |gradients| leaf.grad(gradients).map(numbers)));
        tensor
    }

    /// Normal numbers without a gradient.
    pub(super) fn frozen<const D: usize>(&mut self, shape: [usize; D], scale: f32) -> Tensor<D> {
        let values = self.generator.randn(shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|value| scale * value).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("operations give f32")
}

impl Check {
    /// Compares the operation on `device` with its twin on the CPU, and times it.
    pub(super) fn run(&self, device: &Device, runs: usize) -> Found {
        let expected = self.results(Which::Plain, &Device::flex());
        let found = self.results(Which::Fused, device);
        let difference = if found.len() == expected.len() {
            found.iter().zip(&expected).map(|(found, expected)| relative(found, expected)).fold(0.0, worse)
        } else {
            f64::INFINITY
        };
        Found {
            difference,
            tolerance: self.tolerance,
            forward_secs: self.forward_secs(Which::Fused, device, runs),
            backward_secs: (self.backward_passes > 0.0).then(|| self.backward_secs(device, runs)),
            twin_secs: self.forward_secs(Which::Plain, &Device::flex(), runs.min(3)),
        }
    }

    /// The output, and the gradients by all inputs that want one.
    fn results(&self, which: Which, device: &Device) -> Vec<Vec<f32>> {
        if self.backward_passes == 0.0 {
            return vec![numbers((self.operation)(which, &mut Inputs::new(device))())];
        }
        let mut inputs = Inputs::new(&device.clone().autodiff());
        let output = (self.operation)(which, &mut inputs)();
        let gradients = inject(output.clone(), cotangent(&output)).backward();
        let gradients = inputs.read.iter().map(|read| read(&gradients).unwrap_or_default());
        std::iter::once(numbers(output)).chain(gradients).collect()
    }

    fn forward_secs(&self, which: Which, device: &Device, runs: usize) -> f64 {
        let run = (self.operation)(which, &mut Inputs::new(device));
        median((0..runs).map(|_| secs(device, || drop(run()))))
    }

    fn backward_secs(&self, device: &Device, runs: usize) -> f64 {
        let device = device.clone().autodiff();
        let run = (self.operation)(Which::Fused, &mut Inputs::new(&device));
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

/// The larger one, and NaN where one is.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// Largest difference over the largest expected number.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let largest = expected.iter().fold(1e-30, |largest, value| f64::from(value.abs()).max(largest));
    let differences = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    differences.fold(0.0, worse) / largest
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_kernels::{Gelu, gelu, plain};

    /// A check of an activation in which the fused one is multiplied by a factor, and its input by another.
    fn check(factor: f32, inner: f32) -> Check {
        Check {
            name: "gelu",
            size: "5 x 7".into(),
            flops: 0.0,
            bytes: 280.0,
            backward_passes: 2.0,
            tolerance: 1e-6,
            operation: Box::new(move |which, inputs| {
                let x = inputs.learning([5, 7], 1.0);
                Box::new(move || match which {
                    Which::Fused => (gelu(x.clone() * inner, Gelu::Tanh) * factor).flatten(0, 1),
                    Which::Plain => plain::gelu(x.clone(), Gelu::Tanh).flatten(0, 1),
                })
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
        cut.operation = Box::new(|which, inputs| {
            let x = inputs.learning([5, 7], 1.0);
            Box::new(move || match which {
                Which::Fused => (gelu(x.clone().detach(), Gelu::Tanh) + x.clone() * 0.0).flatten(0, 1),
                Which::Plain => plain::gelu(x.clone(), Gelu::Tanh).flatten(0, 1),
            })
        });
        assert!(!run(cut).agrees());
        assert!(!run(check(f32::NAN, 1.0)).agrees());
    }
}
