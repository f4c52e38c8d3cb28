use burn::tensor::{Device, Tensor};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, golden, random, values};
use serde_json::{Value, json};

use super::*;
use crate::noise::latent_noise;
use crate::path;
use crate::schedule::{GridRequest, SigmaRounding};
use crate::{SigmaGrid, Solver, sample, trajectory};

const STEPS: [usize; 7] = [1, 2, 4, 8, 15, 40, 50];

fn goldens() -> Golden {
    Golden::open(golden("schedulers/schedulers.safetensors"))
}

/// A golden config with its class and some changes.
fn config(name: &str, class: &str, changes: &Value) -> DiffusionConfig {
    let text = std::fs::read_to_string(golden("schedulers/schedulers.json")).unwrap();
    let mut config = serde_json::from_str::<Value>(&text).unwrap()["configs"][name].take();
    config["_class_name"] = class.into();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    DiffusionConfig::from_value(config).unwrap()
}

fn ddim() -> DiffusionConfig {
    config("ddim", "DDIMScheduler", &json!({}))
}

fn euler() -> DiffusionConfig {
    config("euler", "EulerDiscreteScheduler", &json!({}))
}

fn in_diffsynth(steps: usize) -> GridRequest {
    GridRequest { rounding: SigmaRounding::Diffsynth, ..GridRequest::new(steps, 0) }
}

fn timesteps(config: &DiffusionConfig, grid: &SigmaGrid) -> Vec<f32> {
    let starts: Vec<f32> = grid.pairs().map(|pair| pair.0).collect();
    values(config.table().timestep(Tensor::from_floats(&*starts, &Device::flex())))
}

/// The states of a run whose network says the same whatever it sees: the goldens' random outputs.
fn rollout(config: &DiffusionConfig, grid: &SigmaGrid, prediction: Prediction) -> Vec<Tensor<4>> {
    let device = Device::flex();
    let noise = latent_noise(11, [1, 4, 3, 3], &device);
    let mut seed = 11;
    let start = noise * config.start_scale(grid.as_slice()[0]);
    trajectory(Solver::Euler, grid, start, |state, sigma| {
        seed += 1;
        let predicted = latent_noise(seed, [1, 4, 3, 3], &device);
        prediction.velocity(predicted, state, Tensor::from_floats([sigma], &device))
    })
}

#[test]
fn clean_variances_equal_the_peers_to_the_bit() {
    let goldens = goldens();
    let betas = [0.00085, 0.012];
    let found = table::clean_variances(table::BetaSchedule::ScaledLinear, betas, 1000);
    assert_close(&found, &goldens.f32s("df.alphas_cumprod_scaled_linear"), 0.0);
    let mut zero = found;
    table::to_zero_terminal_snr(&mut zero);
    // Three roundings of 3e-8 before the square, which doubles them (measured: 1.8e-7).
    assert_close(&zero, &goldens.f32s("ds.ddim.v_prediction.zsnrTrue.alphas_cumprod"), 2e-7);
}

#[test]
fn the_timesteps_of_the_published_pipelines_equal_diffusers() {
    let goldens = goldens();
    for (name, config) in [("ddim", ddim()), ("euler", euler())] {
        for steps in STEPS {
            let grid = config.grid(&GridRequest::new(steps, 0)).unwrap();
            assert_close(
                &timesteps(&config, &grid),
                &goldens.f32s(&format!("df.{name}.n{steps}.timesteps")),
                0.0,
            );
        }
    }
}

#[test]
fn the_noise_levels_of_eulers_grids_equal_diffusers() {
    let goldens = goldens();
    for steps in STEPS {
        let grid = euler().grid(&GridRequest::new(steps, 0)).unwrap();
        let ratios: Vec<f32> = grid.as_slice().iter().map(|sigma| sigma / (1.0 - sigma)).collect();
        // σ has 6e-8, which 1/(1 − σ)² raises to 1.5e-5 at s/a = 14.6.
        assert_close(&ratios, &goldens.f32s(&format!("df.euler.n{steps}.sigmas")), 3e-5);
        let first = grid.as_slice()[0];
        let start = euler().start_scale(first) / (1.0 - first);
        assert_close(&[start], &goldens.f32s(&format!("df.euler.n{steps}.init_noise_sigma")), 3e-5);
    }
}

#[test]
fn diffsynths_timesteps_are_equally_far_from_the_last_to_the_first() {
    let goldens = goldens();
    for prediction in ["epsilon", "v_prediction"] {
        for zero in [false, true] {
            let changes = json!({"prediction_type": prediction, "rescale_betas_zero_snr": zero});
            let config = config("ddim", "DDIMScheduler", &changes);
            for steps in STEPS {
                let grid = config.grid(&in_diffsynth(steps)).unwrap();
                let name = if zero { "True" } else { "False" };
                let key = format!("ds.ddim.{prediction}.zsnr{name}.n{steps}.timesteps");
                assert_close(&timesteps(&config, &grid), &goldens.f32s(&key), 0.0);
                assert_eq!(grid.end(), 0.0);
            }
        }
    }
}

#[test]
fn ddim_is_eulers_step_on_the_straight_path() {
    let (goldens, device) = (goldens(), Device::flex());
    for steps in STEPS {
        let grid = ddim().grid(&GridRequest::new(steps, 0)).unwrap();
        let states = rollout(&ddim(), &grid, Prediction::Noise);
        let preserving = states[1..].iter().zip(&grid.as_slice()[1..]);
        let found = preserving.map(|(state, sigma)| state.clone() / scale(*sigma)).collect();
        let expected: Tensor<5> = goldens.tensor(&format!("df.ddim.n{steps}.rollout"), &device);
        // Random outputs leave states of up to 40, whose last bits 50 steps pass on.
        assert_tensors_close(Tensor::stack(found, 0), expected, 1e-4);
    }
}

#[test]
fn diffsynths_ddim_of_noise_and_of_angular_velocities_is_it_too() {
    let (goldens, device) = (goldens(), Device::flex());
    for (name, prediction, zero) in [
        ("epsilon.zsnrFalse", Prediction::Noise, false),
        ("v_prediction.zsnrFalse", Prediction::Angular, false),
        ("v_prediction.zsnrTrue", Prediction::Angular, true),
    ] {
        let config = config("ddim", "DDIMScheduler", &json!({"rescale_betas_zero_snr": zero}));
        for steps in STEPS {
            let grid = config.grid(&in_diffsynth(steps)).unwrap();
            let states = rollout(&config, &grid, prediction);
            let preserving = states[1..].iter().zip(&grid.as_slice()[1..]);
            let found = preserving.map(|(state, sigma)| state.clone() / scale(*sigma)).collect();
            let expected: Tensor<5> = goldens.tensor(&format!("ds.ddim.{name}.n{steps}.rollout"), &device);
            // As above.
            assert_tensors_close(Tensor::stack(found, 0), expected, 1e-4);
        }
    }
}

#[test]
fn eulers_steps_are_those_of_k_diffusion() {
    let (goldens, device) = (goldens(), Device::flex());
    for steps in STEPS {
        let grid = euler().grid(&GridRequest::new(steps, 0)).unwrap();
        let states = rollout(&euler(), &grid, Prediction::Noise);
        let sigma = |index: usize| grid.as_slice()[index];
        let shown = (0..steps).map(|step| states[step].clone() / scale(sigma(step))).collect();
        let exploding = (1..=steps).map(|step| states[step].clone() / (1.0 - sigma(step))).collect();
        for (what, found) in [("scaled_inputs", shown), ("rollout", exploding)] {
            let expected: Tensor<5> = goldens.tensor(&format!("df.euler.n{steps}.{what}"), &device);
            // As above; the states of k-diffusion reach 60.
            assert_tensors_close(Tensor::stack(found, 0), expected, 1e-4);
        }
    }
}

#[test]
fn noised_pictures_and_targets_equal_diffsynths_whatever_is_predicted() {
    let (goldens, device) = (goldens(), Device::flex());
    let [clean, noise] = ["query.x0", "query.eps"].map(|key| goldens.tensor::<2>(key, &device));
    for (name, prediction) in [("epsilon", Prediction::Noise), ("v_prediction", Prediction::Angular)] {
        for timestep in [0, 250, 777, 999] {
            let golden = |what| {
                goldens.tensor::<2>(&format!("ds.ddim.{name}.zsnrFalse.query{timestep}.{what}"), &device)
            };
            let sigma = ddim().table().sigmas()[timestep];
            let sigmas = || Tensor::<1>::from_floats([sigma; 2], &device);
            let noisy = path::noisy(clean.clone(), noise.clone(), sigmas());
            // Last bits of numbers below 4.
            assert_tensors_close(preserving(noisy.clone(), sigmas()), golden("add_noise"), 1e-6);
            let velocity = prediction.velocity(golden("target"), noisy, sigmas());
            // The same divided by 1 − σ, at least 0.064.
            assert_tensors_close(velocity, path::velocity(clean.clone(), noise.clone()), 2e-5);
        }
    }
}

#[test]
fn a_predicted_picture_has_the_velocity_that_leads_to_it() {
    let device = Device::flex();
    let (clean, noise) = (random::<2>([2, 5], 1, &device), random::<2>([2, 5], 2, &device));
    let sigma = Tensor::<1>::from_floats([0.4, 0.9], &device);
    let noisy = path::noisy(clean.clone(), noise.clone(), sigma.clone());
    let found = Prediction::Clean.velocity(clean.clone(), noisy, sigma);
    assert_tensors_close(found, path::velocity(clean, noise), 1e-6);
}

#[test]
fn all_levels_weigh_alike_in_what_is_predicted() {
    let device = Device::flex();
    for prediction in [Prediction::Noise, Prediction::Angular, Prediction::Clean] {
        for sigma in [0.1f32, 0.5, 0.9] {
            let at = || Tensor::<1>::from_floats([sigma], &device);
            let noisy = || Tensor::<2>::from_floats([[0.3]], &device);
            let velocity = |predicted: f32| {
                let predicted = Tensor::<2>::from_floats([[predicted]], &device);
                values(prediction.velocity(predicted, noisy(), at()))[0]
            };
            // An error of 1 in the prediction.
            let error = velocity(1.5) - velocity(0.5);
            assert_close(&[error * error * prediction.loss_weight(sigma)], &[1.0], 1e-5);
        }
    }
}

#[test]
fn timesteps_between_two_are_linear_in_the_ratio_and_stay_in_the_table() {
    let table = ddim().table();
    let device = Device::flex();
    let timestep = |sigma: f32| values(table.timestep(Tensor::from_floats([sigma], &device)))[0];
    for expected in [0.25, 499.5, 998.75] {
        // One last bit of σ is 1.5e-4 timesteps near the last one.
        assert_close(&[timestep(table.sigma(expected))], &[expected as f32], 3e-4);
    }
    assert_eq!((timestep(0.0), timestep(1.0)), (0.0, 999.0));
}

#[test]
fn every_spacing_takes_diffusers_timesteps() {
    let of = |spacing: &str, steps| {
        let config = config("ddim", "DDIMScheduler", &json!({"timestep_spacing": spacing}));
        timesteps(&config, &config.grid(&GridRequest::new(steps, 0)).unwrap())
    };
    assert_close(&of("leading", 4), &[751.0, 501.0, 251.0, 1.0], 0.0);
    assert_close(&of("trailing", 4), &[999.0, 749.0, 499.0, 249.0], 0.0);
    // diffusers' last step, from timestep 0 to the noise of timestep 0, changes nothing.
    assert_close(&of("linspace", 4), &[999.0, 666.0, 333.0], 0.0);
}

/// The last state of a run, as diffusers leaves it, of the network of [`rollout`].
fn last_state(config: &DiffusionConfig, steps: usize) -> Tensor<4> {
    let device = Device::flex();
    let grid = config.grid(&GridRequest::new(steps, 0)).unwrap();
    let mut seed = 11;
    let start = latent_noise(seed, [1, 4, 3, 3], &device) * config.start_scale(grid.as_slice()[0]);
    let state = sample(config.solver(), &grid, start, |state, sigma| {
        seed += 1;
        let predicted = latent_noise(seed, [1, 4, 3, 3], &device);
        config.prediction_type.velocity(predicted, state, Tensor::from_floats([sigma], &device))
    });
    state / config.end_scale(grid.end())
}

#[track_caller]
fn assert_last_state(config: &DiffusionConfig, steps: usize, key: &str) {
    let goldens = Golden::open(golden("schedulers/spacings.safetensors"));
    let expected: Tensor<4> = goldens.tensor(key, &Device::flex());
    let largest: f32 = expected.clone().abs().max().into_scalar();
    // Last bits of a few steps through states of up to 60.
    assert_tensors_close(last_state(config, steps), expected, 1e-5 * largest.max(1.0));
}

#[test]
fn ddim_steps_end_where_diffusers_ends_them_and_not_at_the_next_timestep() {
    for spacing in ["linspace", "trailing"] {
        for (name, one) in [("one", true), ("first", false)] {
            for steps in [4, 7] {
                let changes = json!({"timestep_spacing": spacing, "set_alpha_to_one": one});
                let config = config("ddim", "DDIMScheduler", &changes);
                assert_last_state(&config, steps, &format!("ddim.{spacing}.{name}.n{steps}"));
            }
        }
    }
}

#[test]
fn pndm_foretells_what_the_network_predicts() {
    for kind in ["epsilon", "v_prediction"] {
        // A key that diffusers' class does not know.
        let changes =
            json!({"prediction_type": kind, "skip_prk_steps": true, "rescale_betas_zero_snr": true});
        let config = config("ddim", "PNDMScheduler", &changes);
        for steps in [2, 6] {
            assert_last_state(&config, steps, &format!("pndm.{kind}.n{steps}"));
        }
    }
}

#[test]
fn pndm_with_steps_of_other_lengths_is_refused_by_name() {
    let changes = json!({"timestep_spacing": "trailing", "skip_prk_steps": true});
    let config = config("ddim", "PNDMScheduler", &changes);
    assert!(config.grid(&GridRequest::new(4, 0)).is_ok());
    let error = config.grid(&GridRequest::new(7, 0)).unwrap_err().to_string();
    assert!(error.contains("timestep_spacing: found trailing with 7 steps, expected leading"), "{error}");
}

#[test]
fn euler_leaves_the_noise_beside_the_whole_picture() {
    let config = config("euler", "EulerDiscreteScheduler", &json!({"final_sigmas_type": "sigma_min"}));
    assert_last_state(&config, 4, "euler.sigma_min.n4");
}

#[test]
fn keys_of_other_classes_are_ignored_as_diffusers_ignores_them() {
    let changes = json!({"clip_sample": true, "skip_prk_steps": false, "thresholding": true});
    config("euler", "EulerDiscreteScheduler", &changes);
}

#[test]
fn a_lower_strength_starts_later() {
    let strength = |rounding| {
        let request = GridRequest { denoising_strength: 0.5, rounding, ..GridRequest::new(4, 0) };
        timesteps(&ddim(), &ddim().grid(&request).unwrap())
    };
    assert_close(&strength(SigmaRounding::Diffusers), &[251.0, 1.0], 0.0);
    assert_close(&strength(SigmaRounding::Diffsynth), &[499.0, 333.0, 166.0, 0.0], 0.0);
}

#[test]
fn what_cannot_be_followed_is_refused_by_name() {
    let refusal = |class: &str, changes: Value| {
        let mut config = json!({"_class_name": class, "clip_sample": false, "skip_prk_steps": true});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        DiffusionConfig::from_value(config).unwrap_err().to_string()
    };
    for (class, changes, expected) in [
        ("DDIMScheduler", json!({"clip_sample": true}), "clip_sample: found true, expected false"),
        ("DDIMScheduler", json!({"beta_end": 1.5}), "beta_start: found 0.0001, expected more than 0"),
        ("PNDMScheduler", json!({"skip_prk_steps": false}), "skip_prk_steps: found false, expected true"),
        ("EulerDiscreteScheduler", json!({"use_karras_sigmas": true}), "use_karras_sigmas: found true"),
        ("EulerDiscreteScheduler", json!({"num_train_timesteps": 1}), "num_train_timesteps: found 1"),
        (
            "PNDMScheduler",
            json!({"prediction_type": "sample"}),
            "prediction_type: found sample, expected epsilon",
        ),
        ("DDIMScheduler", json!({"prediction_type": "flow"}), "unknown variant `flow`"),
    ] {
        let message = refusal(class, changes);
        assert!(message.contains(expected), "{message}");
    }
    let absent =
        DiffusionConfig::from_value(json!({"_class_name": "DDIMScheduler"})).unwrap_err().to_string();
    assert!(absent.contains("clip_sample: found true"), "DDIM clips unless told otherwise: {absent}");
}

#[test]
fn runs_that_no_such_schedule_has_are_refused() {
    let refusal = |request: GridRequest| ddim().grid(&request).unwrap_err().to_string();
    let many = refusal(GridRequest::new(1001, 0));
    assert!(many.contains("num_inference_steps: found 1001, expected at most as many as training"), "{many}");
    let shift = Some(crate::schedule::ShiftOverride::Mu(0.8));
    let shifted = refusal(GridRequest { shift, ..GridRequest::new(4, 0) });
    assert!(shifted.contains("exponential_shift_mu: found 0.8, expected none"), "{shifted}");
}

#[test]
fn the_multistep_solver_is_exact_where_the_noise_is_a_cubic_of_the_step() {
    // Of order four once it remembers four steps; here the noise is constant, which every step meets.
    let device = Device::flex();
    let noise = random::<2>([1, 6], 3, &device);
    let grid = ddim().grid(&GridRequest::new(6, 0)).unwrap();
    let clean = random::<2>([1, 6], 4, &device);
    let velocity = |_: Tensor<2>, _: f32| noise.clone() - clean.clone();
    let at = |sigma: f32| clean.clone() * (1.0 - sigma) + noise.clone() * sigma;
    let found = sample(Solver::Plms, &grid, at(grid.as_slice()[0]), velocity);
    assert_tensors_close(found, at(grid.end()), 2e-6);
}
