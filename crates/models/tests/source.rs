//! Where a model's files are found: the golden Qwen-Image model, given as a folder and file by file.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use fewstep_models::qwen_image::{PromptTokenizer, TextEncoder, Transformer};
use fewstep_models::{
    Model, ModelError, ModelSource, NamedVisitor, WeightFiles, WeightType, visit_named, weights_hash,
};
use fewstep_testkit::{golden, write_tiny_configs};

fn model() -> PathBuf {
    golden("qwen_image/model")
}

/// The files of a folder whose names end so, sorted.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.to_string_lossy().ends_with(end)).collect();
    files.sort();
    files
}

fn shards(component: &str) -> Vec<PathBuf> {
    files(&model().join(component), ".safetensors")
}

/// All weights of the golden model, file by file, in an order that is not the folder's.
fn groups() -> Vec<Vec<PathBuf>> {
    ["vae", "transformer", "text_encoder"].map(shards).to_vec()
}

/// Copies the golden model's files of some components under names and in folders that say nothing.
fn copy(source: &[PathBuf], folder: &Path, stem: &str) -> Vec<PathBuf> {
    fs::create_dir_all(folder).unwrap();
    let target = |index: usize| folder.join(format!("{stem}{index}.safetensors"));
    let copied = source.iter().enumerate().map(|(index, path)| {
        fs::copy(path, target(index)).unwrap();
        target(index)
    });
    copied.collect()
}

/// Sums of all parameters' values and magnitudes, in order.
fn fingerprint(module: &impl burn::module::Module) -> Vec<f32> {
    struct Sums(Vec<f32>);
    impl NamedVisitor for Sums {
        fn visit<const D: usize>(
            &mut self,
            _: &str,
            parameter: &burn::module::Param<burn::tensor::Tensor<D>>,
        ) {
            let values = fewstep_testkit::values(parameter.val());
            self.0.push(values.iter().enumerate().map(|(index, value)| value * (index % 7) as f32).sum());
        }
    }
    let mut sums = Sums(Vec::new());
    visit_named(module, &mut sums);
    sums.0
}

#[test]
fn given_files_are_the_same_model_as_their_folder() {
    let (folder, given) = (ModelSource::from(&model()), ModelSource::from_files(&groups()).unwrap());
    let device = Device::flex();
    let transformers = [&folder, &given].map(|source| Transformer::from_pretrained(source, &device).unwrap());
    assert_eq!(fingerprint(&transformers[0]), fingerprint(&transformers[1]));
    let encoders = [&folder, &given].map(|source| TextEncoder::from_pretrained(source, &device).unwrap());
    assert_eq!(fingerprint(&encoders[0]), fingerprint(&encoders[1]));
    let tokens = [&folder, &given].map(|source| {
        let tokenizer = PromptTokenizer::read(source, 1024).unwrap();
        tokenizer.encode(&["a cat, 一只猫".to_owned()]).unwrap().ids
    });
    assert_eq!(tokens[0], tokens[1]);
    assert_eq!(weights_hash(&folder).unwrap(), weights_hash(&given).unwrap());
}

#[test]
fn components_are_recognised_by_their_keys_not_their_names() {
    let temporary = tempfile::tempdir().unwrap();
    let config_of = |component: &str| model().join(component).join("config.json");
    let mut groups = Vec::new();
    for (component, alias) in [("transformer", "vae"), ("vae", "b"), ("text_encoder", "transformer")] {
        let folder = temporary.path().join(alias).join("files");
        groups.push(copy(&shards(component), &folder, "model"));
        fs::copy(config_of(component), folder.join("config.json")).unwrap();
    }
    let source = ModelSource::from_files(&groups).unwrap().with_tokenizer(model().join("tokenizer"));
    let device = Device::flex();
    let expected = Transformer::from_pretrained(&ModelSource::from(&model()), &device).unwrap();
    let found = Transformer::from_pretrained(&source, &device).unwrap();
    assert_eq!(fingerprint(&found), fingerprint(&expected));
    TextEncoder::from_pretrained(&source, &device).unwrap();
    // The template is the published one where no model_index.json is around.
    let prompts = ["a cat".to_owned()];
    let tokens =
        |source: &ModelSource| PromptTokenizer::read(source, 1024).unwrap().encode(&prompts).unwrap().ids;
    assert_eq!(tokens(&source), tokens(&ModelSource::from(&model())));
}

#[test]
fn one_component_needs_only_its_own_files() {
    let source = ModelSource::from_files(&[shards("transformer")]).unwrap();
    Transformer::from_pretrained(&source, &Device::flex()).unwrap();
    let error = TextEncoder::from_pretrained(&source, &Device::flex()).unwrap_err();
    assert!(matches!(&error, ModelError::MissingComponent { component: "text_encoder", .. }), "{error}");
    assert!(error.to_string().contains("diffusion_pytorch_model-00001-of-00005.safetensors"), "{error}");
}

#[test]
fn configs_that_are_nowhere_are_named_with_the_places_looked_in() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("models/mine");
    let source = ModelSource::from_files(&[copy(&shards("transformer"), &folder, "x")]).unwrap();
    let error = Transformer::from_pretrained(&source, &Device::flex()).unwrap_err().to_string();
    for place in
        ["models/mine/config.json", "models/mine/transformer/config.json", "models/transformer/config.json"]
    {
        assert!(error.contains(&temporary.path().join(place).display().to_string()), "{place}: {error}");
    }
    let error = PromptTokenizer::read(&source, 1024).unwrap_err().to_string();
    assert!(error.contains("models/tokenizer") && error.contains("--tokenizer-path"), "{error}");
    // It is found once it is in one of these places.
    fs::create_dir(folder.join("transformer")).unwrap();
    fs::copy(model().join("transformer/config.json"), folder.join("transformer/config.json")).unwrap();
    Transformer::from_pretrained(&source, &Device::flex()).unwrap();
}

#[test]
fn a_folder_shared_by_components_has_no_config_of_one() {
    let temporary = tempfile::tempdir().unwrap();
    let groups = [
        copy(&shards("transformer"), temporary.path(), "t"),
        copy(&shards("text_encoder"), temporary.path(), "e"),
    ];
    fs::copy(model().join("text_encoder/config.json"), temporary.path().join("config.json")).unwrap();
    let source = ModelSource::from_files(&groups).unwrap();
    let error = Transformer::from_pretrained(&source, &Device::flex()).unwrap_err();
    assert!(matches!(error, ModelError::NotBeside { .. }), "{error}");
}

#[test]
fn weights_of_nothing_known_and_of_the_same_component_are_refused() {
    let unknown = ModelSource::from_files(&[vec![golden("rng/rng.safetensors")]]).unwrap_err();
    assert!(matches!(&unknown, ModelError::UnknownWeights { path, .. } if path.ends_with("rng.safetensors")));
    let twice = ModelSource::from_files(&[shards("transformer"), shards("vae"), shards("transformer")]);
    assert!(matches!(twice.unwrap_err(), ModelError::SameComponent { component: "transformer", .. }));
    // Shards outside a nested list: the first is not recognised by itself, or the second.
    let flat: Vec<Vec<PathBuf>> = shards("transformer").into_iter().map(|path| vec![path]).collect();
    let error = ModelSource::from_files(&flat).unwrap_err().to_string();
    assert!(error.contains("nested list"), "{error}");
    let missing = ModelSource::from_files(&[vec!["nowhere/x.safetensors".into()]]).unwrap_err();
    assert!(missing.to_string().contains("nowhere/x.safetensors"), "{missing}");
}

#[test]
fn a_folder_without_a_component_is_an_error_that_names_it() {
    let temporary = tempfile::tempdir().unwrap();
    fs::copy(model().join("model_index.json"), temporary.path().join("model_index.json")).unwrap();
    let source = ModelSource::from(temporary.path());
    let error = Transformer::from_pretrained(&source, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("transformer/config.json is missing"), "{error}");
    fs::create_dir(temporary.path().join("transformer")).unwrap();
    fs::copy(model().join("transformer/config.json"), temporary.path().join("transformer/config.json"))
        .unwrap();
    let error = Transformer::from_pretrained(&source, &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("transformer/*.safetensors is missing"), "{error}");
}

/// Opens a component's folder with weight files under these names, all of them the same small file.
fn open(names: &[&str], index: Option<(&str, &[&str])>) -> Result<Vec<String>, ModelError> {
    let temporary = tempfile::tempdir().unwrap();
    for (number, name) in names.iter().enumerate() {
        let tensors = [(format!("{number}"), vec![1], vec![1.0])];
        let path = temporary.path().join(name);
        fewstep_models::save_tensors(&path, tensors, WeightType::F32, &Default::default()).unwrap();
    }
    if let Some((name, shards)) = index {
        let entries: Vec<String> = shards.iter().map(|shard| format!("{shard:?}:{shard:?}")).collect();
        fs::write(temporary.path().join(name), format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")))
            .unwrap();
    }
    let files = WeightFiles::open(temporary.path())?;
    Ok(files.keys().map(|key| names[key.parse::<usize>().unwrap()].to_owned()).collect())
}

#[test]
fn the_weights_of_a_folder_are_its_index_its_official_file_or_its_only_variant() {
    let (one, two) = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors");
    let both = [one, two];
    let (official, half) =
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors");
    let index = Some(("model.safetensors.index.json", both.as_slice()));
    assert_eq!(open(&[one, two, "stray.safetensors"], index).unwrap(), [one, two]);
    assert_eq!(open(&[one, two], None).unwrap(), [one, two]);
    assert_eq!(open(&[half, official], None).unwrap(), [official]);
    assert_eq!(open(&["model.safetensors"], None).unwrap(), ["model.safetensors"]);
    assert_eq!(open(&[half], None).unwrap(), [half]);
    let variant = Some(("model.safetensors.index.fp16.json", both.as_slice()));
    assert_eq!(open(&[one, two], variant).unwrap(), [one, two]);
}

#[test]
fn missing_shards_are_named_and_variants_are_not_mixed() {
    let (one, two) = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors");
    let both = [one, two];
    let index = Some(("model.safetensors.index.json", both.as_slice()));
    for found in [open(&[one], index), open(&[one], None)] {
        let error = found.unwrap_err();
        assert!(matches!(&error, ModelError::MissingShard { shard, .. } if shard.ends_with(two)), "{error}");
    }
    let error = open(&["a.safetensors", "b.safetensors"], None).unwrap_err();
    assert!(matches!(&error, ModelError::Ambiguous { files, .. } if files.len() == 2), "{error}");
    let error = open(&[], None).unwrap_err().to_string();
    assert!(error.contains("*.safetensors is missing"), "{error}");
}

#[test]
fn a_model_from_given_files_is_saved_as_a_complete_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let path = |name: &str| temporary.path().join(name);
    write_tiny_configs(&path("configs"));
    let configs = ModelSource::from(&path("configs"));
    let first = Model::random(&configs, 1, &Device::flex()).unwrap();
    let save = |source: &ModelSource, name: &str| {
        first.save_pretrained(source, &path(name), WeightType::F32, &Default::default()).unwrap();
    };
    save(&configs, "folder");
    let component = |name: &str| files(&path("folder").join(name), ".safetensors");
    let given = ModelSource::from_files(&[component("transformer"), component("text_encoder")]).unwrap();
    save(&given, "copy");
    let load =
        |name: &str| Model::from_pretrained(&ModelSource::from(&path(name)), &Default::default()).unwrap();
    assert_eq!(fingerprint(&load("copy")), fingerprint(&first));
    let grid = |model: &Model| model.sigma_grid(4, [8, 8]).unwrap().as_slice().to_vec();
    assert_eq!(grid(&load("copy")), grid(&load("folder")));
}
