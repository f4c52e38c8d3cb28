//! Uniform to normal numbers with torch's arithmetic (Box and Muller 1958).
//!
//! From 16 elements on, torch's AVX2 kernel evaluates logarithm, sine and cosine by the Cephes polynomials of
//! `avx_mathfun.h` in f32 with fused multiply-adds, whose last bits differ from any libm. The same operations
//! in the same order are written here for one lane. Run under AVX2 and FMA the compiler makes them eight
//! lanes wide; without them `mul_add` is a correctly rounded library call: slower, same bits.

use std::f32::consts::SQRT_2;
use std::f64::consts::TAU;

/// Elements that torch's kernel makes from 8 radii and 8 angles.
pub(super) const CHUNK: usize = 16;
const LANES: usize = CHUNK / 2;

/// A pair of normal numbers from two uniform ones, in f64: torch's path for fewer than [`CHUNK`] elements.
pub(super) fn normal_pair(angle: f64, tail: f64) -> (f64, f64) {
    let radius = (-2.0 * (-tail).ln_1p()).sqrt();
    let (sine, cosine) = (TAU * angle).sin_cos();
    (radius * cosine, radius * sine)
}

/// Turns uniform numbers into normal ones, chunk by chunk; a rest shorter than [`CHUNK`] stays as it is.
pub(super) fn to_normal_chunks(values: &mut [f32]) {
    pulp::Arch::new().dispatch(Chunks(values.as_chunks_mut().0));
}

/// A named type, because a closure would not be sure to be inlined into the function compiled for AVX2 and
/// FMA.
struct Chunks<'a>(&'a mut [[f32; CHUNK]]);

impl pulp::NullaryFnOnce for Chunks<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for chunk in self.0 {
            to_normal(chunk);
        }
    }
}

#[inline(always)]
fn to_normal(chunk: &mut [f32; CHUNK]) {
    let uniform = *chunk;
    for lane in 0..LANES {
        let radius = (-2.0 * log(1.0 - uniform[lane])).sqrt();
        let (sine, cosine) = sin_cos(TAU as f32 * uniform[lane + LANES]);
        chunk[lane] = radius * cosine;
        chunk[lane + LANES] = radius * sine;
    }
}

/// Cephes `logf` for normal positive numbers.
#[inline(always)]
fn log(x: f32) -> f32 {
    const POLYNOMIAL: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    let bits = x.to_bits();
    let mantissa = f32::from_bits((bits & 0x007F_FFFF) | 0x3F00_0000);
    let below = mantissa < SQRT_2 / 2.0;
    let exponent = ((bits >> 23) as i32 - 126) as f32 - if below { 1.0 } else { 0.0 };
    let x = (mantissa - 1.0) + if below { mantissa } else { 0.0 };

    let square = x * x;
    let mut y = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        y = y.mul_add(x, *coefficient);
    }
    let y = (y * x).mul_add(square, exponent * LN_2_LOW);
    let y = (-square).mul_add(0.5, y);
    exponent.mul_add(LN_2_HIGH, x + y)
}

/// Cephes `sinf` and `cosf` for x in [0, 2π].
#[inline(always)]
fn sin_cos(x: f32) -> (f32, f32) {
    const FOUR_OVER_PI: f32 = 1.273_239_5;
    const MINUS_QUARTER_PI: [f32; 3] = [-0.785_156_25, -2.418_756_5e-4, -3.774_895e-8];

    let octant = ((x * FOUR_OVER_PI) as i32 + 1) & !1;
    let y = octant as f32;
    let x = MINUS_QUARTER_PI.iter().fold(x, |x, part| y.mul_add(*part, x));

    let square = x * x;
    let cosine = 2.443_315_7e-5f32.mul_add(square, -1.388_731_6e-3).mul_add(square, 4.166_664_6e-2) * square;
    let cosine = cosine.mul_add(square, -(square * 0.5)) + 1.0;
    let sine = (-1.951_529_6e-4f32).mul_add(square, 8.332_161e-3).mul_add(square, -1.666_665_5e-1) * square;
    let sine = sine.mul_add(x, x);

    let (s, c) = if octant & 2 == 0 { (sine, cosine) } else { (cosine, sine) };
    let s = if octant & 4 != 0 { -s } else { s };
    let c = if (octant - 2) & 4 == 0 { -c } else { c };
    (s, c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polynomials_are_accurate_to_their_last_bits() {
        for k in 1..=4096 {
            let u = k as f32 / 4096.0;
            // Cephes states 2 ulp; ln reaches 8.3 in size here (ulp 9.5e-7), sine and cosine 1 (ulp 1.2e-7).
            assert!((log(u) - u.ln()).abs() <= 2e-6, "ln {u}");
            let angle = TAU as f32 * u;
            let (sine, cosine) = sin_cos(angle);
            assert!((sine - angle.sin()).abs() <= 3e-7, "sin {angle}");
            assert!((cosine - angle.cos()).abs() <= 3e-7, "cos {angle}");
        }
    }

    #[test]
    fn the_wide_and_the_plain_evaluation_agree_bit_for_bit() {
        let mut wide: Vec<f32> = (0..1600).map(|k| (k * 7919 % 1600) as f32 / 1600.0).collect();
        let mut plain = wide.clone();
        to_normal_chunks(&mut wide);
        plain.as_chunks_mut().0.iter_mut().for_each(to_normal);
        assert_eq!(wide, plain);
    }
}
