//! The autoencoder against diffusers and DiffSynth-Studio (goldens/qwen_image/vae.safetensors).

use burn::tensor::{Device, Tensor};
use fewstep_models::qwen_image::Vae;
use fewstep_models::{VideoAutoencoder, VideoAutoencoderConfig};
use fewstep_testkit::{Golden, assert_tensors_close, golden, values};

use crate::{TOLERANCE, assert_relatively_close, edit_json, folder, model_copy, source};

const SIZES: [&str; 3] = ["64x64", "96x64", "64x96"];

fn numbers() -> Golden {
    Golden::open(golden("qwen_image/vae.safetensors"))
}

fn autoencoder() -> VideoAutoencoder {
    match Vae::from_pretrained(&source(), &Device::flex()).expect("the golden VAE loads") {
        Vae::Autoencoder(vae) => vae,
        _ => panic!("the golden VAE has weights"),
    }
}

fn config() -> VideoAutoencoderConfig {
    let text = std::fs::read_to_string(folder().join("vae/config.json")).expect("golden is there");
    serde_json::from_str(&text).expect("the golden config parses")
}

/// One number per channel, broadcastable to latents.
fn per_channel(values: &[f32]) -> Tensor<4> {
    Tensor::<1>::from_floats(values, &Device::flex()).reshape([1, values.len(), 1, 1])
}

#[test]
fn encoding_and_decoding_equal_the_peer_on_square_tall_and_wide_pictures() {
    let (golden, vae, device) = (numbers(), autoencoder(), Device::flex());
    for size in SIZES {
        let latents = vae.encode(golden.tensor(&format!("{size}.pixels"), &device), 1);
        assert_tensors_close(
            latents,
            golden.tensor(&format!("{size}.diffsynth_latents"), &device),
            TOLERANCE,
        );
        let pixels = vae.decode(golden.tensor(&format!("{size}.z"), &device), 1);
        assert_tensors_close(pixels, golden.tensor(&format!("{size}.diffsynth_decoded"), &device), TOLERANCE);
    }
}

#[test]
fn every_layer_equals_the_peers() {
    let (golden, vae, device) = (numbers(), autoencoder(), Device::flex());
    let mut states = vae.encode_states(golden.tensor("layers.pixels", &device));
    states.extend(vae.decode_states(golden.tensor("layers.z", &device)));
    let mut compared = 0;
    for (name, found) in states {
        let key = format!("layers.{name}");
        // Attention within a middle block was recorded for the encoder only.
        if name == "dec.mid.attn" {
            continue;
        }
        // Residual streams grow above unit scale.
        assert_relatively_close(found, golden.tensor::<5>(&key, &device).squeeze_dim::<4>(2));
        compared += 1;
    }
    let recorded = golden.keys().iter().filter(|key| key.starts_with("layers.")).count();
    // All but the two inputs and the two final outputs, which the whole passes cover.
    assert_eq!(compared, recorded - 4);
}

#[test]
fn posterior_equals_the_peers() {
    let (golden, vae, device) = (numbers(), autoencoder(), Device::flex());
    for size in SIZES {
        let states = vae.encode_states(golden.tensor(&format!("{size}.pixels"), &device));
        let (name, moments) = states.last().expect("states");
        assert_eq!(name, "quant_conv");
        let parts = ["mean", "logvar"].map(|part| golden.tensor::<4>(&format!("{size}.{part}"), &device));
        // Not normalised: a few standard deviations of up to three.
        assert_relatively_close(moments.clone(), Tensor::cat(parts.to_vec(), 1));
    }
}

#[test]
fn decoding_applies_mean_and_deviation_of_the_config_and_does_not_clamp() {
    let (golden, vae, device, config) = (numbers(), autoencoder(), Device::flex(), config());
    for size in SIZES {
        let raw: Tensor<4> = golden.tensor(&format!("{size}.z"), &device);
        let normalised = (raw - per_channel(&config.latents_mean)) / per_channel(&config.latents_std);
        // The peer's own class takes raw latents and clamps.
        let expected: Tensor<4> = golden.tensor(&format!("{size}.decoded_no_denorm"), &device);
        let pixels = vae.decode(normalised, 1);
        assert_tensors_close(pixels.clone().clamp(-1.0, 1.0), expected, TOLERANCE);
        assert!(values(pixels).iter().any(|value| value.abs() > 1.0), "no pixel of {size} needs the clamp");
    }
}

#[test]
fn a_batch_is_its_pictures() {
    let (golden, vae, device) = (numbers(), autoencoder(), Device::flex());
    let first: Tensor<4> = golden.tensor("64x64.pixels", &device);
    let second = first.clone().flip([3]);
    let batch = vae.encode(Tensor::cat(vec![first.clone(), second.clone()], 0), 1);
    assert_tensors_close(
        batch.clone(),
        Tensor::cat(vec![vae.encode(first, 1), vae.encode(second, 1)], 0),
        TOLERANCE,
    );
    let one_by_one = batch.clone().chunk(2, 0).into_iter().map(|latents| vae.decode(latents, 1)).collect();
    assert_tensors_close(vae.decode(batch, 1), Tensor::cat(one_by_one, 0), TOLERANCE);
}

#[test]
fn configs_that_cannot_work_say_why() {
    let refusal = |name: &str, value: serde_json::Value| {
        let copy = model_copy();
        edit_json(&copy.path().join("vae/config.json"), |config| config[name] = value);
        Vae::from_pretrained(&copy.path().into(), &Device::flex()).expect_err("must not load").to_string()
    };
    let class = refusal("_class_name", "AutoencoderKL".into());
    assert!(class.contains("vae of class AutoencoderKL, expected one of AutoencoderKLQwenImage"), "{class}");
    let channels = refusal("input_channels", 4.into());
    assert!(channels.contains("input_channels is 4, expected 3"), "{channels}");
    let stages = refusal("temperal_downsample", vec![true].into());
    assert!(stages.contains("temperal_downsample has 1 entries, expected 3"), "{stages}");
    let std = refusal("latents_std", vec![1.0; 15].into());
    assert!(std.contains("latents_std has 15 entries, expected 16"), "{std}");
    let wider = refusal("base_dim", 12.into());
    assert!(wider.contains("decoder.conv_in.bias has shape [32], expected [48]"), "{wider}");
}
