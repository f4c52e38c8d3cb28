//! Wan against numbers of diffusers (goldens/wan): text states, transformer, video autoencoder, whole pipelines.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod files;

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_models::{
    Condition, Conventions, Denoiser, Extent, LoadOptions, Model, ModelSource, Pipeline, PipelineOptions,
    Request, VideoAutoencoderConfig,
};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, copy_folder, golden, random, values};
use serde_json::{Value, json};

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;
/// Over several evaluations of the network and the autoencoder.
const PIPELINE_TOLERANCE: f32 = 5e-5;
/// Of the goldens' text states.
const TEXT_TOKENS: usize = 64;

fn source() -> ModelSource {
    ModelSource::from(&golden("wan/model"))
}

fn options() -> LoadOptions {
    let conventions = Conventions { max_prompt_tokens: Some(TEXT_TOKENS), ..Conventions::default() };
    LoadOptions { conventions, ..LoadOptions::default() }
}

fn model() -> Model {
    Model::from_pretrained(&source(), &options()).unwrap()
}

fn numbers() -> Golden {
    Golden::open(golden("wan/goldens.safetensors"))
}

fn numbers_of_runs() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("wan/goldens.json")).unwrap()).unwrap()
}

/// `[B, C, F, H, W]` with its frames below each other, `[B, C, F · H, W]`.
fn stacked(x: Tensor<5>) -> Tensor<4> {
    let [batch, channels, frames, height, width] = x.dims();
    x.reshape([batch, channels, frames * height, width])
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn text_states_equal_the_peers_in_a_batch_and_are_zero_behind_the_prompt() {
    let (golden, json) = (numbers(), numbers_of_runs());
    let rows = json["tokens"].as_array().unwrap();
    let prompts: Vec<String> = rows.iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect();
    let condition = model().encode_prompts(&prompts).unwrap();
    assert_eq!(condition.lengths, [TEXT_TOKENS; 3], "the zeros are attended to");
    for (row, tokens) in rows.iter().enumerate() {
        let found = condition.row(row).text;
        assert_relatively_close(found.clone(), golden.tensor(&format!("p{row}.embeds"), &Device::flex()));
        let length = tokens["input_ids"].as_array().unwrap().len();
        assert!(values(found.slice_dim(1, length..)).iter().all(|value| *value == 0.0), "{row}");
    }
}

#[test]
fn prompts_are_cleaned_before_they_are_tokenised() {
    let model = model();
    let states = |prompt: &str| values(model.encode_prompts(&[prompt.to_owned()]).unwrap().text);
    assert_eq!(states("  a \u{201c}red\u{201d}\n cat &amp;amp; a dog "), states("a \"red\" cat & a dog"));
    let length = model.prompt_tokens(&"a cat, ".repeat(60)).unwrap();
    assert!(length.is_cut() && length.limit == TEXT_TOKENS && length.states == TEXT_TOKENS, "{length:?}");
}

#[test]
fn velocities_equal_the_peers_at_each_time_size_and_number_of_frames() {
    let (golden, device, model) = (numbers(), Device::flex(), model());
    for (case, frames) in [(0, 5), (1, 9)] {
        let latents = stacked(golden.tensor(&format!("case{case}.latents"), &device));
        let timestep: Tensor<1> = golden.tensor(&format!("case{case}.timestep"), &device);
        let condition = Condition::new(golden.tensor("p0.embeds", &device), vec![TEXT_TOKENS]);
        let found = model.velocity(latents, timestep / 1000.0, &condition.with_frames(frames));
        assert_relatively_close(found, stacked(golden.tensor(&format!("case{case}.out"), &device)));
    }
}

#[test]
#[should_panic(expected = "a condition of a video says its frames")]
fn a_model_of_videos_does_not_guess_how_many_frames_latents_have() {
    let device = Device::flex();
    let condition = Condition::new(random([1, TEXT_TOKENS, 48], 1, &device), vec![TEXT_TOKENS]);
    model().velocity(random([1, 16, 16, 8], 2, &device), Tensor::from_floats([0.5], &device), &condition);
}

/// Mean and deviation of the latents, `[1, C, 1, 1]`.
fn normalisation() -> [Tensor<4>; 2] {
    let text = std::fs::read_to_string(golden("wan/model/vae/config.json")).unwrap();
    let config: VideoAutoencoderConfig = serde_json::from_str(&text).unwrap();
    [config.latents_mean, config.latents_std].map(|values| {
        let channels = values.len();
        Tensor::from_data(TensorData::new(values, [1, channels, 1, 1]), &Device::flex())
    })
}

#[test]
fn videos_are_encoded_and_decoded_as_the_peer_does_chunk_by_chunk() {
    let (golden, device, model) = (numbers(), Device::flex(), model());
    let [mean, std] = normalisation();
    for (pixels, latents, frames) in [("vae.pixels", "vae.mean", 5), ("vae.pixels9", "vae.mean9", 9)] {
        let found = model.encode_images(stacked(golden.tensor(pixels, &device)), frames);
        let expected = (stacked(golden.tensor(latents, &device)) - mean.clone()) / std.clone();
        assert_relatively_close(found, expected);
    }
    let latents = (stacked(golden.tensor("vae.z", &device)) - mean) / std;
    let found = model.decode_latents(latents, 9);
    assert_relatively_close(found, stacked(golden.tensor("vae.decoded", &device)));
}

#[test]
fn frames_do_not_depend_on_later_ones_and_one_frame_is_a_picture() {
    let (golden, device, model) = (numbers(), Device::flex(), model());
    let pixels: Tensor<5> = golden.tensor("vae.pixels9", &device);
    let height = pixels.dims()[3];
    let all = stacked(pixels);
    let encode = |frames: usize| model.encode_images(all.clone().slice_dim(2, 0..frames * height), frames);
    let whole = encode(9);
    for (frames, latent_rows) in [(1, 4), (5, 8)] {
        assert_relatively_close(encode(frames), whole.clone().slice_dim(2, 0..latent_rows));
    }
    let decode =
        |frames: usize, rows: usize| model.decode_latents(whole.clone().slice_dim(2, 0..rows), frames);
    assert_relatively_close(decode(1, 4), decode(9, 12).slice_dim(2, 0..height));
}

#[test]
fn a_batch_of_videos_is_its_videos() {
    let (device, model) = (Device::flex(), model());
    let pixels: Tensor<4> = random([2, 3, 5 * 16, 32], 4, &device).clamp(-1.0, 1.0);
    let alone = |row: usize| model.encode_images(pixels.clone().narrow(0, row, 1), 5);
    let both = model.encode_images(pixels.clone(), 5);
    assert_relatively_close(both.clone(), Tensor::cat(vec![alone(0), alone(1)], 0));
    let alone = |row: usize| model.decode_latents(both.clone().narrow(0, row, 1), 5);
    assert_relatively_close(model.decode_latents(both.clone(), 5), Tensor::cat(vec![alone(0), alone(1)], 0));
}

/// A copy of the model with another scheduler.
fn with_scheduler(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("wan/model"), folder.path(), &|_| true);
    std::fs::write(folder.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    folder
}

/// Draws what a run of the goldens drew, and compares sigmas, states and frames.
#[track_caller]
fn assert_run(source: ModelSource, name: &str, sigma_tolerance: f32) {
    let (golden, json, device) = (numbers(), numbers_of_runs(), Device::flex());
    let run = &json[name];
    let number = |key: &str| run[key].as_u64().unwrap() as usize;
    let text = |key: &str| run[key].as_str().unwrap_or_default().to_owned();
    let frames = number("num_frames");
    let request = Request {
        negative_prompt: text("negative_prompt"),
        seed: run["seed"].as_u64().unwrap(),
        num_inference_steps: number("num_inference_steps"),
        cfg_scale: run["guidance_scale"].as_f64().unwrap() as f32,
        num_frames: frames,
        keep_trajectory: true,
        ..Request::new(text("prompt"), number("height"), number("width"))
    };
    let pipeline =
        Pipeline::from_pretrained(source, PipelineOptions { load: options(), lora: None }).unwrap();
    let generated = pipeline.generate(&request).unwrap();
    assert_close(generated.sigmas.as_slice(), &golden.f32s(&format!("{name}.sigmas")), sigma_tolerance);
    let states = generated.trajectory.clone().unwrap().slice_dim(0, 1..);
    assert_close(&values(states), &golden.f32s(&format!("{name}.latents")), PIPELINE_TOLERANCE);
    let decoded = pipeline.model.decode_latents(generated.latents.clone(), frames);
    let images: Tensor<5> = golden.tensor(&format!("{name}.image01"), &device); // [1, F, H, W, 3]
    let expected = stacked(images.permute([0, 4, 1, 2, 3])) * 2.0 - 1.0;
    assert_tensors_close(decoded.clone(), expected, PIPELINE_TOLERANCE);
    assert_eq!(generated.frames.len(), frames);
    let height = number("height");
    for (at, frame) in generated.frames.iter().enumerate() {
        let pixels = values(decoded.clone().narrow(2, at * height, height).squeeze_dim::<3>(0));
        let rounding = fewstep_data::image::Rounding::Nearest;
        let expected = fewstep_data::image::Picture::from_pixels(&pixels, frame.width, height, rounding);
        assert!(*frame == expected, "frame {at} is another");
    }
}

#[test]
fn videos_of_the_multistep_solver_equal_the_peers() {
    // The peer begins a millionth below pure noise, and says so.
    assert_run(source(), "unipc_s4_cfg5", 1.1e-6);
}

#[test]
fn videos_of_eulers_steps_equal_the_peers() {
    let euler = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0});
    assert_run(ModelSource::from(with_scheduler(&euler).path()), "euler_shift5_s4_cfg1", 1.5e-7);
}

#[test]
fn each_peer_has_a_schedule_and_a_solver_of_its_own() {
    let of = |peer| {
        let conventions = Conventions::of(peer);
        Model::outline(&source(), &LoadOptions { conventions, ..LoadOptions::default() }).unwrap()
    };
    let diffsynth = of(Some(fewstep_models::Peer::Diffsynth));
    let grid = |model: &Model| model.sigma_grid(4, [64, 64]).unwrap().as_slice().to_vec();
    // Timesteps of the peer's training run (goldens/wan/training.safetensors).
    assert_close(&grid(&diffsynth), &[1.0, 0.9375, 0.833_333_3, 0.625, 0.0], 1e-7);
    assert_eq!(diffsynth.solver(), fewstep_flow::Solver::Euler);
    for peer in [None, Some(fewstep_models::Peer::Diffusers)] {
        assert_close(&grid(&of(peer)), &[1.0, 0.900_12, 0.750_375, 0.500_999, 0.0], 1e-5);
        assert_eq!(of(peer).solver(), fewstep_flow::Solver::UniPc);
    }
}

#[test]
fn a_video_of_a_batch_is_the_one_drawn_alone() {
    let pipeline =
        Pipeline::from_pretrained(source(), PipelineOptions { load: options(), lora: None }).unwrap();
    let request = |prompt: &str, seed| Request {
        seed,
        num_inference_steps: 2,
        cfg_scale: 3.0,
        num_frames: 9,
        ..Request::new(prompt, 32, 48)
    };
    let requests = [request("a cat", 3), request("a red house by the sea", 4)];
    let both = pipeline.generate_batch(&requests).unwrap();
    for (request, found) in requests.iter().zip(both) {
        let alone = pipeline.generate(request).unwrap();
        assert_eq!(alone.latents.dims(), [1, 16, 3 * 4, 6]);
        assert_tensors_close(found.latents, alone.latents, PIPELINE_TOLERANCE);
    }
}

#[test]
fn sizes_that_no_video_has_are_refused_by_name() {
    let outline = |folder: &str| Model::outline(&(&golden(folder)).into(), &LoadOptions::default()).unwrap();
    let refusal = |model: &Model, frames, height, width| {
        model.latent_shape(Extent { frames, height, width }).unwrap_err().to_string()
    };
    let model = outline("wan/model");
    assert_eq!(model.latent_shape(Extent { frames: 9, height: 32, width: 48 }).unwrap(), [16, 3 * 4, 6]);
    assert_eq!(model.latent_shape([32, 48]).unwrap(), [16, 4, 6]);
    let found = refusal(&model, 6, 64, 64);
    assert_eq!(
        found,
        "num_frames is 6, expected 4n + 1, at most 4093\nhint: the nearest numbers are 5 and 9"
    );
    assert!(refusal(&model, 0, 64, 64).contains("num_frames is 0, expected 4n + 1"));
    assert!(refusal(&model, 1 << 40, 64, 64).contains("at most 4093"));
    assert!(refusal(&model, 5, 60, 64).contains("height 60 px is not divisible by 16"));
    let found = refusal(&outline("flux/model"), 5, 64, 64);
    assert!(found.contains("num_frames is 5, expected 1: the model draws pictures, no videos"), "{found}");
}
