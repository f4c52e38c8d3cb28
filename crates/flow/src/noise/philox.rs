//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the generator under
//! torch's CUDA random numbers.
//!
//! Written after the published algorithm and torch's launch rule, and compared with an emulation of both
//! (`goldens/make/rng_extra.py`); never compared with a device, whose fast sine and cosine differ in their
//! last bits.

use std::f32::consts::TAU;

/// A `torch.Generator("cuda")` whose calls are `randn` alone.
#[derive(Debug, Clone)]
pub struct PhiloxGenerator {
    key: [u32; 2],
    /// Blocks of four words that each thread has used.
    used: u32,
}

/// Threads in a block of torch's kernels.
const BLOCK: usize = 256;
/// torch launches no more blocks than fit on the device at once: here 132 multiprocessors of 2048 threads, as
/// an H100 or H200 has. A smaller device draws other numbers into tensors of more elements than its threads.
const MOST_BLOCKS: usize = 132 * 2048 / BLOCK;

impl PhiloxGenerator {
    /// A generator after `manual_seed(seed)`.
    pub fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], used: 0 }
    }

    /// `torch.randn` in f32: standard normal values.
    ///
    /// Thread t draws four at a time, for the elements t, t + threads, t + 2·threads and t + 3·threads.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        let threads = count.div_ceil(BLOCK).min(MOST_BLOCKS) * BLOCK;
        let mut values = vec![0.0; count];
        for thread in 0..threads.min(count) {
            for (round, first) in (thread..count).step_by(4 * threads).enumerate() {
                let normals = self.four_normals(self.used.wrapping_add(round as u32), thread as u32);
                for (lane, normal) in normals.into_iter().enumerate() {
                    if let Some(value) = values.get_mut(first + lane * threads) {
                        *value = normal;
                    }
                }
            }
        }
        self.used = self.used.wrapping_add(count.div_ceil((4 * threads).max(1)) as u32);
        values
    }

    fn four_normals(&self, offset: u32, thread: u32) -> [f32; 4] {
        let [a, b, c, d] = words([offset, 0, thread, 0], self.key);
        let ((first, second), (third, fourth)) = (normal_pair(a, b), normal_pair(c, d));
        [first, second, third, fourth]
    }
}

/// Ten rounds on a counter.
fn words(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let product = |word: u32, multiplier: u32| {
        let wide = u64::from(word) * u64::from(multiplier);
        ((wide >> 32) as u32, wide as u32)
    };
    (0..10u32).fold(counter, |[a, b, c, d], round| {
        let (first_high, first_low) = product(a, 0xD251_1F53);
        let (second_high, second_low) = product(c, 0xCD9E_8D57);
        let first_key = key[0].wrapping_add(round.wrapping_mul(0x9E37_79B9));
        let second_key = key[1].wrapping_add(round.wrapping_mul(0xBB67_AE85));
        [second_high ^ b ^ first_key, second_low, first_high ^ d ^ second_key, first_low]
    })
}

/// Box and Muller's pair as cuRAND has it, the sine first. Logarithm and sine are rounded from f64, so that
/// they do not hang on a libm.
fn normal_pair(radial: u32, angular: u32) -> (f32, f32) {
    const UNIT: f32 = 2.328_306_4e-10;
    const TURN: f32 = UNIT * TAU;
    let tail = radial as f32 * UNIT + UNIT / 2.0;
    let angle = f64::from(angular as f32 * TURN + TURN / 2.0);
    let radius = (-2.0 * f64::from(tail).ln() as f32).sqrt();
    (angle.sin() as f32 * radius, angle.cos() as f32 * radius)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::{Golden, golden};

    #[test]
    fn the_words_are_the_published_ones() {
        // Known answers of the authors' Random123 library.
        assert_eq!(words([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(words([u32::MAX; 4], [u32::MAX; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
    }

    #[test]
    fn normals_equal_the_emulation() {
        let goldens = Golden::open(golden("rng/rng_emulated_unverified.safetensors"));
        for (seed, count) in
            [0, 42, (1 << 32) + 5].into_iter().flat_map(|seed| [16, 1000, 1024].map(|n| (seed, n)))
        {
            let key = format!("s{seed}.cuda_philox_randn.f32.{count}");
            assert_eq!(PhiloxGenerator::new(seed).randn(count), goldens.f32s(&key), "{key}");
        }
    }

    #[test]
    fn a_full_device_goes_on_with_the_next_lanes_and_then_the_next_block() {
        let threads = MOST_BLOCKS * BLOCK;
        let mut generator = PhiloxGenerator::new(7);
        let fresh = generator.clone();
        let values = generator.randn(4 * threads + 1);
        let [_, second, _, fourth] = fresh.four_normals(0, 0);
        assert_eq!(
            [values[threads], values[3 * threads], values[4 * threads]],
            [second, fourth, fresh.four_normals(1, 0)[0]]
        );
        assert_eq!(generator.randn(1), [fresh.four_normals(2, 0)[0]]);
    }

    #[test]
    fn the_normals_have_mean_zero_and_deviation_one() {
        let values = PhiloxGenerator::new(3).randn(100_000);
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        let square = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 1e5;
        // Four standard errors: 4 / √n and 4·√2 / √n.
        assert!(mean.abs() < 0.0127 && (square - 1.0).abs() < 0.018, "{mean}, {square}");
    }
}
