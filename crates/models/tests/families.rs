//! What holds for every family: a model is found by its folder or its files, a saved one is the same one, and nobody
//! outside this crate knows which it is.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fewstep_models::{
    LoadOptions, Model, ModelError, ModelSource, Pipeline, PipelineOptions, Request, WeightFiles, WeightType,
    check_weights, expected_tensors, weights_hash,
};
use fewstep_testkit::{assert_close, golden, values};

const FAMILIES: [&str; 6] = ["flux", "qwen_image", "sd15", "sdxl", "wan", "zimage"];

fn folder(family: &str) -> PathBuf {
    golden(&format!("{family}/model"))
}

/// The weight files of a component.
fn files(family: &str, component: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder(family).join(component)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

fn components(family: &str) -> Vec<&'static str> {
    expected_tensors(&ModelSource::from(&folder(family))).unwrap().into_keys().collect()
}

#[test]
fn every_folder_has_the_weights_that_its_configs_ask_for() {
    for family in FAMILIES {
        let source = ModelSource::from(&folder(family));
        let expected = expected_tensors(&source).unwrap();
        assert!(expected.len() >= 3, "{family}");
        for (component, tensors) in expected {
            check_weights(&source, component).unwrap();
            let entries = WeightFiles::open(&folder(family).join(component)).unwrap().entries();
            assert!(entries.len() >= tensors.len(), "{family}/{component}");
        }
    }
}

#[test]
fn given_files_are_a_model_of_the_family_that_has_all_of_them() {
    for family in FAMILIES {
        let groups: Vec<Vec<PathBuf>> =
            components(family).into_iter().map(|component| files(family, component)).collect();
        let given = ModelSource::from_files(&groups).unwrap();
        assert!(given.is_whole(), "{family}");
        let whole = ModelSource::from(&folder(family));
        assert_eq!(weights_hash(&given).unwrap(), weights_hash(&whole).unwrap(), "{family}");
        let [given, whole] =
            [given, whole].map(|source| Model::outline(&source, &LoadOptions::default()).unwrap());
        assert_eq!(given.component_names(), whole.component_names(), "{family}");
        assert_eq!(given.scheduler(), whole.scheduler(), "{family}");
    }
}

#[test]
fn files_of_two_models_are_refused_by_name() {
    let groups = [files("flux", "transformer"), files("qwen_image", "vae")];
    let error = ModelSource::from_files(&groups).unwrap_err();
    assert!(matches!(&error, ModelError::MixedFamilies { given } if given.len() == 2), "{error}");
    assert!(error.to_string().contains("are not of one model"), "{error}");
}

#[test]
fn a_saved_model_draws_what_the_model_draws() {
    for family in FAMILIES {
        let saved = tempfile::tempdir().unwrap();
        let source = ModelSource::from(&folder(family));
        let model = Model::from_pretrained(&source, &LoadOptions::default()).unwrap();
        model.save_pretrained(&source, saved.path(), WeightType::F32, &BTreeMap::new()).unwrap();
        let draw = |source: &Path| {
            let pipeline = Pipeline::from_pretrained(source, PipelineOptions::default()).unwrap();
            let request = Request { num_inference_steps: 2, cfg_scale: 2.0, ..Request::new("a cat", 64, 64) };
            values(pipeline.generate(&request).unwrap().latents)
        };
        assert_close(&draw(saved.path()), &draw(&folder(family)), 0.0);
    }
}

/// Methods, the trainer and the command line see a model through its methods alone.
#[test]
fn no_line_of_training_names_a_family() {
    const NAMES: [&str; 8] = [
        "qwen",
        "flux",
        "sdxl",
        "stable_diffusion",
        "stablediffusion",
        "stable diffusion",
        "z-image",
        "zimage",
    ];
    /// Other words begin with it.
    const SHORT_NAME: &str = "wan";
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["train/src", "data/src", "report/src"] {
        for path in sources(&crates.join(folder)) {
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                let lower = line.to_lowercase();
                let is_word =
                    lower.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == SHORT_NAME);
                let named =
                    NAMES.iter().find(|name| lower.contains(*name)).or(is_word.then_some(&SHORT_NAME));
                assert!(named.is_none(), "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}

/// Rust files below a folder, those of tests aside.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match path.is_dir() {
            true if name != "tests" => found.extend(sources(&path)),
            false if name.ends_with(".rs") && name != "tests.rs" => found.push(path),
            _ => {}
        }
    }
    found
}
