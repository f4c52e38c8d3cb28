//! Loops compiled for the instruction set found at run time (AVX2, AVX-512, or the target's own), and the few
//! vectorisable functions that the standard library lacks.

use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

/// Looked up once: a row of 64 elements takes no longer than asking the processor.
static LEVEL: LazyLock<Arch> = LazyLock::new(Arch::new);

/// The instruction set that was found: what the loops of the operations, and matrix products, run in.
pub fn instructions() -> &'static str {
    match *LEVEL {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => "AVX-512",
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => "AVX2 with FMA",
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => "NEON",
        _ => "what the program was compiled for",
    }
}

/// Runs `body` compiled for the best instruction set of this machine.
///
/// `body` and all it calls must be inlined to profit: mark closures and helpers `#[inline(always)]`.
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    LEVEL.dispatch(body)
}

/// Runs an operation that is written for any register width in the widest registers of this machine.
pub(crate) fn dispatch<O: WithSimd>(operation: O) -> O::Output {
    LEVEL.dispatch(operation)
}

/// f32 elements of the registers that [`dispatch`] chooses.
pub(crate) fn lanes() -> usize {
    dispatch(Lanes)
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// f32 elements of a cache line.
pub(crate) const LINE: usize = 16;

/// Asks for the cache line of an address that is read soon. It may be any address: nothing is read here.
#[inline(always)]
pub(crate) fn prefetch(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86_64 has SSE, and an address that cannot be read is passed over.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for cache lines that follow each other.
#[inline(always)]
pub(crate) fn prefetch_lines(first: *const f32, lines: usize) {
    (0..lines).for_each(
        #[inline(always)]
        |line| prefetch(first.wrapping_add(line * LINE)),
    );
}

/// `e^x` with a relative error of about 1e-7 (Cephes' polynomial on ±ln2/2), in instructions that vectorise.
///
/// Arguments below -87 give about 1e-38 and those above 88 about 1.6e38: no zero, infinity or denormal comes out.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let rest = power.mul_add(-LN_2_HIGH, x);
    let rest = power.mul_add(-LN_2_LOW, rest);
    let series = 1.987_569_1e-4_f32
        .mul_add(rest, 1.398_2e-3)
        .mul_add(rest, 8.333_452e-3)
        .mul_add(rest, 4.166_579_6e-2)
        .mul_add(rest, 1.666_666_5e-1)
        .mul_add(rest, 0.5)
        .mul_add(rest * rest, rest)
        + 1.0;
    series * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Sum of `x`.
pub(crate) fn sum(x: &[f32]) -> f32 {
    LEVEL.dispatch(Sum { x })
}

/// Inner product of `x` and `y`.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "factors of an inner product");
    LEVEL.dispatch(Dot { x, y })
}

/// Inner product of `y` with the distances of `x` from `centre`.
pub(crate) fn dot_deviation(y: &[f32], x: &[f32], centre: f32) -> f32 {
    assert_eq!(x.len(), y.len(), "factors of an inner product");
    LEVEL.dispatch(DotDeviation { y, x, centre })
}

/// Sum of squared distances of `x` from `centre`.
pub(crate) fn squared_deviation(x: &[f32], centre: f32) -> f32 {
    LEVEL.dispatch(SquaredDeviation { x, centre })
}

/// Largest element of `x`, negative infinity if there is none.
pub(crate) fn max(x: &[f32]) -> f32 {
    LEVEL.dispatch(Max { x })
}

/// Adds `x` to `total`, element by element.
#[inline(always)]
pub(crate) fn add_to(total: &mut [f32], x: &[f32]) {
    for (total, x) in total.iter_mut().zip(x) {
        *total += x;
    }
}

struct Sum<'a> {
    x: &'a [f32],
}

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.x);
        let add = |a, b| simd.add_f32s(a, b);
        let total = reduce(x.len(), simd.splat_f32s(0.0), |total, index| add(total, x[index]), add);
        simd.reduce_sum_f32s(total) + rest.iter().sum::<f32>()
    }
}

struct Dot<'a> {
    x: &'a [f32],
    y: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(self.x), S::as_simd_f32s(self.y));
        let multiply_add = |total, index: usize| simd.mul_add_f32s(x[index], y[index], total);
        let total = reduce(x.len(), simd.splat_f32s(0.0), multiply_add, |a, b| simd.add_f32s(a, b));
        simd.reduce_sum_f32s(total) + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
    }
}

struct DotDeviation<'a> {
    y: &'a [f32],
    x: &'a [f32],
    centre: f32,
}

impl WithSimd for DotDeviation<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(self.x), S::as_simd_f32s(self.y));
        let centre = simd.splat_f32s(self.centre);
        let multiply_add =
            |total, index: usize| simd.mul_add_f32s(simd.sub_f32s(x[index], centre), y[index], total);
        let total = reduce(x.len(), simd.splat_f32s(0.0), multiply_add, |a, b| simd.add_f32s(a, b));
        let rest = x_rest.iter().zip(y_rest).map(|(x, y)| (x - self.centre) * y);
        simd.reduce_sum_f32s(total) + rest.sum::<f32>()
    }
}

struct SquaredDeviation<'a> {
    x: &'a [f32],
    centre: f32,
}

impl WithSimd for SquaredDeviation<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.x);
        let centre = simd.splat_f32s(self.centre);
        let add_square = |total, index: usize| {
            let deviation = simd.sub_f32s(x[index], centre);
            simd.mul_add_f32s(deviation, deviation, total)
        };
        let total = reduce(x.len(), simd.splat_f32s(0.0), add_square, |a, b| simd.add_f32s(a, b));
        simd.reduce_sum_f32s(total) + rest.iter().map(|x| (x - self.centre).powi(2)).sum::<f32>()
    }
}

struct Max<'a> {
    x: &'a [f32],
}

impl WithSimd for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.x);
        let start = simd.splat_f32s(f32::NEG_INFINITY);
        let max = |a, b| simd.max_f32s(a, b);
        let largest = reduce(x.len(), start, |largest, index| max(largest, x[index]), max);
        rest.iter().fold(simd.reduce_max_f32s(largest), |a, b| a.max(*b))
    }
}

/// Steps through `len` registers with four accumulators, so that one addition need not wait for the one before.
#[inline(always)]
fn reduce<V: Copy>(len: usize, start: V, step: impl Fn(V, usize) -> V, join: impl Fn(V, V) -> V) -> V {
    let mut parts = [start; 4];
    let rounds = len / parts.len();
    for round in 0..rounds {
        for (offset, part) in parts.iter_mut().enumerate() {
            *part = step(*part, round * 4 + offset);
        }
    }
    for index in rounds * parts.len()..len {
        parts[0] = step(parts[0], index);
    }
    join(join(parts[0], parts[1]), join(parts[2], parts[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let worst = (-8700..=8800)
            .map(|step| step as f32 / 100.0)
            .map(|x| (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 2.4e-7, "relative error {worst:e}");
    }

    #[test]
    fn exp_stays_finite_far_outside() {
        assert!(exp(-1e9) > 0.0 && exp(-1e9) < 2e-38);
        assert!(exp(1e9) > 1e38 && exp(1e9).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_count_the_remainder() {
        let x: Vec<f32> = (1..=37).map(|value| value as f32).collect();
        let ones = vec![2.0; 37];
        assert_eq!(sum(&x), 703.0);
        assert_eq!(dot(&x, &ones), 1406.0);
        // Twice Σ (i - 18) over 1..=37.
        assert_eq!(dot_deviation(&ones, &x, 18.0), 74.0);
        assert_eq!(max(&x), 37.0);
        // Σ (i - 19)² over 1..=37 is 2 Σ i² over 1..=18.
        assert_eq!(squared_deviation(&x, 19.0), 4218.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
