//! Numbers kept in 8 bits by block-wise dynamic quantisation (arXiv 2110.02861): a code for each number, and the largest
//! magnitude of each block of 256, which the codes are fractions of.

use std::sync::LazyLock;

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 256;

/// A tensor's numbers in 8 bits each, in row-major order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantized {
    /// Indices into the map.
    pub codes: Vec<u8>,
    /// The largest magnitude of each block of 256.
    pub scales: Vec<f32>,
}

impl Quantized {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self { codes: vec![0; len], scales: vec![0.0; len.div_ceil(BLOCK)] }
    }
}

/// The 256 fractions in [-1, 1] that codes stand for, denser towards zero.
pub(crate) struct DynamicMap {
    fractions: [f32; 256],
    /// Half way from each fraction to the next.
    middles: [f32; 255],
    /// The code nearest to the smallest number of each bucket.
    first: Vec<u8>,
}

/// Of numbers of both signs.
pub(crate) static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(Sign::Both));
/// Of numbers that are not negative.
pub(crate) static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(Sign::Positive));

#[derive(Clone, Copy, PartialEq)]
enum Sign {
    Both,
    Positive,
}

/// Low bits of an f32 that its bucket does not depend on. What is left (sign, exponent and 8 bits of the fraction) is
/// fine enough that a bucket holds no more than one border between two codes.
const BUCKET_SHIFT: u32 = 15;
const BUCKETS: usize = 1 << (32 - BUCKET_SHIFT);

impl DynamicMap {
    fn new(sign: Sign) -> Self {
        let fractions = fractions(sign);
        let middles = std::array::from_fn(|code| 0.5 * (fractions[code] + fractions[code + 1]));
        let nearest = |x: f32| middles.partition_point(|middle| *middle < x) as u8;
        let smallest = |bucket: usize| {
            let bits = (bucket as u32) << BUCKET_SHIFT;
            let negative = bits >> 31 == 1;
            f32::from_bits(if negative { bits | ((1 << BUCKET_SHIFT) - 1) } else { bits })
        };
        let first = (0..BUCKETS).map(|bucket| nearest(smallest(bucket))).collect();
        Self { fractions, middles, first }
    }

    /// The code of the fraction nearest to `x` in [-1, 1].
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let first = self.first[(x.to_bits() >> BUCKET_SHIFT) as usize];
        let above = self.middles.get(usize::from(first)).is_some_and(|middle| x > *middle);
        first + u8::from(above)
    }

    /// Reads a block.
    #[inline(always)]
    pub(crate) fn read(&self, codes: &[u8], scale: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.fractions[usize::from(*code)] * scale;
        }
    }

    /// Writes a block; returns its scale.
    #[inline(always)]
    pub(crate) fn write(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let scale = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let factor = if scale == 0.0 { 0.0 } else { scale.recip() };
        for (code, value) in codes.iter_mut().zip(values) {
            *code = self.code(value * factor);
        }
        scale
    }
}

/// In ascending order: zero, one, and for each power of ten from 1e-7 to 1 equal parts of the range from a tenth of it
/// to itself, twice as many for each next power.
fn fractions(sign: Sign) -> [f32; 256] {
    let mut fractions = vec![0.0, 1.0];
    for power in 0..7 {
        let parts = 1 << if sign == Sign::Both { power } else { power + 1 };
        let border = |index: usize| 0.1 + 0.9 * index as f64 / f64::from(parts);
        for index in 0..parts as usize {
            let fraction = (10_f64.powi(power - 6) * 0.5 * (border(index) + border(index + 1))) as f32;
            fractions.push(fraction);
            if sign == Sign::Both {
                fractions.push(-fraction);
            }
        }
    }
    fractions.sort_by(f32::total_cmp);
    fractions.try_into().expect("2 + 2 · (1 + 2 + … + 64), or 2 + (2 + 4 + … + 128), are 256")
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::random_values;

    #[test]
    fn the_nearest_fraction_is_found() {
        let mut values = random_values(20_000, 3);
        // Down to the smallest fractions, and the ends of the map.
        values.iter_mut().enumerate().for_each(|(index, value)| *value *= 10_f32.powi(-(index as i32 % 9)));
        values.extend([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38]);
        for (map, lowest) in [(&*SIGNED, -1.0), (&*UNSIGNED, 0.0)] {
            for value in &values {
                let value = value.clamp(lowest, 1.0);
                let distance = |fraction: f32| (f64::from(fraction) - f64::from(value)).abs();
                let found = distance(map.fractions[usize::from(map.code(value))]);
                let least = map.fractions.iter().map(|fraction| distance(*fraction)).fold(1.0, f64::min);
                // A middle is rounded to f32, which the nearer of two fractions may depend on.
                assert!(
                    found <= least + f64::from(value.abs() * f32::EPSILON),
                    "{value}: {found} from the fraction found, {least} from the nearest"
                );
            }
        }
    }

    #[test]
    fn a_fraction_comes_back_as_itself() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for (code, fraction) in map.fractions.iter().enumerate() {
                assert_eq!(usize::from(map.code(*fraction)), code);
            }
        }
    }

    #[test]
    fn a_block_is_written_in_fractions_of_its_largest_number() {
        let values = [0.5, -4.0, 0.0, 4.0 * SIGNED.fractions[200]];
        let mut codes = [0; 4];
        let scale = SIGNED.write(&values, &mut codes);
        assert_eq!(scale, 4.0);
        let mut read = [9.0; 4];
        SIGNED.read(&codes, scale, &mut read);
        // -1 is not in the map; its neighbour is the middle of the last of 64 parts.
        assert_eq!(read[1..], [4.0 * SIGNED.fractions[0], 0.0, values[3]]);
        assert!((SIGNED.fractions[0] + 1.0 - 0.45 / 64.0).abs() < 1e-7);
        assert!((read[0] - 0.5).abs() < 4.0 * 0.45 / 64.0);
    }
}
