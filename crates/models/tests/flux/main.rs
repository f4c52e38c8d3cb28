//! FLUX.1 against numbers of diffusers (goldens/flux): tokens, text states, transformer, whole pipelines.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use burn::tensor::{Device, Tensor};
use fewstep_data::image::Picture;
use fewstep_models::flux::{Told, Transformer};
use fewstep_models::{
    Condition, Conventions, Generated, LoadOptions, ModelSource, Pipeline, PipelineOptions, Request,
    T5Encoder, T5Tokenizer, WeightType,
};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, golden, values};
use serde_json::Value;

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;
/// Over several evaluations of the network and the autoencoder.
const PIPELINE_TOLERANCE: f32 = 5e-5;

/// Tokens that the peer padded T5's rows to.
const TEXT_TOKENS: usize = 64;

fn source() -> ModelSource {
    ModelSource::from(&golden("flux/model"))
}

fn numbers() -> Golden {
    Golden::open(golden("flux/goldens.safetensors"))
}

fn json() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("flux/goldens.json")).unwrap()).unwrap()
}

fn ids(row: &Value) -> Vec<u32> {
    row.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn t5_tokens_equal_the_peers_and_end_before_their_padding() {
    let tokenizer = T5Tokenizer::read(golden("flux/model/tokenizer_2")).unwrap();
    for row in json()["tokens"].as_array().unwrap() {
        let prompt = row["prompt"].as_str().unwrap().to_owned();
        let found = tokenizer.encode(std::slice::from_ref(&prompt), TEXT_TOKENS).unwrap();
        assert_eq!(found.ids, [ids(&row["t5"])], "{prompt}");
        assert_eq!(found.ids[0][found.lengths[0] - 1], 1, "the end");
        assert_eq!(tokenizer.count(&prompt).unwrap(), found.lengths[0]);
        let cut = tokenizer.encode(&[prompt], 5).unwrap();
        assert_eq!((cut.ids[0].len(), cut.ids[0][4], cut.ids[0][3]), (5, 1, found.ids[0][3]));
    }
}

#[test]
fn t5_states_equal_the_peers() {
    let golden = numbers();
    let encoder =
        T5Encoder::from_pretrained(&source(), "text_encoder_2", WeightType::F32, &Device::flex()).unwrap();
    let rows: Vec<Vec<u32>> =
        json()["tokens"].as_array().unwrap().iter().map(|row| ids(&row["t5"])).collect();
    let expected: Vec<Tensor<3>> =
        (0..rows.len()).map(|index| golden.tensor(&format!("p{index}.t5"), &Device::flex())).collect();
    assert_relatively_close(encoder.forward(&rows, None), Tensor::cat(expected, 0));
}

#[test]
fn t5_hides_what_is_past_a_rows_length() {
    let encoder =
        T5Encoder::from_pretrained(&source(), "text_encoder_2", WeightType::F32, &Device::flex()).unwrap();
    let row = ids(&json()["tokens"][1]["t5"]);
    let length = row.iter().position(|id| *id == 0).unwrap();
    let alone = encoder.forward(&[row[..length].to_vec()], None);
    let padded = encoder.forward(&[row], Some(&[length]));
    assert_tensors_close(padded.narrow(1, 0, length), alone, TOLERANCE);
}

/// What the peer's transformer was given in a case.
fn case(golden: &Golden, index: usize) -> (Tensor<3>, Told, Condition) {
    let device = Device::flex();
    let number = |name: &str| golden.f32s(&format!("case{index}.{name}"))[0];
    let condition = Condition::new(golden.tensor("p0.t5", &device), vec![TEXT_TOKENS]);
    let condition = condition.with_pooled(golden.tensor("p0.pooled", &device));
    let time = Tensor::full([1], number("timestep") / 1000.0, &device);
    (
        golden.tensor(&format!("case{index}.packed"), &device),
        Told { time, guidance: number("guidance") },
        condition,
    )
}

fn transformer() -> Transformer {
    Transformer::from_pretrained(&source(), WeightType::F32, &Device::flex()).unwrap()
}

#[test]
fn velocities_equal_the_peers_at_each_time_guidance_and_size() {
    let (golden, transformer) = (numbers(), transformer());
    for (index, grid) in [[4, 4], [4, 6]].into_iter().enumerate() {
        let (packed, told, condition) = case(&golden, index);
        let found = transformer.forward(packed, told, &condition, grid);
        assert_relatively_close(found, golden.tensor(&format!("case{index}.out"), &Device::flex()));
    }
}

#[test]
fn tokens_of_both_streams_equal_the_peers_after_every_block() {
    let (golden, device) = (numbers(), Device::flex());
    let (packed, told, condition) = case(&golden, 0);
    let states = transformer().block_states(packed, told, &condition, [4, 4]);
    assert_eq!(states.len(), 4);
    for (name, [image, text]) in ["double0", "double1", "single0", "single1"].into_iter().zip(states) {
        assert_relatively_close(text, golden.tensor(&format!("case0.{name}.0"), &device));
        assert_relatively_close(image, golden.tensor(&format!("case0.{name}.1"), &device));
    }
}

fn pipeline(max_prompt_tokens: usize) -> Pipeline {
    let conventions = Conventions { max_prompt_tokens: Some(max_prompt_tokens), ..Conventions::default() };
    let load = LoadOptions { conventions, ..LoadOptions::default() };
    Pipeline::from_pretrained(source(), PipelineOptions { load, lora: None }).unwrap()
}

/// `[B, C, H, W]` as the peer shows it, `[B, H/2 · W/2, 4C]`.
fn packed(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    let patches = latents.reshape([batch, channels, height / 2, 2, width / 2, 2]);
    patches.permute([0, 2, 4, 1, 3, 5]).reshape([batch, height / 2 * (width / 2), 4 * channels])
}

#[test]
fn pictures_of_the_pipeline_equal_the_peers() {
    let (golden, json) = (numbers(), json());
    for name in ["s4", "s3_64x96"] {
        let run = &json[name];
        let number = |key: &str| run[key].as_u64().unwrap() as usize;
        let pipeline = pipeline(number("max_sequence_length"));
        let request = Request {
            seed: run["seed"].as_u64().unwrap(),
            num_inference_steps: number("num_inference_steps"),
            embedded_guidance: Some(run["guidance_scale"].as_f64().unwrap() as f32),
            keep_trajectory: true,
            ..Request::new(run["prompt"].as_str().unwrap(), number("height"), number("width"))
        };
        let generated = pipeline.generate(&request).unwrap();
        assert_equals_run(&golden, name, &pipeline, &generated);
    }
}

/// Sigmas, every state but the noise, the decoded pixels, and the picture up to levels that lie on a boundary.
fn assert_equals_run(golden: &Golden, name: &str, pipeline: &Pipeline, generated: &Generated) {
    assert_close(generated.sigmas.as_slice(), &golden.f32s(&format!("{name}.sigmas")), 0.0);
    let states = packed(generated.trajectory.clone().unwrap().slice_dim(0, 1..));
    assert_close(&values(states), &golden.f32s(&format!("{name}.latents")), PIPELINE_TOLERANCE);
    let decoded = pipeline.model.decode_latents(generated.latents.clone(), 1);
    let image: Tensor<4> = golden.tensor(&format!("{name}.image01"), &Device::flex()); // [1, H, W, 3]
    assert_tensors_close(decoded, image.permute([0, 3, 1, 2]) * 2.0 - 1.0, PIPELINE_TOLERANCE);
    let expected = Picture::load(&golden_picture(name)).unwrap();
    let differ = generated.picture().rgb.iter().zip(&expected.rgb).filter(|(found, peer)| found != peer);
    let steps: Vec<u8> = differ.map(|(found, peer)| found.abs_diff(*peer)).collect();
    assert!(steps.len() <= 2 && steps.iter().all(|step| *step == 1), "{name}: {steps:?}");
}

fn golden_picture(name: &str) -> std::path::PathBuf {
    golden(&format!("flux/{name}.png"))
}

#[test]
fn a_model_that_is_told_its_guidance_follows_it() {
    let pipeline = pipeline(TEXT_TOKENS);
    let latents = |embedded_guidance| {
        let request = Request { embedded_guidance, num_inference_steps: 1, ..Request::new("a cat", 64, 64) };
        values(pipeline.generate(&request).unwrap().latents)
    };
    let own = pipeline.model.defaults().embedded_guidance;
    assert_eq!(own, Some(3.5));
    assert_close(&latents(None), &latents(own), 0.0);
    let (low, high) = (latents(Some(1.0)), latents(Some(5.0)));
    let apart = low.iter().zip(&high).map(|(low, high)| (low - high).abs()).fold(0.0, f32::max);
    assert!(apart > 1e-3, "{apart}");
}
