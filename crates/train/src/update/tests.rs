//! Each optimiser against the package that defines it: ten steps from the same start with the same gradients.

use burn::tensor::{Device, Tensor};
use fewstep_kernels::with_plain_twins;
use fewstep_testkit::{Golden, assert_close, golden, values};

use super::{Kind, Memory, Rule, Step};
use crate::recipe::{OptimizerName, Recipe};

const STEPS: u64 = 10;
const DECAY: f64 = 0.1;
/// Ten steps that round parameters of up to 4, whose spacing is 2.4e-7, two times each.
const TOLERANCE: f32 = 2e-6;

/// Runs the ten steps with a learning rate `factor` times that of the golden numbers.
struct Replay {
    golden: Golden,
    rule: Rule,
    name: &'static str,
    factor: f64,
}

impl Replay {
    fn new(optimizer: OptimizerName, name: &'static str) -> Self {
        let recipe = Recipe { optimizer, adam_beta_2: 0.99, prodigy_d_coef: 2.0, ..Recipe::default() };
        let golden = Golden::open(golden("optimizers/optimizers.safetensors"));
        Self { golden, rule: Rule::new(&recipe), name, factor: 1.0 }
    }

    fn at(&self, number: u64) -> Step {
        let rates = self.golden.f64s("rates");
        // The gradients come at twice their length, as if clipping had to halve them.
        let learning_rate = self.factor * rates[number as usize - 1];
        Step { learning_rate, gradient_scale: 0.5, number, weight_decay: DECAY }
    }

    fn gradient<const D: usize>(&self, parameter: &str, number: u64) -> Tensor<D> {
        self.golden.tensor::<D>(&format!("gradient{number}.{parameter}"), &Device::flex()) * 2.0
    }

    #[track_caller]
    fn compare<const D: usize>(&self, parameter: &str, number: u64, found: Tensor<D>, tolerance: f32) {
        if number == 1 || number == STEPS {
            let key = format!("{}.step{number}.{parameter}", self.name);
            assert_close(&values(found), &self.golden.f32s(&key), tolerance);
        }
    }

    /// One parameter through all steps; returns its memory.
    #[track_caller]
    fn run<const D: usize>(&self, parameter: &str) -> Memory {
        let mut value: Tensor<D> = self.golden.tensor(&format!("start.{parameter}"), &Device::flex());
        let kind = if D == 2 { Kind::Matrix } else { Kind::Other };
        let mut memory = self.rule.fresh(&value, kind);
        for number in 1..=STEPS {
            value = self.rule.apply(value, self.gradient(parameter, number), &mut memory, &self.at(number));
            self.compare(parameter, number, value.clone(), TOLERANCE);
        }
        memory
    }
}

#[test]
fn adamw_has_torchs_numbers_in_both_versions() {
    let replay = Replay::new(OptimizerName::Adamw, "adamw");
    let run = || {
        replay.run::<2>("wide");
        replay.run::<2>("tall");
        replay.run::<1>("vector");
    };
    run();
    with_plain_twins(run);
}

#[test]
fn adamw8bit_has_bitsandbytes_numbers_and_codes() {
    let replay = Replay::new(OptimizerName::Adamw8bit, "adamw8bit");
    let Memory::Moments8bit(moments) = replay.run::<2>("wide") else { panic!("4,290 elements are not few") };
    for (codes, key) in [(&moments.first.codes, "state1"), (&moments.second.codes, "state2")] {
        let expected = replay.golden.i64s(&format!("adamw8bit.{key}"));
        let different =
            codes.iter().zip(&expected).filter(|(found, expected)| i64::from(**found) != **expected);
        assert_eq!(different.count(), 0, "codes of {key}");
    }
    for (scales, key) in [(&moments.first.scales, "absmax1"), (&moments.second.scales, "absmax2")] {
        assert_close(scales, &replay.golden.f32s(&format!("adamw8bit.{key}")), 1e-7);
    }
    // Fewer than 4,096 elements are not quantised.
    assert!(matches!(replay.run::<2>("tall"), Memory::Moments(_)));
    replay.run::<1>("vector");
}

#[test]
fn adafactor_has_the_numbers_of_transformers() {
    let replay = Replay::new(OptimizerName::Adafactor, "adafactor");
    replay.run::<2>("wide");
    replay.run::<2>("tall");
    replay.run::<1>("vector");
}

#[test]
fn muon_has_torchs_numbers_for_matrices_and_adamws_for_the_rest() {
    let replay = Replay::new(OptimizerName::Muon, "muon");
    replay.run::<2>("wide");
    replay.run::<2>("tall");
    replay.run::<1>("vector");
}

/// All parameters together: they share the estimate. The start is scaled as that of the golden numbers.
#[test]
fn prodigy_has_the_numbers_and_the_estimate_of_its_package() {
    const SCALE: f32 = 1.0 / 1024.0;
    let mut replay = Replay { factor: 500.0, ..Replay::new(OptimizerName::Prodigy, "prodigy") };
    let device = Device::flex();
    let start = |name: &str| replay.golden.tensor::<2>(&format!("start.{name}"), &device) * SCALE;
    let mut matrices =
        ["wide", "tall"].map(|name| (name, start(name), Memory::travelled(&values(start(name)))));
    let mut vector = replay.golden.tensor::<1>("start.vector", &device) * SCALE;
    let mut vector_memory = replay.rule.fresh(&vector, Kind::Other);
    for number in 1..=STEPS {
        let at = replay.at(number);
        let gradient = values(replay.gradient::<1>("vector", number));
        let gradients = ["wide", "tall"].map(|name| values(replay.gradient::<2>(name, number)));
        let Rule::Prodigy(prodigy) = &mut replay.rule else { panic!("the rule is Prodigy's") };
        let mut total =
            prodigy.take_in(&values(vector.clone()), &gradient, vector_memory.as_travelled(), &at);
        for ((_, value, memory), gradient) in matrices.iter_mut().zip(&gradients) {
            total += prodigy.take_in(&values(value.clone()), gradient, memory.as_travelled(), &at);
        }
        prodigy.advance(total, &at);
        vector = replay.rule.apply(vector, replay.gradient("vector", number), &mut vector_memory, &at);
        replay.compare("vector", number, vector.clone(), TOLERANCE);
        for (name, value, memory) in &mut matrices {
            *value = replay.rule.apply(value.clone(), replay.gradient(name, number), memory, &at);
            replay.compare(name, number, value.clone(), TOLERANCE);
        }
    }
    let Rule::Prodigy(prodigy) = &replay.rule else { panic!("the rule is Prodigy's") };
    let expected = replay.golden.f64s("prodigy.d")[0];
    // The package sums in f32.
    assert!((prodigy.estimate.distance / expected - 1.0).abs() < 1e-5, "{prodigy:?}, expected {expected}");
}
