//! What holds for every family: a model is found by its folder or its files, a saved one is the same one, and nobody
//! outside this crate knows which it is.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Gradients, Tensor};
use fewstep_kernels::inject;
use fewstep_models::{
    Denoiser, LoadOptions, Model, ModelError, ModelSource, NamedVisitor, Pipeline, Request, WeightFiles,
    WeightType, check_weights, expected_tensors, visit_named, weights_hash,
};
use fewstep_testkit::{assert_close, golden, random, values};

const FAMILIES: [&str; 7] = ["flux", "qwen_image", "sd15", "sd3", "sdxl", "wan", "zimage"];

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

/// Gradients by the names of parameters; `None` where one has none.
type ByName = Vec<(String, Option<Vec<f32>>)>;

/// The velocity at fixed latents of a picture of `side` px, and the gradients by these and by all parameters, by name;
/// `None` where one has none.
fn pulled_back(model: &Model, side: usize) -> (Vec<f32>, ByName) {
    struct Read<'a>(&'a Gradients, ByName);
    impl NamedVisitor for Read<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            self.1.push((name.to_owned(), parameter.val().grad(self.0).map(values)));
        }
    }
    let condition = model.encode_prompts(&["a red apple".to_owned(), "a cat".to_owned()]).unwrap();
    let condition = condition.with_frames(1);
    let [channels, height, width] = model.latent_shape([side, side]).unwrap();
    let model = model.clone().train();
    let noisy = random::<4>([2, channels, height, width], 3, &Device::flex()).autodiff().require_grad();
    let sigma = Tensor::<1>::from_floats([0.7, 0.3], &Device::flex()).autodiff();
    let velocity = model.velocity(noisy.clone(), sigma, &condition.autodiff());
    let cotangent = random(velocity.dims(), 4, &Device::flex());
    let gradients = inject(velocity.clone(), cotangent).backward();
    let mut read = Read(&gradients, vec![("latents".into(), noisy.grad(&gradients).map(values))]);
    visit_named(&model, &mut read);
    (values(velocity), read.1)
}

#[test]
fn recomputed_blocks_have_the_gradients_of_kept_ones() {
    for family in FAMILIES {
        let source = ModelSource::from(&folder(family));
        let model = Model::from_pretrained(&source, &LoadOptions::default()).unwrap();
        let (kept_velocity, kept) = pulled_back(&model, 64);
        let (velocity, recomputed) = pulled_back(&model.recomputing_blocks(true), 64);
        assert_eq!(velocity, kept_velocity, "{family}");
        assert!(kept.iter().filter(|(_, gradient)| gradient.is_some()).count() > 20, "{family}");
        for ((name, found), (_, expected)) in recomputed.iter().zip(&kept) {
            match (found, expected) {
                (Some(found), Some(expected)) => {
                    let largest = expected.iter().fold(1e-3_f32, |largest, x| largest.max(x.abs()));
                    // The same sums in another order.
                    assert_close(found, expected, 2e-6 * largest);
                }
                (None, None) => {}
                _ => panic!("{family}, {name}: only one of the two has a gradient"),
            }
        }
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
