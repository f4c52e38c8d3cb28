//! What holds for every family: a model is found by its folder or its files, a saved one is the same one, and nobody
//! outside this crate knows which it is.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use fewstep_models::{
    LoadOptions, Model, ModelError, ModelSource, Pipeline, PipelineOptions, Request, WeightFiles, WeightType,
    check_weights, expected_tensors, weights_hash,
};
use fewstep_testkit::{assert_close, golden, values};

const FAMILIES: [&str; 6] = ["flux", "qwen_image", "sd15", "sd3", "sdxl", "zimage"];

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

/// A folder with the configs of a golden one, in which FLUX's transformer and autoencoder are in their authors' layout.
fn folder_in_original_layout(path: &Path) {
    for (component, file) in [("transformer", "flux1"), ("vae", "ae")] {
        std::fs::create_dir_all(path.join(component)).unwrap();
        let place = |folder: &Path| folder.join(component).join("config.json");
        std::fs::copy(place(&folder("flux")), place(path)).unwrap();
        let weights = golden(&format!("flux/original/{file}.safetensors"));
        std::fs::copy(weights, path.join(component).join(format!("{file}.safetensors"))).unwrap();
    }
}

fn drawn(source: &ModelSource) -> Vec<f32> {
    let model = Model::from_pretrained(source, &LoadOptions::default()).unwrap();
    let pipe = Pipeline::new(model, Device::flex());
    let request = Request { num_inference_steps: 2, cfg_scale: 2.0, ..Request::new("a cat", 64, 64) };
    values(pipe.generate(&request).unwrap().latents)
}

#[test]
fn weights_in_their_authors_layout_are_the_same_model() {
    let temporary = tempfile::tempdir().unwrap();
    let original = temporary.path().join("original");
    folder_in_original_layout(&original);
    let weights = |component: &str, file: &str| vec![original.join(component).join(file)];
    let groups = [
        files("flux", "text_encoder"),
        files("flux", "text_encoder_2"),
        weights("transformer", "flux1.safetensors"),
        weights("vae", "ae.safetensors"),
    ];
    let given = ModelSource::from_files(&groups).unwrap().with_tokenizer(folder("flux").join("tokenizer"));
    for component in ["transformer", "vae"] {
        check_weights(&given, component).unwrap();
    }
    let expected = drawn(&ModelSource::from(&folder("flux")));
    assert_close(&drawn(&given), &expected, 0.0);

    // What training leaves as it was is saved in the official layout.
    let saved = temporary.path().join("saved");
    let model = Model::from_pretrained(&given, &LoadOptions::default()).unwrap();
    model.save_pretrained(&given, &saved, WeightType::F32, &BTreeMap::new()).unwrap();
    assert_close(&drawn(&ModelSource::from(&saved)), &expected, 0.0);
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
        assert_close(&drawn(&ModelSource::from(saved.path())), &drawn(&source), 0.0);
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
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["train/src", "data/src", "report/src"] {
        for path in sources(&crates.join(folder)) {
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                let lower = line.to_lowercase();
                let named = NAMES.iter().find(|name| lower.contains(*name));
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
