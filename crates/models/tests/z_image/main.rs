//! Z-Image against numbers of diffusers (goldens/zimage): tokens, text states, transformer, whole pipelines.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use burn::tensor::{Device, Tensor};
use fewstep_data::image::Picture;
use fewstep_models::z_image::Transformer;
use fewstep_models::{
    Condition, Denoiser, LoadOptions, Model, ModelSource, Pipeline, PipelineOptions, Request, WeightType,
};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, copy_folder, golden, values};
use serde_json::Value;

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;
/// Over several evaluations of the network and the autoencoder.
const PIPELINE_TOLERANCE: f32 = 5e-5;

fn source() -> ModelSource {
    ModelSource::from(&golden("zimage/model"))
}

fn model() -> Model {
    Model::from_pretrained(&source(), &LoadOptions::default()).unwrap()
}

fn numbers() -> Golden {
    Golden::open(golden("zimage/goldens.safetensors"))
}

fn json() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("zimage/goldens.json")).unwrap()).unwrap()
}

fn prompts() -> Vec<String> {
    let json = json();
    json["tokens"].as_array().unwrap().iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect()
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn text_states_before_the_last_layer_equal_the_peers_in_a_batch() {
    let (golden, condition) = (numbers(), model().encode_prompts(&prompts()).unwrap());
    let json = json();
    for (row, tokens) in json["tokens"].as_array().unwrap().iter().enumerate() {
        let found = condition.row(row);
        assert_eq!(found.lengths, [tokens["input_ids"].as_array().unwrap().len()]);
        let expected: Tensor<2> = golden.tensor(&format!("p{row}.cap"), &Device::flex());
        assert_relatively_close(found.text.squeeze_dim::<2>(0), expected);
    }
}

#[test]
fn a_text_encoder_that_was_saved_without_the_name_of_its_model_is_the_same() {
    let temporary = tempfile::tempdir().unwrap();
    copy_folder(&golden("zimage/model"), temporary.path(), &|_| true);
    let file = temporary.path().join("text_encoder/model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors.iter().map(|(key, tensor)| (key.strip_prefix("model.").unwrap(), tensor));
    std::fs::write(&file, safetensors::serialize(renamed, None).unwrap()).unwrap();
    let source = ModelSource::from(temporary.path());
    let found = Model::from_pretrained(&source, &LoadOptions::default()).unwrap();
    let text = |model: Model| values(model.encode_prompts(&prompts()).unwrap().text);
    assert_eq!(text(found), text(model()));
}

#[test]
fn a_transformer_may_do_without_refiners() {
    let temporary = tempfile::tempdir().unwrap();
    copy_folder(&golden("zimage/model"), temporary.path(), &|_| true);
    let path = temporary.path().join("transformer/config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["n_refiner_layers"] = 0.into();
    std::fs::write(&path, config.to_string()).unwrap();
    let source = ModelSource::from(temporary.path());
    assert!(Model::outline(&source, &LoadOptions::default()).is_ok());
}

#[test]
fn predictions_equal_the_peers_at_each_time_and_size() {
    let (golden, device) = (numbers(), Device::flex());
    let transformer = Transformer::from_pretrained(&source(), WeightType::F32, &device).unwrap();
    for case in 0..3 {
        let latents: Tensor<4> = golden.tensor(&format!("case{case}.latents"), &device); // [C, 1, H, W]
        let [channels, _, height, width] = latents.dims();
        let text: Tensor<2> = golden.tensor(&format!("case{case}.cap"), &device);
        let lengths = vec![text.dims()[0]];
        let condition = Condition::new(text.unsqueeze_dim(0), lengths);
        let time = golden.tensor(&format!("case{case}.t"), &device);
        let packed = packed(latents.reshape([1, channels, height, width]));
        let found = transformer.forward(packed, time, &condition, [height / 2, width / 2]);
        let expected: Tensor<4> = golden.tensor(&format!("case{case}.out"), &device);
        assert_relatively_close(found, self::packed(expected.reshape([1, channels, height, width])));
    }
}

/// `[B, H/2 · W/2, 4C]`, the channels of a pixel together.
fn packed(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    let patches = latents.reshape([batch, channels, height / 2, 2, width / 2, 2]);
    patches.permute([0, 2, 4, 3, 5, 1]).reshape([batch, height / 2 * (width / 2), 4 * channels])
}

#[test]
fn samples_whose_texts_differ_in_length_get_what_they_get_alone() {
    let (model, device) = (model(), Device::flex());
    let long = ["a cat"; 12].join(", ");
    let condition = model.encode_prompts(&["a cat".to_owned(), long]).unwrap();
    assert!(condition.lengths[0] <= 32 && condition.lengths[1] > 32, "{:?}", condition.lengths);
    let noisy: Tensor<4> = numbers().tensor::<5>("s4_cfg0.latents", &device).narrow(0, 0, 1).squeeze_dim(0);
    let sigma = Tensor::<1>::from_floats([0.7, 0.4], &device);
    let both = model.velocity(Tensor::cat(vec![noisy.clone(), noisy.clone()], 0), sigma.clone(), &condition);
    for row in 0..2 {
        let alone = model.velocity(noisy.clone(), sigma.clone().narrow(0, row, 1), &condition.row(row));
        assert_tensors_close(both.clone().narrow(0, row, 1), alone, TOLERANCE);
    }
}

#[test]
fn pictures_of_the_pipeline_equal_the_peers() {
    let (golden, json) = (numbers(), json());
    let pipeline = Pipeline::from_pretrained(source(), PipelineOptions::default()).unwrap();
    for name in ["s4_cfg0", "s4_cfg3"] {
        let run = &json[name];
        let number = |key: &str| run[key].as_u64().unwrap() as usize;
        let text = |key: &str| run[key].as_str().unwrap_or_default().to_owned();
        let request = Request {
            negative_prompt: text("negative_prompt"),
            seed: run["seed"].as_u64().unwrap(),
            num_inference_steps: number("num_inference_steps"),
            // The peer adds its scale times the difference to the conditional prediction.
            cfg_scale: 1.0 + run["guidance_scale"].as_f64().unwrap() as f32,
            keep_trajectory: true,
            ..Request::new(text("prompt"), number("height"), number("width"))
        };
        let generated = pipeline.generate(&request).unwrap();
        assert_close(generated.sigmas.as_slice(), &golden.f32s(&format!("{name}.sigmas")), 0.0);
        let states = generated.trajectory.clone().unwrap().slice_dim(0, 1..);
        assert_close(&values(states), &golden.f32s(&format!("{name}.latents")), PIPELINE_TOLERANCE);
        let decoded = pipeline.model.decode_latents(generated.latents.clone(), 1);
        let image: Tensor<4> = golden.tensor(&format!("{name}.image01"), &Device::flex()); // [1, H, W, 3]
        assert_tensors_close(decoded, image.permute([0, 3, 1, 2]) * 2.0 - 1.0, PIPELINE_TOLERANCE);
        let expected = Picture::load(&golden_file(&format!("zimage/{name}.png"))).unwrap();
        let differ = generated.picture().rgb.iter().zip(&expected.rgb).filter(|(found, peer)| found != peer);
        let steps: Vec<u8> = differ.map(|(found, peer)| found.abs_diff(*peer)).collect();
        assert!(steps.len() <= 2 && steps.iter().all(|step| *step == 1), "{name}: {steps:?}");
    }
}

fn golden_file(relative: &str) -> std::path::PathBuf {
    golden(relative)
}
