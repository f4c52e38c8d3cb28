//! Losses, gradients and optimiser steps of the families against DiffSynth-Studio's (goldens/flux, sd15, sd3, sdxl, wan,
//! zimage): the same recipe for all of them.
//!
//! Of models that predict noise, the peer's losses are of the noise, from the noised picture; here they are of velocities.

use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, Tensor};
use fewstep_data::image::{Picture, Size};
use fewstep_data::video::Video;
use fewstep_flow::diffusion::scale;
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::{Solver, trajectory};
use fewstep_models::sampling::{Guidance, guided_velocity};
use fewstep_models::{WeightType, save_tensors};
use fewstep_testkit::{Golden, assert_tensors_close, golden};
use serde_json::Value;
use tempfile::TempDir;

use super::fixtures::{Recorder, newest_checkpoint, run, train};
use super::goldens::{
    Bench, GRADIENT_TOLERANCE, LOSS_TOLERANCE, assert_losses, assert_norms, assert_relative, assert_tensors,
};
use super::methods::ByName;
use crate::Outcome;
use crate::optimizer::Optimizer;
use crate::recipe::{Compat, Recipe, StudentStart, Task};

const SIDE_PX: usize = 64;
/// Seed of the golden noise.
const SEED: u64 = 9001;
/// Of the goldens' prompt.
const PROMPT: &str = "a photo of a cat sitting on the red sofa";

/// What the peer measured on one family.
struct Peer {
    recipe: Recipe,
    numbers: Value,
    tensors: Golden,
    folder: TempDir,
}

impl Peer {
    fn all() -> [Self; 6] {
        ["flux", "sd15", "sd3", "sdxl", "wan", "zimage"].map(Self::new)
    }

    /// Those that predict noise.
    fn of_noise() -> [Self; 2] {
        ["sd15", "sdxl"].map(Self::new)
    }

    /// A data set of one row, whose latents are stored: the peer's are of a picture that the goldens do not keep.
    fn new(family: &str) -> Self {
        let text = std::fs::read_to_string(golden(&format!("{family}/training.json"))).unwrap();
        let tensors = Golden::open(golden(&format!("{family}/training.safetensors")));
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path();
        let picture = Picture { width: SIDE_PX, height: SIDE_PX, rgb: vec![0; 3 * SIDE_PX * SIDE_PX] };
        let (media, file, shape) = match tensors.shape("input_latents")[..] {
            [_, channels, latent_frames, height, width] => {
                let frames = vec![picture; 4 * (latent_frames - 1) + 1];
                Video::new(frames, None).save(&base.join("0.webp")).unwrap();
                ("video", "0.webp", vec![channels, latent_frames * height, width])
            }
            ref shape => {
                picture.save_png(&base.join("0.png")).unwrap();
                ("image", "0.png", shape[1..].to_vec())
            }
        };
        let columns = format!("{media},prompt,seed,rand_device,num_inference_steps,cfg_scale");
        let row = format!("{file},{PROMPT},{SEED},cpu,4,1");
        std::fs::write(base.join("metadata.csv"), format!("{columns}\n{row}\n")).unwrap();
        let latents = ("latents".to_owned(), shape, tensors.f32s("input_latents"));
        let file = base.join("latents/0.safetensors");
        save_tensors(&file, [latents], WeightType::F32, &Default::default()).unwrap();
        let recipe = Recipe {
            task: Task::DirectDistill,
            model: golden(&format!("{family}/model")),
            dataset_base_path: base.into(),
            trainable_models: vec!["dit".into()],
            max_prompt_tokens: ["flux", "sd3", "wan"].contains(&family).then_some(64),
            ..Recipe::compatible(Compat::Diffsynth)
        };
        let init = base.join("lora_init.safetensors");
        std::fs::copy(golden(&format!("{family}/lora_init.safetensors")), init).unwrap();
        Self { recipe, numbers: serde_json::from_str(&text).unwrap(), tensors, folder }
    }

    fn lora(&self) -> Recipe {
        Recipe {
            lora_base_model: Some("dit".into()),
            lora_rank: 4,
            lora_checkpoint: Some(self.folder.path().join("lora_init.safetensors")),
            learning_rate: 1e-3,
            ..self.recipe.clone()
        }
    }

    fn loss(&self, case: &str) -> f64 {
        self.numbers[case]["loss"].as_f64().unwrap()
    }

    /// Queries of a single key have gradients of zero in exact arithmetic: both are rounding then, which grows with the
    /// other gradients.
    #[track_caller]
    fn assert_norms(&self, gradients: &ByName, case: &str) {
        let expected = &self.numbers[case]["grad_norms"];
        let norms = expected.as_object().unwrap().values().filter_map(Value::as_f64);
        let largest = norms.fold(0.0, f64::max);
        assert_norms(gradients, expected, GRADIENT_TOLERANCE, 1e-7 + 1e-9 * largest);
    }

    /// Golden tensors whose keys start so, without that start.
    fn tensors(&self, prefix: &str) -> ByName {
        let keys = self.tensors.keys().into_iter();
        let named = |key: String| Some((key.strip_prefix(prefix)?.to_owned(), self.tensors.f32s(&key)));
        keys.filter_map(named).collect()
    }
}

#[test]
fn flow_matching_equals_the_peers_whatever_the_model_predicts() {
    for peer in Peer::all() {
        let recipe = Recipe { task: Task::Sft, ..peer.recipe.clone() };
        let generator = TorchGenerator::new(peer.numbers["sft"]["global_seed"].as_u64().unwrap());
        let (loss, gradients) = Bench::new(&recipe).gradients(0, Some(vec![generator]));
        assert_relative(loss, peer.loss("sft"), LOSS_TOLERANCE, "sft");
        peer.assert_norms(&gradients, "sft");
        assert_tensors(&gradients, &peer.tensors("sft.grad."));
    }
}

#[test]
fn direct_distillation_equals_the_peers_whatever_the_model_predicts() {
    for peer in Peer::all() {
        let (loss, gradients) = Bench::new(&peer.recipe).gradients(0, None);
        assert_relative(loss, peer.loss("distill_full"), LOSS_TOLERANCE, "distill_full");
        peer.assert_norms(&gradients, "distill_full");
        assert_tensors(&gradients, &peer.tensors("distill.grad."));
    }
}

#[test]
fn adapters_of_every_family_learn_as_the_peers() {
    for peer in Peer::all() {
        let recipe = peer.lora();
        let mut bench = Bench::new(&recipe);
        let (loss, gradients) = bench.gradients(0, None);
        assert_relative(loss, peer.loss("distill_lora"), LOSS_TOLERANCE, "distill_lora");
        peer.assert_norms(&gradients, "distill_lora");
        assert_tensors(&gradients, &peer.tensors("distill_lora.grad."));
        let expected = peer.numbers["adamw_lora"]["losses"].as_array().unwrap();
        let expected: Vec<f64> = expected.iter().map(|loss| loss.as_f64().unwrap()).collect();
        let mut optimizer = Optimizer::new(&recipe);
        let losses: Vec<f64> = expected.iter().map(|_| bench.update(&mut optimizer, 0, 1e-3)).collect();
        assert_losses(&losses, &expected, LOSS_TOLERANCE);
    }
}

#[test]
fn a_roll_out_of_a_unet_passes_the_peers_states_on_its_timesteps() {
    let device = Device::flex();
    for peer in Peer::of_noise() {
        let bench = Bench::new(&peer.recipe);
        let model = burn::module::Module::valid(&bench.model);
        let size = Size { height: SIDE_PX, width: SIDE_PX };
        let grid = peer.recipe.training_grid.sigmas(&model, 4, size.into()).unwrap();
        let batch = bench.batch(0, None);
        let guidance = Guidance::off(batch.condition(&model, &[false]).unwrap());
        let first = grid.as_slice()[0];
        let start: Tensor<4> = peer.tensors.tensor("distill.start_latents", &device);
        let states = trajectory(Solver::Euler, &grid, start * scale(first), |noisy, sigma| {
            guided_velocity(&model, noisy, sigma, &guidance)
        });
        let kept = states[1..].iter().zip(&grid.as_slice()[1..]);
        let kept = kept.map(|(state, sigma)| state.clone() / scale(*sigma)).collect();
        let expected: Tensor<5> = peer.tensors.tensor("distill.trajectory", &device);
        let largest: f32 = expected.clone().abs().max().into_scalar();
        assert_tensors_close(Tensor::stack(kept, 0), expected, 5e-5 * largest.max(1.0));
    }
}

#[test]
fn a_resumed_run_of_any_family_equals_an_uninterrupted_one_to_the_bit() {
    for peer in Peer::all() {
        let [whole, parts] = ["whole", "parts"].map(|name| Recipe {
            output_path: peer.folder.path().join(name),
            max_steps: Some(3),
            height: Some(SIDE_PX),
            width: Some(SIDE_PX),
            ..peer.lora()
        });
        train(&whole);
        let stop = AtomicBool::new(false);
        let mut recorder = Recorder { stop: Some((2, &stop)), ..Recorder::default() };
        assert_eq!(run(&parts, &mut recorder).unwrap(), Outcome::Stopped(2));
        train(&parts);
        assert!(newest_checkpoint(&whole) == newest_checkpoint(&parts), "checkpoints differ");
    }
}

#[test]
fn a_student_starts_from_noise_unless_the_peer_is_followed() {
    let peer = Peer::new("sd15");
    let own = Recipe { student_start: StudentStart::Noise, ..peer.recipe.clone() };
    let loss = Bench::new(&own).step(0, None).0;
    // Losses that are the same agree to LOSS_TOLERANCE; the start from noise was measured 8e-4 away.
    assert!((loss / peer.loss("distill_full") - 1.0).abs() > 1e-4, "{loss}");
}

#[test]
fn a_model_that_is_told_its_guidance_learns_with_that_of_the_row_or_the_recipe() {
    let peer = Peer::new("flux");
    let loss = |recipe: &Recipe| Bench::new(recipe).step(0, None).0;
    let at = |scale| loss(&Recipe { embedded_guidance: scale, ..peer.recipe.clone() });
    let own = at(Some(3.5));
    assert!((own / peer.loss("distill_full") - 1.0).abs() > 1e-4, "the peer's is 1: {own}");
    assert_eq!(at(None), own, "the model's own where nobody says otherwise");
    let metadata = peer.folder.path().join("metadata.csv");
    let text = std::fs::read_to_string(&metadata).unwrap();
    let (header, row) = text.trim_end().split_once('\n').unwrap();
    std::fs::write(&metadata, format!("{header},embedded_guidance\n{row},3.5\n")).unwrap();
    assert_eq!(loss(&peer.recipe), own, "a row's own wins over the recipe's");
}
