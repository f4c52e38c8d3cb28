//! Whole runs, and models that lack a text encoder.

use burn::tensor::{Device, Tensor};
use fewstep_data::image::Picture;
use fewstep_models::{
    Model, ModelSource, Pipeline, PipelineOptions, Request, WeightType, check_weights, expected_tensors,
};
use fewstep_testkit::{assert_close, assert_tensors_close, copy_folder, golden, values};
use serde_json::Value;

use super::{CLIP_TOKENS, T5_TOKENS, json, numbers, options, source, without};

/// Over several evaluations of the network and the autoencoder.
const TOLERANCE: f32 = 5e-5;

fn pipeline(source: &ModelSource, max_prompt_tokens: usize) -> Pipeline {
    let options = PipelineOptions { load: options(max_prompt_tokens), lora: None };
    Pipeline::from_pretrained(source.clone(), options).unwrap()
}

fn request(run: &Value) -> Request {
    let number = |key: &str| run[key].as_u64().unwrap() as usize;
    let text = |key: &str| run[key].as_str().unwrap_or_default().to_owned();
    Request {
        negative_prompt: text("negative_prompt"),
        seed: run["seed"].as_u64().unwrap(),
        num_inference_steps: number("num_inference_steps"),
        cfg_scale: run["guidance_scale"].as_f64().unwrap() as f32,
        keep_trajectory: true,
        ..Request::new(text("prompt"), number("height"), number("width"))
    }
}

/// Sigmas, every state but the noise, the decoded pixels, and the picture up to levels that lie on a boundary.
#[track_caller]
fn assert_equals_run(name: &str, source: &ModelSource) {
    let (golden, json) = (numbers(), json());
    let run = &json[name];
    let pipeline = pipeline(source, run["max_sequence_length"].as_u64().unwrap() as usize);
    let generated = pipeline.generate(&request(run)).unwrap();
    // One unit in the last place: the scheduler, left to itself, shifts in f64, and the grid here in f32.
    assert_close(generated.sigmas.as_slice(), &golden.f32s(&format!("{name}.sigmas")), 6e-8);
    let states = generated.trajectory.clone().unwrap().slice_dim(0, 1..);
    assert_close(&values(states), &golden.f32s(&format!("{name}.latents")), TOLERANCE);
    let decoded = pipeline.model.decode_latents(generated.latents.clone(), 1);
    let image: Tensor<4> = golden.tensor(&format!("{name}.image01"), &Device::flex()); // [1, H, W, 3]
    // The peer's picture is clamped.
    assert_tensors_close(decoded, image.permute([0, 3, 1, 2]) * 2.0 - 1.0, TOLERANCE);
    let expected = Picture::load(&picture(name)).unwrap();
    let differ = generated.picture().rgb.iter().zip(&expected.rgb).filter(|(found, peer)| found != peer);
    let steps: Vec<u8> = differ.map(|(found, peer)| found.abs_diff(*peer)).collect();
    assert!(steps.len() <= 2 && steps.iter().all(|step| *step == 1), "{name}: {steps:?}");
}

fn picture(name: &str) -> std::path::PathBuf {
    golden(&format!("sd3/{name}.png"))
}

#[test]
fn pictures_of_the_pipeline_equal_the_peers_with_guidance_and_without() {
    for name in ["s4", "s4_cfg5_64x96", "s3_cfg3_noneg"] {
        assert_equals_run(name, &source());
    }
}

#[test]
fn a_model_without_t5_draws_what_the_peer_draws_without_it_and_is_saved_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (model, saved) = (folder.path().join("model"), folder.path().join("saved"));
    without("text_encoder_3", &model);
    let source = ModelSource::from(&model);
    assert_equals_run("s4_cfg3_no_t5", &source);
    assert!(expected_tensors(&source).unwrap()["text_encoder_3"].is_empty());
    check_weights(&source, "text_encoder_3").unwrap();
    let loaded = Model::from_pretrained(&source, &options(T5_TOKENS)).unwrap();
    let length = loaded.prompt_tokens("a cat").unwrap();
    assert_eq!((length.found, length.limit, length.states), (2, 75, CLIP_TOKENS + T5_TOKENS));
    loaded.save_pretrained(&source, &saved, WeightType::F32, &Default::default()).unwrap();
    assert!(!saved.join("text_encoder_3").exists());
    assert_equals_run("s4_cfg3_no_t5", &ModelSource::from(&saved));
}

#[test]
fn a_model_without_another_part_is_refused_by_its_name() {
    for component in ["text_encoder", "text_encoder_2", "transformer", "vae"] {
        let folder = tempfile::tempdir().unwrap();
        without(component, folder.path());
        let error = Model::from_pretrained(&ModelSource::from(folder.path()), &options(T5_TOKENS));
        let said = error.unwrap_err().to_string();
        let expected =
            format!("model_index.json: {component} is null, expected its class: text_encoder_3 alone");
        assert!(said.contains(&expected), "{said}");
    }
    // Forgotten, and not left out.
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("sd3/model"), folder.path(), &|path| !path.ends_with("text_encoder_3/config.json"));
    let error = Model::from_pretrained(&ModelSource::from(folder.path()), &options(T5_TOKENS)).unwrap_err();
    assert!(error.to_string().contains("text_encoder_3/config.json is missing"), "{error}");
}

#[test]
fn the_default_is_the_peers_length_and_a_picture_beyond_the_places_is_refused() {
    let model = Model::from_pretrained(&source(), &Default::default()).unwrap();
    assert_eq!(model.prompt_tokens("a cat").unwrap().states, CLIP_TOKENS + 256);
    assert_eq!(model.latent_shape([1040, 64]).unwrap(), [16, 130, 8]);
    let error = model.latent_shape([64, 1056]).unwrap_err();
    assert_eq!(error.to_string(), "width 1056 px, expected at most 1040");
}

#[test]
fn configs_that_cannot_work_say_why() {
    let refusal = |name: &str, value: Value| {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&golden("sd3/model"), folder.path(), &|_| true);
        let path = folder.path().join("transformer/config.json");
        let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        json[name] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let loaded = Model::outline(&ModelSource::from(folder.path()), &Default::default());
        loaded.unwrap_err().to_string()
    };
    for (name, value, said) in [
        ("joint_attention_dim", 48.into(), "is 48, expected the width of text_encoder_3, 40"),
        (
            "pooled_projection_dim",
            12.into(),
            "expected the pooled width of text_encoder and text_encoder_2, 28",
        ),
        ("in_channels", 4.into(), "out_channels is 16, expected in_channels, 4"),
        ("qk_norm", "layer_norm".into(), "qk_norm is layer_norm, expected null or rms_norm"),
        ("caption_projection_dim", 32.into(), "caption_projection_dim is 32, expected"),
        ("pos_embed_max_size", 0.into(), "pos_embed_max_size is 0, expected 1 to 4096"),
        ("attention_head_dim", 7.into(), "attention_head_dim is 7"),
        ("patch_size", 4.into(), "patch_size is 4, expected 2 to 2"),
    ] {
        let found = refusal(name, value);
        assert!(found.contains(said), "{found}");
    }
}
