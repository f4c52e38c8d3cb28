//! What a run starts from beside its model: an adapter that becomes part of the base, and weights of an earlier run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fewstep_models::lora::{self, Fusion};
use fewstep_models::{LoraFile, WeightFiles};
use fewstep_testkit::assert_close;

use super::fixtures::{Bench, train};
use crate::Trainable;
use crate::host::trainable_values;
use crate::recipe::{LoraFormat, OutputLayout, Recipe, Task};

/// Adapters that were trained for a few steps.
fn adapters(bench: &Bench, output_path: PathBuf) -> Recipe {
    Recipe {
        task: Task::DirectDistill,
        lora_base_model: Some("transformer".into()),
        learning_rate: 1e-2,
        output_path,
        ..bench.recipe()
    }
}

#[test]
fn a_preset_adapter_is_part_of_the_base() {
    let bench = Bench::new().with_teacher_data();
    let (_, preset) = train(&adapters(&bench, bench.path("preset")));
    let fused = bench.path("fused");
    let loras = vec![LoraFile { path: preset.clone(), alpha: 1.0 }];
    let (model, max_shard_bytes) = (bench.path("model"), lora::MAX_SHARD_BYTES);
    lora::fuse(&Fusion { model, loras, output: fused.clone(), dtype: None, max_shard_bytes }).unwrap();
    let with_preset = Recipe {
        preset_lora_path: Some(preset),
        preset_lora_model: Some("dit".into()),
        ..adapters(&bench, bench.path("run"))
    };
    let on_fused = Recipe { model: fused, ..adapters(&bench, bench.path("on_fused")) };
    let plain = adapters(&bench, bench.path("plain"));
    let [found, expected, plain] = [with_preset, on_fused, plain].map(|recipe| train(&recipe).0);
    let losses = |losses: &[f64]| losses.iter().map(|loss| *loss as f32).collect::<Vec<_>>();
    assert_close(&losses(&found), &losses(&expected), 1e-5);
    assert!((found[0] - plain[0]).abs() > 1e-3, "the preset changes nothing");
}

/// The tensors of a file by key.
fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let files = WeightFiles::open(path).unwrap();
    files.keys().map(|key| (key.to_owned(), files.read(key).unwrap().1)).collect()
}

/// Trains in the peer's layout, then starts another run from its file.
#[track_caller]
fn assert_starts_from_the_peers_file(recipe: &Recipe, bench: &Bench) {
    let (_, path) = train(&Recipe { output_layout: OutputLayout::Diffsynth, ..recipe.clone() });
    let next = Recipe { resume_from_checkpoint: Some(path.clone()), ..recipe.clone() };
    let model = bench.model();
    let trainable = Trainable::new(&next, &model).unwrap();
    let started = trainable.prepare(model, &next).unwrap();
    let expected = tensors(&path);
    let found = trainable_values(&started);
    assert_eq!(found.len(), expected.len());
    for (name, tensor) in found {
        let (_, key) = started.weight_key(&name);
        let key = match recipe.lora_format {
            LoraFormat::Diffusers => format!("transformer.{}", key.replace(".default.", ".")),
            _ if recipe.remove_prefix_in_ckpt.is_empty() => format!("pipe.dit.{key}"),
            _ => key,
        };
        let scale = if name.ends_with(".lora.up") { recipe.lora_scale() } else { 1.0 };
        let values: Vec<f32> = tensor.values.iter().map(|value| value * scale).collect();
        assert_eq!(values, expected[&key], "{key}");
    }
}

#[test]
fn adapters_start_from_the_file_of_an_earlier_run() {
    let bench = Bench::new().with_teacher_data();
    let recipe = adapters(&bench, bench.path("run"));
    assert_starts_from_the_peers_file(&recipe, &bench);
    let other = Recipe {
        lora_format: LoraFormat::Diffusers,
        lora_alpha: Some(2.0 * recipe.lora_rank as f64),
        ..adapters(&bench, bench.path("other"))
    };
    assert_starts_from_the_peers_file(&other, &bench);
}

#[test]
fn adapters_are_written_in_either_spelling() {
    let bench = Bench::new().with_teacher_data();
    let file = |lora_format, name: &str| {
        let (_, path) = train(&Recipe { lora_format, ..adapters(&bench, bench.path(name)) });
        lora::LoraWeights::open(&path).unwrap().format().unwrap().name()
    };
    assert_eq!(file(LoraFormat::Diffsynth, "a"), "diffsynth");
    assert_eq!(file(LoraFormat::Diffusers, "b"), "diffusers");
}

#[test]
fn full_weights_start_from_the_file_of_an_earlier_run_with_its_prefix() {
    let bench = Bench::new().with_pictures();
    let recipe = Recipe {
        task: Task::Sft,
        trainable_models: vec!["transformer".into()],
        remove_prefix_in_ckpt: String::new(),
        ..bench.recipe()
    };
    assert_starts_from_the_peers_file(&recipe, &bench);
}
