//! Small models of every family with random weights, for trying a machine: `fewstep selftest` compares what they compute
//! with what burn's own operations make of them.
//!
//! They are folders in the official layout like any other, loaded by the same code. Widths are those of real heads, so
//! that the operations run as they do in a published model; everything else is as small as the family allows.

mod words;

use std::fs;
use std::path::Path;

use fewstep_flow::noise::TorchGenerator;
use serde_json::{Value, json};

pub(crate) use words::Words;

use crate::model::KINDS;
use crate::{ModelError, ModelSource, WeightType, expected_tensors, save_tensors};

/// What a family's small model is made of.
pub(crate) struct Trial {
    /// The `config.json` of each component.
    pub(crate) configs: Vec<(&'static str, Value)>,
    /// The folders of tokenizers.
    pub(crate) tokenizers: Vec<(&'static str, Words)>,
}

/// The classes, as `model_index.json` names them, of all families that have a small model.
pub fn trial_classes() -> Vec<&'static str> {
    KINDS.iter().filter(|kind| kind.trial().is_some()).map(|kind| kind.pipeline_class()).collect()
}

/// Writes the small model of a class into a folder; the same seed gives the same weights. `false` where there is none.
///
/// # Errors
/// If a file cannot be written.
pub fn write_trial_model(class: &str, folder: &Path, seed: u64) -> Result<bool, ModelError> {
    let Some(kind) = KINDS.iter().find(|kind| kind.pipeline_class() == class) else { return Ok(false) };
    let Some(Trial { configs, tokenizers }) = kind.trial() else { return Ok(false) };
    for (path, text) in kind.published_files() {
        write(&folder.join(path), text)?;
    }
    for (component, config) in configs {
        write(&folder.join(component).join("config.json"), &config.to_string())?;
    }
    for (name, words) in tokenizers {
        for (file, text) in words.files() {
            write(&folder.join(name).join(file), &text)?;
        }
    }
    write_random_weights(folder, seed).map(|()| true)
}

/// Writes weight files for the configs of a model folder, all components with one seed. They keep states at about their
/// scale and no parameter at zero: for measuring and comparing, not for training, which starts from [`crate::Model::random`].
///
/// # Errors
/// If a config is missing, damaged or unsupported, or a file cannot be written.
pub fn write_random_weights(folder: &Path, seed: u64) -> Result<(), ModelError> {
    let mut generator = TorchGenerator::new(seed);
    for (component, tensors) in expected_tensors(&ModelSource::from(folder))? {
        if tensors.is_empty() {
            continue;
        }
        let filled = tensors.into_iter().map(|(key, shape)| {
            let values = drawn(&key, &shape, &mut generator);
            (key, shape, values)
        });
        let path = folder.join(component).join("model.safetensors");
        save_tensors(&path, filled, WeightType::F32, &Default::default())?;
    }
    Ok(())
}

/// Vectors are near one where they multiply and near zero where they are added.
fn drawn(key: &str, shape: &[usize], generator: &mut TorchGenerator) -> Vec<f32> {
    const SPREAD: f32 = 0.1;
    let multiplies = !key.ends_with("bias");
    let (centre, deviation) = match shape {
        [_, inner @ ..] if !inner.is_empty() => {
            (0.0, (inner.iter().product::<usize>() as f32).sqrt().recip())
        }
        _ if multiplies => (1.0, SPREAD),
        _ => (0.0, SPREAD),
    };
    let values = generator.randn(shape.iter().product());
    values.into_iter().map(|value| centre + deviation * value).collect()
}

fn write(path: &Path, text: &str) -> Result<(), ModelError> {
    let folder = path.parent().expect("the path of a file in a folder");
    fs::create_dir_all(folder).and_then(|()| fs::write(path, text)).map_err(ModelError::io(path))
}

/// The config of a CLIP text model, 128 wide; `class` is the one that its file names.
pub(crate) fn clip(class: &str, activation: &str) -> Value {
    json!({
        "architectures": [class],
        "vocab_size": words::CLIP_SIZE, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 128, "hidden_act": activation, "eos_token_id": 2,
    })
}

/// The config of T5's encoder, or of UMT5's; `class` is the one that its file names.
pub(crate) fn t5(class: &str, width: usize) -> Value {
    json!({
        "architectures": [class], "vocab_size": Words::T5.count(), "d_model": width, "d_kv": 32,
        "d_ff": 2 * width, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    })
}

/// The config of an autoencoder whose pixels are 8 on a side.
pub(crate) fn autoencoder_kl(latent_channels: usize, quantizes: bool) -> Value {
    let (down, up) = (["DownEncoderBlock2D"; 4], ["UpDecoderBlock2D"; 4]);
    json!({
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "latent_channels": latent_channels,
        "norm_num_groups": 32, "scaling_factor": 0.5, "use_quant_conv": quantizes,
        "use_post_quant_conv": quantizes, "mid_block_add_attention": true,
        "in_channels": 3, "out_channels": 3, "act_fn": "silu",
        "down_block_types": down, "up_block_types": up,
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};
    use fewstep_testkit::{random, values};

    use super::*;
    use crate::{Denoiser, LoadOptions, Model};

    #[test]
    fn every_family_has_a_small_model_whose_parts_give_finite_numbers() {
        let classes = trial_classes();
        assert_eq!(classes.len(), KINDS.len());
        for class in classes {
            let folder = tempfile::tempdir().unwrap();
            assert!(write_trial_model(class, folder.path(), 1).unwrap());
            let model =
                Model::from_pretrained(&ModelSource::from(folder.path()), &LoadOptions::default()).unwrap();
            let condition = model.encode_prompts(&["a cat".to_owned()]).unwrap().with_frames(1);
            let latents = model.encode_images(random([1, 3, 64, 64], 1, &Device::flex()), 1);
            let sigma = Tensor::from_floats([0.7], &Device::flex());
            let velocity = model.velocity(latents, sigma, &condition);
            let pixels = model.decode_latents(velocity.clone(), 1);
            assert_eq!(pixels.dims(), [1, 3, 64, 64]);
            for (name, part) in [("text", values(condition.text)), ("velocity", values(velocity))] {
                let square = part.iter().map(|x| x * x).sum::<f32>() / part.len() as f32;
                assert!((1e-4..1e4).contains(&square), "{class}: {name} has a mean square of {square}");
            }
            assert!(values(pixels).iter().all(|x| x.is_finite()), "{class}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_weights_again_and_another_one_others() {
        let hash = |seed| {
            let folder = tempfile::tempdir().unwrap();
            write_trial_model("FluxPipeline", folder.path(), seed).unwrap();
            crate::weights_hash(&ModelSource::from(folder.path())).unwrap()
        };
        assert_eq!(hash(1), hash(1));
        assert_ne!(hash(1), hash(2));
    }

    #[test]
    fn an_unknown_class_has_none() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!write_trial_model("OtherPipeline", folder.path(), 1).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
