//! What the tests of the operations share: running one with chosen inputs tracked, and checking its derivative.

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use fewstep_testkit::{assert_close, finite_difference, random, random_values, values};

/// Makes the inputs of one run and reads their gradients afterwards.
pub(crate) struct Probe {
    device: Device,
    gradients: Vec<ReadGradient>,
}

type ReadGradient = Box<dyn Fn(&Gradients) -> Option<Vec<f32>>>;

/// Values of an operation's output, and the gradient of each input where it was tracked.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) output: Vec<f32>,
    pub(crate) gradients: Vec<Option<Vec<f32>>>,
}

impl Probe {
    pub(crate) fn new() -> Self {
        Self { device: Device::flex().autodiff(), gradients: Vec::new() }
    }

    /// A tracked input of standard normal values, seeded by its position.
    pub(crate) fn tracked<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let tensor = self.frozen(shape).require_grad();
        let leaf = tensor.clone();
        self.gradients.pop();
        self.gradients.push(Box::new(move |gradients| leaf.grad(gradients).map(values)));
        tensor
    }

    /// An input that wants no gradient.
    pub(crate) fn frozen<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let seed = self.gradients.len() as u64;
        self.gradients.push(Box::new(|_| None));
        random(shape, seed, &self.device)
    }

    /// An input that is tracked or not.
    pub(crate) fn input<const D: usize>(&mut self, shape: [usize; D], tracked: bool) -> Tensor<D> {
        if tracked { self.tracked(shape) } else { self.frozen(shape) }
    }

    /// Propagates a fixed cotangent back from `output`.
    pub(crate) fn finish<const D: usize>(self, output: Tensor<D>) -> Outcome {
        let cotangent = random(output.dims(), 1000, &self.device);
        let gradients = (output.clone() * cotangent).sum().backward();
        Outcome {
            output: values(output),
            gradients: self.gradients.iter().map(|read| read(&gradients)).collect(),
        }
    }
}

/// Compares a fused run with its plain twin's, each gradient relative to its own largest element.
#[track_caller]
pub(crate) fn assert_agree(fused: &Outcome, plain: &Outcome, relative: f32) {
    assert_close_relative(&fused.output, &plain.output, relative);
    assert_eq!(fused.gradients.len(), plain.gradients.len());
    for (index, pair) in fused.gradients.iter().zip(&plain.gradients).enumerate() {
        match pair {
            (Some(fused), Some(plain)) => assert_close_relative(fused, plain, relative),
            (None, None) => {}
            _ => panic!("only one of the two runs has a gradient for input {index}"),
        }
    }
}

#[track_caller]
fn assert_close_relative(actual: &[f32], expected: &[f32], relative: f32) {
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    assert_close(actual, expected, relative * largest.max(1e-6));
}

/// Checks the gradient of `operation`, a function of `len` numbers, along random directions against finite
/// differences of its values, which are computed without autodiff.
#[track_caller]
pub(crate) fn assert_derivative<const D: usize>(len: usize, operation: impl Fn(Tensor<1>) -> Tensor<D>) {
    let point = random_values(len, 7);
    let at = |x: &[f32], device: &Device| Tensor::<1>::from_data(TensorData::new(x.to_vec(), [len]), device);
    let tracked = at(&point, &Device::flex().autodiff()).require_grad();
    let output = operation(tracked.clone());
    let cotangent = random_values(output.dims().iter().product(), 8);
    let weights = at_shape(&cotangent, output.dims(), &Device::flex().autodiff());
    let gradients = (output * weights).sum().backward();
    let gradient = values(tracked.grad(&gradients).unwrap());
    let value = |x: &[f32]| inner(&values(operation(at(x, &Device::flex()))), &cotangent);
    for seed in 20..24 {
        let direction = random_values(len, seed);
        let expected = finite_difference(value, &point, &direction, 5e-3);
        let actual = inner(&gradient, &direction);
        // Rounding of f32 values and the third derivative leave about three digits of the difference quotient.
        let tolerance = 2e-3 * inner(&gradient, &gradient).sqrt() * (len as f64).sqrt();
        assert!(
            (actual - expected).abs() < tolerance,
            "slope {actual}, by differences {expected} ± {tolerance}"
        );
    }
}

fn at_shape<const D: usize>(x: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(x.to_vec(), shape), device)
}

fn inner(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Takes tensors one after the other out of a flat one.
pub(crate) struct Cutter {
    flat: Tensor<1>,
    position: usize,
}

impl Cutter {
    pub(crate) fn new(flat: Tensor<1>) -> Self {
        Self { flat, position: 0 }
    }

    pub(crate) fn next<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let len = shape.iter().product();
        self.position += len;
        self.flat.clone().narrow(0, self.position - len, len).reshape(shape)
    }
}
