use burn::tensor::{Device, Tensor};
use fewstep_testkit::{Golden, assert_close, golden, values};
use serde_json::Value;

use super::templates::DIFFSYNTH;
use super::*;
use crate::{Solver, noise::latent_noise, trajectory};

const STEPS: [usize; 7] = [1, 2, 4, 8, 15, 40, 50];
const TOKENS: [usize; 4] = [256, 1024, 4096, 6889];
const DIFFSYNTH_TRAINING: Option<ShiftOverride> = Some(ShiftOverride::DiffsynthTraining);

/// A run with DiffSynth's rounding.
fn in_diffsynth(steps: usize, tokens: usize) -> GridRequest {
    GridRequest { rounding: SigmaRounding::Diffsynth, ..GridRequest::new(steps, tokens) }
}

fn goldens() -> Golden {
    Golden::open(golden("schedulers/schedulers.safetensors"))
}

fn config(name: &str) -> FlowMatchConfig {
    let text = std::fs::read_to_string(golden("schedulers/schedulers.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    FlowMatchConfig::from_value(all["configs"][name].clone()).unwrap()
}

/// Compares with the peer's sigmas and timesteps to the bit, or with 1 → 0 where the peer divides 0 by 0.
#[track_caller]
fn assert_grid(goldens: &Golden, key: &str, grid: &SigmaGrid) {
    assert_grid_within(goldens, key, grid, 0.0);
}

#[track_caller]
fn assert_grid_within(goldens: &Golden, key: &str, grid: &SigmaGrid, tolerance: f32) {
    let mut sigmas = goldens.f32s(&format!("{key}.sigmas"));
    let mut timesteps = goldens.f32s(&format!("{key}.timesteps"));
    if sigmas[0].is_nan() || key == NUMBER_BY_CHANCE {
        (sigmas[0], timesteps[0]) = (1.0, 1000.0);
    }
    // DiffSynth does not list the final 0.
    let ours = &grid.as_slice()[..sigmas.len()];
    let thousands: Vec<f32> = grid.pairs().map(|(sigma, _)| sigma * 1000.0).collect();
    assert_close(ours, &sigmas, tolerance);
    assert_close(&thousands, &timesteps, 1000.0 * tolerance);
}

/// At this μ the peer's e^μ · e^−μ rounds to less than 1, so that its 0/0 is a number: 0.02.
const NUMBER_BY_CHANCE: &str = "ds.Qwen-Image.n1.mu1.2";

#[test]
fn published_configs_equal_diffusers_at_every_size() {
    let goldens = goldens();
    for (name, steps) in ["Qwen-Image", "Qwen-Image-Lightning", "FLUX.1-dev"]
        .into_iter()
        .flat_map(|name| STEPS.map(|n| (name, n)))
    {
        for tokens in TOKENS {
            let grid = config(name).grid(&GridRequest::new(steps, tokens)).unwrap();
            assert_grid(&goldens, &format!("df.{name}.n{steps}.len{tokens}"), &grid);
        }
    }
    for steps in STEPS {
        let request = GridRequest::new(steps, 77);
        let schnell = config("FLUX.1-schnell").grid(&request).unwrap();
        assert_grid(&goldens, &format!("df.FLUX.1-schnell.n{steps}"), &schnell);
        let z_image = config("Z-Image").training_range_schedule().unwrap().grid(&request).unwrap();
        // It spaces timesteps, a thousand times the levels, whose quotients round once more.
        assert_grid_within(&goldens, &format!("df.Z-Image.n{steps}"), &z_image, 1.5e-7);
    }
}

#[test]
fn published_configs_describe_the_named_schedules() {
    for (name, schedule) in [
        ("Qwen-Image", Schedule::QWEN_IMAGE),
        ("Qwen-Image-Lightning", Schedule::QWEN_IMAGE_LIGHTNING),
        ("Z-Image", Schedule::Z_IMAGE),
    ] {
        assert_eq!(config(name).schedule().unwrap(), schedule, "{name}");
    }
}

#[test]
fn named_schedules_equal_diffsynth_at_every_size() {
    let goldens = goldens();
    for ((name, schedule), steps) in DIFFSYNTH.into_iter().flat_map(|named| STEPS.map(|n| (named, n))) {
        let request = GridRequest { shift: DIFFSYNTH_TRAINING, ..in_diffsynth(steps, 0) };
        assert_grid(&goldens, &format!("ds.{name}.n{steps}"), &schedule.grid(&request).unwrap());
        if !matches!(schedule.shift, Shift::Factor(_)) {
            for tokens in TOKENS {
                let grid = schedule.grid(&in_diffsynth(steps, tokens)).unwrap();
                assert_grid(&goldens, &format!("ds.{name}.n{steps}.len{tokens}"), &grid);
            }
        }
    }
}

#[test]
fn overridden_shifts_equal_diffsynth() {
    let goldens = goldens();
    for ((name, schedule), steps) in DIFFSYNTH.into_iter().flat_map(|named| STEPS.map(|n| (named, n))) {
        let overrides = match name {
            "Qwen-Image" | "Qwen-Image-Lightning" => {
                ["mu0.3", "mu0.8", "mu1.2"].map(|key| (key, ShiftOverride::Mu(key[2..].parse().unwrap())))
            }
            "FLUX.2" => continue,
            _ => ["shift1.0", "shift2.5", "shift8.0"]
                .map(|key| (key, ShiftOverride::Factor(key[5..].parse().unwrap()))),
        };
        for (key, shift) in overrides {
            // The size no longer matters.
            let request = GridRequest { shift: Some(shift), ..in_diffsynth(steps, 999) };
            let grid = schedule.grid(&request).unwrap();
            assert_grid(&goldens, &format!("ds.{name}.n{steps}.{key}"), &grid);
        }
    }
}

#[test]
fn a_lower_start_equals_diffsynth() {
    let goldens = goldens();
    for ((name, schedule), steps) in DIFFSYNTH.into_iter().flat_map(|named| STEPS.map(|n| (named, n))) {
        for denoising_strength in [1.0, 0.6] {
            let shift = DIFFSYNTH_TRAINING;
            let request = GridRequest { denoising_strength, shift, ..in_diffsynth(steps, 0) };
            let key = format!("ds.{name}.n{steps}.strength{denoising_strength:.1}");
            assert_grid(&goldens, &key, &schedule.grid(&request).unwrap());
        }
    }
}

#[test]
fn skipped_steps_leave_the_rest_of_the_whole_grid() {
    let whole = GridRequest::new(4, 1024);
    let levels = Schedule::QWEN_IMAGE.grid(&whole).unwrap();
    // diffusers: int(n − n·strength) steps are skipped.
    for (denoising_strength, skipped) in [(1.0, 0), (0.8, 0), (0.75, 1), (0.6, 1), (0.5, 2), (0.1, 3)] {
        let request = GridRequest { denoising_strength, strength_rule: StrengthRule::SkipSteps, ..whole };
        let rest = Schedule::QWEN_IMAGE.grid(&request).unwrap();
        assert_eq!(rest.as_slice(), &levels.as_slice()[skipped..], "strength {denoising_strength}");
    }
}

#[test]
fn one_step_goes_from_pure_noise_to_the_picture() {
    for (name, schedule) in DIFFSYNTH {
        for tokens in TOKENS {
            for request in [GridRequest::new(1, tokens), in_diffsynth(1, tokens)] {
                assert_eq!(schedule.grid(&request).unwrap().as_slice(), [1.0, 0.0], "{name}");
            }
        }
    }
}

/// States of the peer's scheduler fed with velocity k = randn(seed 12 + k) from x = randn(seed 11).
#[track_caller]
fn assert_rollout(goldens: &Golden, key: &str, grid: &SigmaGrid) {
    let device = Device::flex();
    let shape = [1, 4, 3, 3];
    let mut seed = 11;
    let states = trajectory(Solver::Euler, grid, latent_noise(seed, shape, &device), |_, _| {
        seed += 1;
        latent_noise(seed, shape, &device)
    });
    let expected: Tensor<5> = goldens.tensor(&format!("{key}.rollout"), &device);
    // Up to 50 additions of numbers below 4, each rounded to 2.4e-7 at most.
    assert_close(&values(Tensor::stack::<5>(states[1..].to_vec(), 0)), &values(expected), 5e-6);
}

#[test]
fn euler_rollouts_equal_diffusers() {
    let goldens = goldens();
    for steps in STEPS {
        let request = GridRequest::new(steps, 256);
        for name in ["Qwen-Image", "Qwen-Image-Lightning", "FLUX.1-dev"] {
            if (name, steps) != ("Qwen-Image", 1) {
                let grid = config(name).grid(&request).unwrap();
                assert_rollout(&goldens, &format!("df.{name}.n{steps}.len256"), &grid);
            }
        }
        let schnell = config("FLUX.1-schnell").grid(&request).unwrap();
        assert_rollout(&goldens, &format!("df.FLUX.1-schnell.n{steps}"), &schnell);
        let z_image = config("Z-Image").training_range_schedule().unwrap().grid(&request).unwrap();
        assert_rollout(&goldens, &format!("df.Z-Image.n{steps}"), &z_image);
    }
}

#[test]
fn euler_rollouts_equal_diffsynth() {
    let goldens = goldens();
    for ((name, schedule), steps) in DIFFSYNTH.into_iter().flat_map(|named| STEPS.map(|n| (named, n))) {
        if (name, steps) != ("Qwen-Image", 1) {
            let request = GridRequest { shift: DIFFSYNTH_TRAINING, ..in_diffsynth(steps, 0) };
            assert_rollout(&goldens, &format!("ds.{name}.n{steps}"), &schedule.grid(&request).unwrap());
        }
    }
}

#[test]
fn what_no_schedule_has_is_refused_by_name() {
    let refusal = |request| Schedule::QWEN_IMAGE.grid(&request).unwrap_err().to_string();
    let run = GridRequest::new(4, 256);
    for found in [0, 1_000_000_000] {
        let refused = Schedule::QWEN_IMAGE.grid(&GridRequest::new(found, 256));
        assert!(matches!(refused, Err(FlowError::Steps { found: named }) if named == found), "{refused:?}");
    }
    for denoising_strength in [0.0, 1.5, f64::NAN] {
        assert_eq!(
            refusal(GridRequest { denoising_strength, ..run }),
            format!(
                "sampling: denoising_strength: found {denoising_strength}, expected more than 0 and at most 1"
            )
        );
    }
    for (shift, expected) in [
        (
            ShiftOverride::Mu(1e9),
            "exponential_shift_mu: found 1000000000, expected a number between -80 and 80",
        ),
        (
            ShiftOverride::Mu(f64::NAN),
            "exponential_shift_mu: found NaN, expected a number between -80 and 80",
        ),
        (ShiftOverride::Factor(-2.0), "shift: found -2, expected a positive number"),
        (ShiftOverride::Factor(0.0), "shift: found 0, expected a positive number"),
    ] {
        assert_eq!(refusal(GridRequest { shift: Some(shift), ..run }), format!("sampling: {expected}"));
    }
}
