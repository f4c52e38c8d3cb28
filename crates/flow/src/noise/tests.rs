use super::*;
use burn::tensor::Device;
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

type Draw = fn(&mut TorchGenerator, usize, NoiseType) -> Vec<f32>;
const DRAWS: [(&str, Draw); 2] = [("randn", TorchGenerator::randn_as), ("rand", TorchGenerator::rand_as)];
const TYPES: [(&str, NoiseType); 3] =
    [("f32", NoiseType::F32), ("f16", NoiseType::F16), ("bf16", NoiseType::Bf16)];

/// The golden's key up to the shape, and the draw, of each seed, function and type.
fn draws() -> impl Iterator<Item = (String, impl Fn(usize) -> Vec<f32>)> {
    SEEDS.into_iter().flat_map(|seed| {
        DRAWS.into_iter().flat_map(move |(name, draw)| {
            TYPES.map(|(suffix, dtype)| {
                let drawn = move |count| draw(&mut TorchGenerator::new(seed), count, dtype);
                (format!("s{seed}.{name}.{suffix}"), drawn)
            })
        })
    })
}

#[test]
fn draws_of_every_length_and_type_have_torchs_bits() {
    let goldens = goldens();
    for (key, draw) in draws() {
        for (shape, count) in SHAPES {
            let key = format!("{key}.{shape}");
            assert_same_bits(&draw(count), &goldens.f32s(&key), &key);
        }
    }
}

#[test]
fn large_draws_have_torchs_ends_and_sums() {
    let goldens = goldens();
    for (key, draw) in draws() {
        let key = format!("{key}.{}", LARGE.0);
        let values = draw(LARGE.1);
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
fn whole_chunks_below_f32_are_f32_draws_rounded() {
    let goldens = goldens();
    for (seed, (suffix, dtype)) in
        SEEDS.into_iter().flat_map(|seed| [TYPES[1], TYPES[2]].map(|named| (seed, named)))
    {
        let key = format!("s{seed}.randn_f32_cast.{suffix}.1x16x8x8");
        let drawn = TorchGenerator::new(seed).randn_as(1024, dtype);
        assert_same_bits(&drawn, &goldens.f32s(&key), &key);
    }
}

#[test]
fn a_strided_tensor_is_filled_by_single_draws_in_memory_order() {
    let goldens = goldens();
    for seed in SEEDS {
        let mut generator = TorchGenerator::new(seed);
        let drawn: Vec<f32> = (0..32).flat_map(|_| generator.randn(1)).collect();
        let expected = goldens.f32s(&format!("s{seed}.normal_noncontig_8x4"));
        // The golden is the transpose, [8, 4], of the memory, [4, 8].
        let logical: Vec<f32> = (0..32).map(|at| drawn[at % 4 * 8 + at / 4]).collect();
        assert_same_bits(&logical, &expected, "strided");
    }
}

#[test]
fn f64_draws_below_a_chunk_are_the_f32_ones_before_rounding() {
    let goldens = goldens();
    for (seed, count) in SEEDS.into_iter().flat_map(|seed| [7, 15].map(|count| (seed, count))) {
        let (mut normal, mut uniform) = (TorchGenerator::new(seed), TorchGenerator::new(seed));
        for (index, expected) in goldens.f64s(&format!("s{seed}.randn.f64.{count}")).into_iter().enumerate() {
            // The last bits of logarithm, sine and cosine are the libm's.
            assert!((normal.next_normal() - expected).abs() < 2e-15, "seed {seed}, element {index}");
        }
        let expected = goldens.f64s(&format!("s{seed}.rand.f64.{count}"));
        assert_eq!((0..count).map(|_| uniform.words.next_unit()).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn consecutive_draws_share_one_stream_and_the_spare_normal() {
    let goldens = goldens();
    for seed in SEEDS {
        let mut generator = TorchGenerator::new(seed);
        for (name, draw, count) in [
            ("randn3_a", DRAWS[0].1, 3),
            ("randn3_b", DRAWS[0].1, 3),
            ("randn16_c", DRAWS[0].1, 16),
            ("rand5_d", DRAWS[1].1, 5),
            ("randn1_e", DRAWS[0].1, 1),
        ] {
            let key = format!("s{seed}.seq.{name}");
            assert_same_bits(&draw(&mut generator, count, NoiseType::F32), &goldens.f32s(&key), &key);
        }
    }
}

#[test]
fn integers_equal_torchs_in_narrow_and_wide_ranges() {
    let goldens = goldens();
    let ranges =
        [("0_1000x20", 0, 1000), ("m5_17x20", -5, 17), ("0_2p32x8", 0, 1 << 32), ("0_2p40x8", 0, 1 << 40)];
    for (seed, (name, low, high)) in SEEDS.into_iter().flat_map(|seed| ranges.map(|range| (seed, range))) {
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

#[test]
fn a_source_chooses_the_generator_and_the_type() {
    let noise = |source: NoiseSource| {
        fewstep_testkit::values(source.latent_noise(42, [1, 16, 8, 8], &Device::flex()))
    };
    let half = NoiseSource { dtype: NoiseType::Bf16, ..NoiseSource::default() };
    assert_same_bits(&noise(half), &goldens().f32s("s42.randn.bf16.1x16x8x8"), "bf16 noise");
    let cuda = NoiseSource { rand_device: "cuda".parse().unwrap(), ..NoiseSource::default() };
    let emulated = Golden::open(golden("rng/rng_emulated_unverified.safetensors"));
    assert_same_bits(&noise(cuda), &emulated.f32s("s42.cuda_philox_randn.f32.1024"), "cuda noise");
}

#[test]
fn an_unknown_rand_device_is_refused() {
    let message = "tpu".parse::<RandDevice>().unwrap_err().to_string();
    assert_eq!(message, r#"sampling: rand_device: found "tpu", expected cpu or cuda"#);
}
