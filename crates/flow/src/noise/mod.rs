//! torch's random numbers, so that a seed means the same picture here and in the peers.
//!
//! Reproduced bit for bit: the CPU generator's f32, bf16 and f16 draws into contiguous tensors, as the AVX2
//! build of torch 2.15 computes them (older builds rounded bf16 and f16 after every operation). Left out: f64
//! tensors. `goldens/make/rng_avx2_check.py` is the same algorithm in Python, compared with torch. CUDA's
//! generator ([`PhiloxGenerator`]) is written after its description and was never compared with a device.

mod box_muller;
mod mersenne_twister;
mod philox;
mod source;

pub use philox::PhiloxGenerator;
pub use source::{NoiseSource, NoiseType, RandDevice, latent_noise};

use box_muller::{CHUNK, normal_pair, to_normal_chunks};
use mersenne_twister::MersenneTwister;

/// A `torch.Generator("cpu")`: the same seed and the same calls give the same numbers.
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    words: MersenneTwister,
    /// The second normal of the last pair that a draw of fewer than [`CHUNK`] left unused.
    spare_normal: Option<f64>,
}

impl TorchGenerator {
    /// A generator after `manual_seed(seed)`. Only the low 32 bits of the seed matter, as in torch.
    pub fn new(seed: u64) -> Self {
        Self { words: MersenneTwister::new(seed as u32), spare_normal: None }
    }

    /// `torch.randn`: standard normal values.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        if count < CHUNK {
            return (0..count).map(|_| self.next_normal() as f32).collect();
        }
        let mut values = self.rand(count);
        to_normal_chunks(&mut values);
        if !count.is_multiple_of(CHUNK) {
            let mut tail = self.rand(CHUNK);
            to_normal_chunks(&mut tail);
            values[count - CHUNK..].copy_from_slice(&tail);
        }
        values
    }

    /// `torch.randn(dtype=…)`: standard normal values that the type holds.
    ///
    /// Below f32 the stream is another one when `count` is no multiple of 16: the last chunk's own draws follow
    /// those of the whole chunks at once.
    pub fn randn_as(&mut self, count: usize, dtype: NoiseType) -> Vec<f32> {
        if dtype == NoiseType::F32 || count < CHUNK {
            return dtype.round(self.randn(count));
        }
        let mut values = self.rand(count.next_multiple_of(CHUNK));
        to_normal_chunks(&mut values);
        let tail = values.len() - CHUNK;
        values.copy_within(tail.., count - CHUNK);
        values.truncate(count);
        dtype.round(values)
    }

    /// `torch.rand`: uniform values in [0, 1), multiples of 2⁻²⁴.
    pub fn rand(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.words.next_u32() & 0xFF_FFFF) as f32 * 2f32.powi(-24)).collect()
    }

    /// `torch.rand(dtype=…)`: uniform values in [0, 1), rounded to the type. What would round to 1 is 0.
    pub fn rand_as(&mut self, count: usize, dtype: NoiseType) -> Vec<f32> {
        let rounded = dtype.round(self.rand(count)).into_iter();
        rounded.map(|value| if value == 1.0 { 0.0 } else { value }).collect()
    }

    /// `torch.randint`: integers from `low` up to but not including `high`, with torch's slight modulo bias.
    pub fn randint(&mut self, low: i64, high: i64, count: usize) -> Vec<i64> {
        assert!(low < high, "no integer lies in {low}..{high}");
        let range = high.wrapping_sub(low) as u64;
        let mut draw =
            || if range < WIDE_RANGE { u64::from(self.words.next_u32()) } else { self.words.next_u64() };
        (0..count).map(|_| low.wrapping_add((draw() % range) as i64)).collect()
    }

    /// `torch.randperm`: the numbers below `count` in random order.
    pub fn randperm(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for at in 0..count.saturating_sub(1) {
            let offset = self.words.next_u32() as usize % (count - at);
            order.swap(at, at + offset);
        }
        order
    }

    /// `torch.empty((), dtype=torch.int64).random_()`: an integer of 63 bits.
    pub fn random_int64(&mut self) -> i64 {
        (self.words.next_u64() & (u64::MAX >> 1)) as i64
    }

    /// The order in which a `torch.utils.data.DataLoader(shuffle=True)` visits `count` items in its next
    /// epoch, when this generator is torch's global one.
    ///
    /// The first of its two draws is for worker processes; the second seeds the permutation.
    pub fn loader_order(&mut self, count: usize) -> Vec<usize> {
        let _workers = self.random_int64();
        Self::new(self.random_int64() as u64).randperm(count)
    }

    fn next_normal(&mut self) -> f64 {
        if let Some(spare) = self.spare_normal.take() {
            return spare;
        }
        let (normal, spare) = normal_pair(self.words.next_unit(), self.words.next_unit());
        self.spare_normal = Some(spare);
        normal
    }
}

/// From this range on, `randint` takes 64 bits per draw.
const WIDE_RANGE: u64 = 1 << 28;

#[cfg(test)]
mod tests;
