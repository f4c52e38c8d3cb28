//! Whole runs against diffusers' pipelines.

use burn::tensor::Tensor;
use fewstep_flow::diffusion::scale;
use fewstep_models::{Conventions, Generated, ModelSource, Peer, Pipeline, PipelineOptions, Request};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, copy_folder, golden};
use serde_json::Value;

use crate::{numbers, source};

/// Absolute, on unit-scale latents after a whole run.
const TOLERANCE: f32 = 5e-5;

/// The settings of a golden run.
fn request(family: &str, name: &str) -> Request {
    let text =
        std::fs::read_to_string(golden(&format!("{family}/goldens.json"))).expect("the golden is there");
    let all: Value = serde_json::from_str(&text).expect("JSON");
    let run = &all[name];
    let number = |key: &str| run[key].as_u64().expect("a number");
    let text = |key: &str| run[key].as_str().unwrap_or_default().to_owned();
    Request {
        negative_prompt: text("negative_prompt"),
        seed: number("seed"),
        num_inference_steps: number("num_inference_steps") as usize,
        cfg_scale: run["guidance_scale"].as_f64().expect("a number") as f32,
        keep_trajectory: true,
        ..Request::new(text("prompt"), number("height") as usize, number("width") as usize)
    }
}

fn generate(source: ModelSource, request: &Request) -> Generated {
    let pipeline =
        Pipeline::from_pretrained(source, PipelineOptions::default()).expect("the golden model loads");
    pipeline.generate(request).expect("it draws")
}

/// Compares a run with the peer's states, in the scale that its scheduler keeps them, and the picture with its PNG.
#[track_caller]
fn assert_run(golden: &Golden, (family, name): (&str, &str), found: &Generated, scale: impl Fn(f32) -> f32) {
    let states = found.trajectory.clone().expect("it was asked for");
    let sigmas = found.sigmas.as_slice();
    let scaled = |step: usize| states.clone().narrow(0, step, 1) / scale(sigmas[step]);
    let expected: Tensor<5> = golden.tensor(&format!("{name}.latents"), &states.device());
    // A multi-step solver's first step has two states at the peer.
    let extra = expected.dims()[0] - found.sigmas.steps();
    for step in 1..sigmas.len() {
        let expected = expected.clone().narrow(0, step - 1 + extra, 1).squeeze_dim::<4>(0);
        assert_tensors_close(scaled(step), expected, TOLERANCE * scale_of(&scaled(step)));
    }
    let last = expected.narrow(0, sigmas.len() - 2 + extra, 1).squeeze_dim::<4>(0);
    assert_tensors_close(found.latents.clone(), last, TOLERANCE * scale_of(&found.latents));
    assert_picture(golden, (family, name), found);
}

/// Compares a picture with the peer's PNG. Where the peer's value is this near to the middle of two levels (measured: 6e-5),
/// last bits decide which it becomes.
#[track_caller]
fn assert_picture(golden: &Golden, (family, name): (&str, &str), found: &Generated) {
    const TIE: f32 = 1e-3;
    let png = crate::golden_picture(&format!("{family}/{name}.png"));
    assert_eq!(found.picture().size(), png.size(), "{name}");
    let values = golden.f32s(&format!("{name}.image01"));
    for ((level, peer), value) in found.picture().rgb.iter().zip(&png.rgb).zip(values) {
        let scaled = value * 255.0;
        let tie = level.abs_diff(*peer) == 1 && (scaled - scaled.floor() - 0.5).abs() < TIE;
        assert!(level == peer || tie, "{name}: found {level}, expected {peer}, from {scaled}");
    }
}

/// States of k-diffusion reach 15.
fn scale_of(state: &Tensor<4>) -> f32 {
    let largest: f32 = state.clone().abs().max().into_scalar();
    largest.max(1.0)
}

#[test]
fn ddim_runs_equal_diffusers_with_and_without_guidance() {
    let golden = numbers("sd15");
    for name in ["ddim_s4_cfg1", "ddim_s6_cfg7.5"] {
        let found = generate(source("sd15"), &request("sd15", name));
        assert_run(&golden, ("sd15", name), &found, scale);
    }
}

#[test]
fn euler_runs_equal_diffusers_with_a_negative_prompt_and_with_zeros_for_none() {
    let golden = numbers("sdxl");
    for name in ["euler_s4_cfg1", "euler_s6_cfg5", "euler_s4_cfg3_noneg"] {
        let found = generate(source("sdxl"), &request("sdxl", name));
        let ratios: Vec<f32> = found.sigmas.as_slice().iter().map(|sigma| sigma / (1.0 - sigma)).collect();
        assert_close(&ratios, &golden.f32s(&format!("{name}.sigmas")), 3e-5);
        assert_run(&golden, ("sdxl", name), &found, |sigma| 1.0 - sigma);
    }
}

#[test]
fn a_pndm_scheduler_brings_its_solver() {
    let folder = tempfile::tempdir().expect("temporary folder");
    copy_folder(&golden("sd15/model"), folder.path(), &|_| true);
    let path = folder.path().join("scheduler/scheduler_config.json");
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("read")).expect("JSON");
    config["_class_name"] = "PNDMScheduler".into();
    config["skip_prk_steps"] = true.into();
    std::fs::write(&path, config.to_string()).expect("write");
    let name = "pndm_s6_cfg1";
    let found = generate(ModelSource::from(folder.path()), &request("sd15", name));
    assert_run(&numbers("sd15"), ("sd15", name), &found, scale);
}

#[test]
fn old_files_of_the_scheduler_are_taken_as_diffusers_takes_them() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&golden("sd15/model"), folder.path(), &|_| true);
    let path = folder.path().join("scheduler/scheduler_config.json");
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("read")).expect("JSON");
    (config["steps_offset"], config["clip_sample"]) = (0.into(), true.into());
    std::fs::write(&path, config.to_string()).expect("written");
    let request = request("sd15", "ddim_s4_cfg1");
    let found = generate(ModelSource::from(folder.path()), &request);
    assert_tensors_close(found.latents, generate(source("sd15"), &request).latents, 0.0);
}

#[test]
fn guidance_below_one_is_off_in_diffusers_alone() {
    let latents = |peer, cfg_scale| {
        let mut options = PipelineOptions::default();
        options.load.conventions = Conventions::of(peer);
        let pipeline = Pipeline::from_pretrained(source("sd15"), options).expect("the golden model loads");
        pipeline
            .generate(&Request { cfg_scale, ..request("sd15", "ddim_s4_cfg1") })
            .expect("it draws")
            .latents
    };
    assert_tensors_close(latents(Some(Peer::Diffusers), 0.5), latents(Some(Peer::Diffusers), 1.0), 0.0);
    for peer in [None, Some(Peer::Diffsynth)] {
        let change: f32 = (latents(peer, 0.5) - latents(peer, 1.0)).abs().max().into_scalar();
        assert!(change > 1e-3, "{peer:?}: {change}");
    }
}

#[test]
fn a_unet_with_a_list_for_what_is_one_number_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    copy_folder(&golden("sd15/model"), folder.path(), &|_| true);
    let path = folder.path().join("unet/config.json");
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).expect("read")).expect("JSON");
    config["layers_per_block"] = vec![1, 2, 2, 1].into();
    std::fs::write(&path, config.to_string()).expect("written");
    let error = Pipeline::from_pretrained(ModelSource::from(folder.path()), PipelineOptions::default());
    let error = error.expect_err("lists are not supported").to_string();
    assert!(error.contains("layers_per_block is [1,2,2,1], expected one number"), "{error}");
}
