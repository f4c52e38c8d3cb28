//! Comparison by the largest element error, and numerical derivatives.

use burn::tensor::Tensor;

/// Panics unless every element of `actual` is within `absolute` of its partner in `expected`.
///
/// The message names the element with the largest error. A NaN or an infinity on one side only is an infinite
/// error.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f32], absolute: f32) {
    assert_eq!(actual.len(), expected.len(), "found {} elements, expected {}", actual.len(), expected.len());
    let errors = actual.iter().zip(expected).map(|(&a, &e)| element_error(a, e));
    let Some((index, error)) = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)) else { return };
    assert!(
        error <= absolute,
        "element {index} of {}: found {}, expected {}, off by {error:e}, tolerance {absolute:e}",
        actual.len(),
        actual[index],
        expected[index],
    );
}

fn element_error(actual: f32, expected: f32) -> f32 {
    let same = actual == expected || (actual.is_nan() && expected.is_nan());
    let error = (actual - expected).abs();
    match (same, error.is_nan()) {
        (true, _) => 0.0,
        (false, true) => f32::INFINITY,
        (false, false) => error,
    }
}

/// [`assert_close`] for tensors, which must also agree in shape.
#[track_caller]
pub fn assert_tensors_close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>, absolute: f32) {
    assert_eq!(
        actual.dims(),
        expected.dims(),
        "found shape {:?}, expected {:?}",
        actual.dims(),
        expected.dims()
    );
    assert_close(&values(actual), &values(expected), absolute);
}

/// The elements of a tensor in row-major order, as f32 whatever its float type.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("a float tensor can be read as f32")
}

/// The derivative of `f` at `x` along `direction`, by a central difference: (f(x + hd) − f(x − hd)) / 2h.
///
/// `step` is h. With f32 inside `f`, a step near the cube root of its precision (about 5e-3 at unit scale)
/// loses the fewest digits, and three of them are then trustworthy.
pub fn finite_difference(f: impl Fn(&[f32]) -> f64, x: &[f32], direction: &[f32], step: f32) -> f64 {
    assert_eq!(
        x.len(),
        direction.len(),
        "the point has {} elements, the direction {}",
        x.len(),
        direction.len()
    );
    let moved = |by: f32| -> Vec<f32> { x.iter().zip(direction).map(|(x, d)| x + by * d).collect() };
    (f(&moved(step)) - f(&moved(-step))) / (2.0 * f64::from(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "element 1 of 3: found 2.5, expected 2")]
    fn the_largest_error_is_named() {
        assert_close(&[1.0, 2.5, 3.1], &[1.0, 2.0, 3.0], 0.2);
    }

    #[test]
    #[should_panic(expected = "off by inf")]
    fn nan_is_no_match_for_a_number() {
        assert_close(&[1.0, f32::NAN], &[1.0, 2.0], 1e9);
    }

    #[test]
    fn equal_infinities_match() {
        assert_close(&[f32::INFINITY, f32::NAN], &[f32::INFINITY, f32::NAN], 0.0);
    }

    #[test]
    fn the_difference_quotient_of_a_cubic_is_its_derivative() {
        let cubic = |x: &[f32]| f64::from(x[0]).powi(3) - f64::from(x[1]);
        // d/dt of (2 + t)^3 − (1 + 3t) at t = 0 is 12 − 3; the central difference adds h² = 2.5e-5.
        let slope = finite_difference(cubic, &[2.0, 1.0], &[1.0, 3.0], 5e-3);
        assert!((slope - 9.0).abs() < 1e-3, "{slope}");
    }
}
