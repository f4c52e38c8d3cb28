//! torch's random numbers on the CPU, bit for bit, so that a seed means the same picture here and in the
//! peers.
//!
//! Reproduced: f32 draws of torch 2.x as its AVX2 build computes them (contiguous tensors). Left out: bf16
//! and f16 draws, non-contiguous destinations, CUDA's Philox generator. `goldens/make/rng_avx2_check.py` is
//! the same algorithm in Python, compared with torch.

mod box_muller;
mod mersenne_twister;

use burn::tensor::{Device, Tensor, TensorData};

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

    /// `torch.rand`: uniform values in [0, 1), multiples of 2⁻²⁴.
    pub fn rand(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.words.next_u32() & 0xFF_FFFF) as f32 * 2f32.powi(-24)).collect()
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

/// `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`: the noise a picture starts from.
pub fn latent_noise<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = TorchGenerator::new(seed).randn(shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::{Golden, golden};

    const SEEDS: [u64; 5] = [0, 1, 42, 123_456_789, (1 << 32) + 5];
    const SHAPES: [(&str, usize); 7] =
        [("7", 7), ("15", 15), ("16", 16), ("17", 17), ("31", 31), ("33", 33), ("1x16x8x8", 1024)];
    const LARGE: (&str, usize) = ("1x16x166x166", 16 * 166 * 166);

    fn goldens() -> Golden {
        Golden::open(golden("rng/rng.safetensors"))
    }

    #[track_caller]
    fn assert_same_bits(actual: &[f32], expected: &[f32], what: &str) {
        assert_eq!(actual.len(), expected.len(), "{what}");
        for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
            assert_eq!(a.to_bits(), e.to_bits(), "{what}: element {index}: found {a:e}, expected {e:e}");
        }
    }

    type Draw = fn(&mut TorchGenerator, usize) -> Vec<f32>;
    const DRAWS: [(&str, Draw); 2] = [("randn", TorchGenerator::randn), ("rand", TorchGenerator::rand)];

    #[test]
    fn float_draws_of_every_length_have_torchs_bits() {
        let goldens = goldens();
        for (seed, (name, draw)) in SEEDS.into_iter().flat_map(|seed| DRAWS.map(|named| (seed, named))) {
            for (shape, count) in SHAPES {
                let key = format!("s{seed}.{name}.f32.{shape}");
                assert_same_bits(&draw(&mut TorchGenerator::new(seed), count), &goldens.f32s(&key), &key);
            }
        }
    }

    #[test]
    fn large_draws_have_torchs_ends_and_sums() {
        let goldens = goldens();
        for (seed, (name, draw)) in SEEDS.into_iter().flat_map(|seed| DRAWS.map(|named| (seed, named))) {
            let key = format!("s{seed}.{name}.f32.{}", LARGE.0);
            let values = draw(&mut TorchGenerator::new(seed), LARGE.1);
            assert_same_bits(&values[..64], &goldens.f32s(&format!("{key}.first64")), &key);
            assert_same_bits(&values[LARGE.1 - 64..], &goldens.f32s(&format!("{key}.last64")), &key);
            // torch sums in another order: n·2⁻⁵³ relative to the sum of magnitudes. One wrong last bit of
            // one element of size 1 would be 1e-7.
            let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
            let magnitude: f64 = values.iter().map(|&x| f64::from(x).abs()).sum();
            assert!((sum - goldens.f64s(&format!("{key}.sum_f64"))[0]).abs() < 2e-8, "{key}: sum {sum}");
            let expected = goldens.f64s(&format!("{key}.abs_sum_f64"))[0];
            assert!(
                (magnitude - expected).abs() < 2e-8,
                "{key}: sum of magnitudes {magnitude}, expected {expected}"
            );
        }
    }

    #[test]
    fn consecutive_draws_share_one_stream_and_the_spare_normal() {
        let goldens = goldens();
        for seed in SEEDS {
            let mut generator = TorchGenerator::new(seed);
            let draws: [(&str, Draw, usize); 5] = [
                ("randn3_a", TorchGenerator::randn, 3),
                ("randn3_b", TorchGenerator::randn, 3),
                ("randn16_c", TorchGenerator::randn, 16),
                ("rand5_d", TorchGenerator::rand, 5),
                ("randn1_e", TorchGenerator::randn, 1),
            ];
            for (name, draw, count) in draws {
                let key = format!("s{seed}.seq.{name}");
                assert_same_bits(&draw(&mut generator, count), &goldens.f32s(&key), &key);
            }
        }
    }

    #[test]
    fn integers_equal_torchs_in_narrow_and_wide_ranges() {
        let goldens = goldens();
        let ranges = [
            ("0_1000x20", 0, 1000),
            ("m5_17x20", -5, 17),
            ("0_2p32x8", 0, 1 << 32),
            ("0_2p40x8", 0, 1 << 40),
        ];
        for (seed, (name, low, high)) in SEEDS.into_iter().flat_map(|seed| ranges.map(|range| (seed, range)))
        {
            let expected = goldens.i64s(&format!("s{seed}.randint_{name}"));
            assert_eq!(
                TorchGenerator::new(seed).randint(low, high, expected.len()),
                expected,
                "seed {seed}, {name}"
            );
        }
        for seed in SEEDS {
            let mut generator = TorchGenerator::new(seed);
            let words: Vec<i64> = (0..4).map(|_| generator.random_int64()).collect();
            assert_eq!(words, goldens.i64s(&format!("s{seed}.random_int64")));
        }
    }

    fn indices(goldens: &Golden, key: &str) -> Vec<usize> {
        goldens.i64s(key).into_iter().map(|i| usize::try_from(i).unwrap()).collect()
    }

    #[test]
    fn permutations_equal_torchs() {
        let goldens = goldens();
        for (seed, count) in SEEDS.into_iter().flat_map(|seed| [1, 2, 5, 16, 100, 1000].map(|n| (seed, n))) {
            let order = TorchGenerator::new(seed).randperm(count);
            assert_eq!(order, indices(&goldens, &format!("s{seed}.randperm_{count}")));
        }
        assert!(TorchGenerator::new(0).randperm(0).is_empty());
    }

    #[test]
    fn two_epochs_of_a_loader_and_the_draw_after_them_equal_torchs() {
        let goldens = goldens();
        for seed in SEEDS {
            let mut global = TorchGenerator::new(seed);
            for epoch in 0..2 {
                assert_eq!(
                    global.loader_order(10),
                    indices(&goldens, &format!("s{seed}.dataloader10_epoch{epoch}"))
                );
            }
            let key = format!("s{seed}.global_randn_after");
            assert_same_bits(&global.randn(16), &goldens.f32s(&key), &key);
        }
    }

    #[test]
    fn latent_noise_fills_the_shape_in_row_major_order() {
        let noise = latent_noise(42, [1, 16, 8, 8], &Device::flex());
        assert_eq!(noise.dims(), [1, 16, 8, 8]);
        assert_same_bits(
            &fewstep_testkit::values(noise),
            &goldens().f32s("s42.randn.f32.1x16x8x8"),
            "latent noise",
        );
    }
}
