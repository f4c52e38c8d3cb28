//! LoRA files of both peers: the same model from every spelling, their numbers, and fused folders.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use fewstep_flow::Solver;
use fewstep_flow::noise::latent_noise;
use fewstep_models::lora::{self, Fusion, LoraConfig, LoraFormat, LoraWeights};
use fewstep_models::sampling::{Guidance, sample_latents};
use fewstep_models::{
    LoadOptions, LoraFile, Model, ModelError, ModelSource, NamedVisitor, WeightFiles, WeightType, read_info,
    save_tensors, visit_named,
};
use fewstep_testkit::{
    Golden, assert_close, assert_tensors_close, copy_folder, folder_files, golden, write_tiny_configs,
};
use tempfile::TempDir;

/// The prompt of the golden LoRA's pictures (goldens/make/qwen_fixtures.py).
const PROMPT: &str = "a photo of a cat sitting on the red sofa";
const DIFFSYNTH: &str = "training/lora_tanh_constantlr.safetensors";
const DIFFUSERS: &str = "training/diffusers_lora/pytorch_lora_weights.safetensors";

/// Absolute, on final latents.
const PIPELINE: f32 = 2e-5;

/// A copy of the golden model's folder.
struct Base {
    folder: TempDir,
}

impl Base {
    fn new() -> Self {
        let base = Self { folder: tempfile::tempdir().unwrap() };
        copy_folder(&golden("qwen_image/model"), &base.path("model"), &|_| true);
        base
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn load(&self, name: &str) -> Model {
        Model::from_pretrained(&ModelSource::from(&self.path(name)), &LoadOptions::default()).unwrap()
    }

    fn fusion(&self, file: &Path, alpha: f32) -> Fusion {
        Fusion {
            model: self.path("model"),
            loras: vec![LoraFile { path: file.to_owned(), alpha }],
            output: self.path("fused"),
            dtype: None,
            max_shard_bytes: lora::MAX_SHARD_BYTES,
        }
    }
}

/// The golden pipelines' final latents: 64×64 px, 4 steps, no guidance, seed 9.
fn draw(model: &Model) -> Tensor<4> {
    let grid = model.sigma_grid(4, [64, 64]).unwrap();
    let noise = latent_noise(9, [1, 16, 8, 8], &Device::flex());
    let guidance = Guidance::off(model.encode_prompts(&[PROMPT.into()]).unwrap());
    sample_latents(model, Solver::Euler, &grid, noise, &guidance)
}

/// Every adapter's factors by parameter name.
fn adapters(model: &Model) -> BTreeMap<String, Vec<f32>> {
    struct Collect(BTreeMap<String, Vec<f32>>);
    impl NamedVisitor for Collect {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if name.contains(".lora.") {
                self.0.insert(name.to_owned(), fewstep_testkit::values(parameter.val()));
            }
        }
    }
    let mut collect = Collect(BTreeMap::new());
    visit_named(model, &mut collect);
    collect.0
}

#[test]
fn both_formats_give_the_same_model_and_diffusers_numbers() {
    let base = Base::new();
    let diffsynth = lora::load(base.load("model"), &golden(DIFFSYNTH), 1.0).unwrap();
    let diffusers = lora::load(base.load("model"), &golden(DIFFUSERS), 1.0).unwrap();
    assert_eq!(adapters(&diffsynth).len(), 2 * 36);
    assert_eq!(adapters(&diffsynth), adapters(&diffusers));

    let expected = Golden::open(golden("training/diffusers_lora.safetensors"));
    let tensor = |key| expected.tensor::<4>(key, &Device::flex());
    // Four steps through components that agree to 1e-5 each; the two peers differ by 8e-6 from one another here
    // (diffusers_lora.json), and the adapter moves the latents by 0.46.
    assert_tensors_close(draw(&diffusers), tensor("adapter_latents"), PIPELINE);
    assert_tensors_close(draw(&lora::detach(diffusers)), tensor("base_latents"), PIPELINE);
}

#[test]
fn fused_weights_and_pictures_equal_the_peers() {
    let base = Base::new();
    let expected = Golden::open(golden("training/training.safetensors"));
    for alpha in [1.0, 0.5] {
        let fusion = base.fusion(&golden(DIFFSYNTH), alpha);
        lora::fuse(&fusion).unwrap();
        let latents: Tensor<5> =
            expected.tensor(&format!("tanh.fused_alpha{alpha:.1}.latents"), &Device::flex());
        let last: Tensor<4> = latents.slice(4..5).squeeze_dim(0);
        assert_tensors_close(draw(&base.load("fused")), last, PIPELINE);
        if alpha == 1.0 {
            let files = WeightFiles::open(&fusion.output.join("transformer")).unwrap();
            for key in ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.img_mod.1.weight"] {
                // One product of rank 4 in another order: two roundings at unit scale.
                let peer = expected.f32s(&format!("tanh.fused_alpha1.0.weight.{key}"));
                assert_close(&files.read(key).unwrap().1, &peer, 2.5e-7);
            }
        }
        fs::remove_dir_all(&fusion.output).unwrap();
    }
}

#[test]
fn fusing_copies_what_it_does_not_change_and_shards_like_the_peers() {
    let base = Base::new();
    let mut fusion = base.fusion(&golden(DIFFUSERS), 1.0);
    fusion.max_shard_bytes = 600_000;
    lora::fuse(&fusion).unwrap();
    let (before, after) = (folder_files(&base.path("model")), folder_files(&fusion.output));
    let changed = |path: &&PathBuf| path.to_string_lossy().contains("diffusion_pytorch_model");
    for path in before.keys().filter(|path| !changed(path)) {
        assert_eq!(before[path], after[path], "{}", path.display());
    }
    assert!(after.contains_key(Path::new("transformer/diffusion_pytorch_model.safetensors.index.json")));
    assert!(!after.contains_key(Path::new("transformer/diffusion_pytorch_model.safetensors")));
    for (path, bytes) in after.iter().filter(|(path, _)| path.starts_with("transformer")) {
        // A header of some kilobytes comes on top of the tensors.
        assert!(bytes.len() < 620_000, "{}: {} bytes", path.display(), bytes.len());
    }
    let [old, new] =
        [&base.path("model"), &fusion.output].map(|folder| WeightFiles::open(&folder.join("transformer")));
    let (old, new) = (old.unwrap(), new.unwrap());
    assert_eq!(old.entries(), new.entries());
    assert_eq!(old.read("proj_out.weight").unwrap(), new.read("proj_out.weight").unwrap());
}

#[test]
fn a_fusion_is_repeated_without_work_and_another_is_refused() {
    let base = Base::new();
    let mut fusion = base.fusion(&golden(DIFFSYNTH), 0.5);
    lora::fuse(&fusion).unwrap();
    let first = folder_files(&fusion.output);
    lora::fuse(&fusion).unwrap();
    assert_eq!(folder_files(&fusion.output), first);
    fusion.loras[0].alpha = 1.0;
    let error = lora::fuse(&fusion).unwrap_err();
    assert!(matches!(&error, ModelError::Taken { path } if *path == fusion.output), "{error}");
    assert_eq!(folder_files(&fusion.output), first);
    let names: Vec<_> = fs::read_dir(base.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "the model and the fused model: {names:?}");
}

#[test]
fn fused_weights_take_another_type_where_asked_to() {
    let base = Base::new();
    let mut fusion = base.fusion(&golden(DIFFSYNTH), 1.0);
    lora::fuse(&fusion).unwrap();
    let exact = WeightFiles::open(&fusion.output.join("transformer")).unwrap();
    fusion.output = base.path("half");
    fusion.dtype = Some(WeightType::BF16);
    lora::fuse(&fusion).unwrap();
    let rounded = WeightFiles::open(&fusion.output.join("transformer")).unwrap();
    assert!(rounded.entries().iter().all(|entry| entry.dtype == "BF16"));
    let key = "transformer_blocks.0.attn.to_q.weight";
    let (_, exact) = exact.read(key).unwrap();
    for (rounded, exact) in rounded.read(key).unwrap().1.into_iter().zip(exact) {
        // Rounded once from the exact sum: half a unit in the eighth binary digit.
        assert!((rounded - exact).abs() <= exact.abs() / 256.0, "{rounded} {exact}");
    }
}

#[test]
fn two_adapters_add_up_in_the_fused_weights() {
    let base = Base::new();
    let mut fusion = base.fusion(&golden(DIFFSYNTH), 0.75);
    fusion.loras.push(LoraFile { path: golden(DIFFUSERS), alpha: 0.25 });
    lora::fuse(&fusion).unwrap();
    let key = "transformer_blocks.0.attn.to_q.weight";
    let peer = Golden::open(golden("training/training.safetensors"))
        .f32s(&format!("tanh.fused_alpha1.0.weight.{key}"));
    let files = WeightFiles::open(&fusion.output.join("transformer")).unwrap();
    assert_close(&files.read(key).unwrap().1, &peer, 5e-7);
}

#[test]
fn converting_there_and_back_gives_the_file_again() {
    let folder = tempfile::tempdir().unwrap();
    let (there, back) = (folder.path().join("there.safetensors"), folder.path().join("back.safetensors"));
    lora::convert(&golden(DIFFSYNTH), &there, LoraFormat::Diffusers).unwrap();
    assert_eq!(LoraWeights::open(&there).unwrap().format(), Some(LoraFormat::Diffusers));
    lora::convert(&there, &back, LoraFormat::Diffsynth).unwrap();
    assert_eq!(LoraWeights::open(&back).unwrap().format(), Some(LoraFormat::Diffsynth));
    assert_eq!(tensors(&back), tensors(&golden(DIFFSYNTH)));
    assert_eq!(tensors(&there), tensors(&golden(DIFFUSERS)));

    let bytes = fs::read(&back).unwrap();
    lora::convert(&there, &back, LoraFormat::Diffsynth).unwrap();
    assert_eq!(fs::read(&back).unwrap(), bytes);
    let error = lora::convert(&there, &back, LoraFormat::Diffusers).unwrap_err();
    assert!(matches!(error, ModelError::Taken { .. }), "{error}");
    assert_eq!(fs::read(&back).unwrap(), bytes);
}

fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let files = WeightFiles::open(path).unwrap();
    files.keys().map(|key| (key.to_owned(), files.read(key).unwrap())).collect()
}

/// A two-block model with fresh weights in a folder, and LoRA files beside it.
struct Small {
    folder: TempDir,
    model: Model,
}

impl Small {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_tiny_configs(folder.path());
        let model = Model::random(&folder.path().into(), 1, &Device::flex()).unwrap();
        Self { folder, model }
    }

    /// Writes tensors whose element i is `start + 0.01 · i`.
    fn file(&self, tensors: &[(&str, [usize; 2], f32)], info: &[(&str, &str)]) -> PathBuf {
        let path = self.folder.path().join("lora.safetensors");
        let values = |shape: [usize; 2], start: f32| {
            (0..shape.iter().product()).map(|i| start + 0.01 * i as f32).collect::<Vec<f32>>()
        };
        let named = tensors
            .iter()
            .map(|(key, shape, start)| ((*key).to_owned(), shape.to_vec(), values(*shape, *start)));
        let info = info.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        save_tensors(&path, named.collect::<Vec<_>>(), WeightType::F32, &info).unwrap();
        path
    }

    fn load(&self, path: &Path) -> Result<Model, ModelError> {
        lora::load(self.model.clone(), path, 1.0)
    }

    fn error(&self, tensors: &[(&str, [usize; 2], f32)]) -> String {
        self.load(&self.file(tensors, &[])).expect_err("must not load").to_string()
    }
}

/// What a file's layers are scaled by, in the order of their names.
fn scales(path: &Path) -> Vec<f32> {
    LoraWeights::open(path).unwrap().layers().values().map(|layer| layer.scale).collect()
}

const TO_Q: &str = "transformer_blocks.0.attn.to_q";
const TO_K: &str = "transformer_blocks.1.attn.to_k";

#[test]
fn alpha_is_the_layers_own_else_the_metadatas_else_the_rank() {
    let small = Small::new();
    let names = [
        format!("transformer.{TO_Q}.lora_A.weight"),
        format!("transformer.{TO_Q}.lora_B.weight"),
        format!("transformer.{TO_K}.lora_A.weight"),
        format!("transformer.{TO_K}.lora_B.weight"),
        format!("transformer.{TO_Q}.alpha"),
    ];
    let pairs = [
        (names[0].as_str(), [4, 32], 0.0),
        (names[1].as_str(), [32, 4], 0.0),
        (names[2].as_str(), [16, 32], 0.0),
        (names[3].as_str(), [32, 16], 0.0),
    ];
    assert_eq!(scales(&small.file(&pairs, &[])), [1.0, 1.0]);
    let config = r#"{"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.use_rslora": false}"#;
    assert_eq!(scales(&small.file(&pairs, &[("lora_adapter_metadata", config)])), [2.0, 0.5]);
    let config = r#"{"lora_alpha": 8, "alpha_pattern": {"attn.to_k": 2}, "use_dora": null}"#;
    assert_eq!(scales(&small.file(&pairs, &[("lora_adapter_metadata", config)])), [2.0, 0.125]);
    let config = r#"{"transformer.lora_alpha": 8, "transformer.use_rslora": true}"#;
    assert_eq!(scales(&small.file(&pairs, &[("lora_adapter_metadata", config)])), [4.0, 2.0]);

    let own = [&pairs[..], &[(names[4].as_str(), [1, 1], 3.0)]].concat();
    let config = r#"{"transformer.lora_alpha": 8}"#;
    assert_eq!(scales(&small.file(&own, &[("lora_adapter_metadata", config)])), [0.75, 0.5]);
}

#[test]
fn metadata_that_would_be_misread_is_refused() {
    let small = Small::new();
    let pair = [
        ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0),
        ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 4], 0.0),
    ];
    for config in [
        r#"{"alpha_pattern": {"to_[kv]": 2}}"#,
        r#"{"transformer.use_dora": true}"#,
        "[]",
        r#"{"lora_alpha""#,
    ] {
        let error = small.load(&small.file(&pair, &[("lora_adapter_metadata", config)])).unwrap_err();
        assert!(matches!(&error, ModelError::Config { .. }), "{config}: {error}");
    }
}

#[test]
fn an_alpha_in_a_file_survives_saving_converting_and_fusing() {
    let small = Small::new();
    let kohya = small.file(
        &[
            ("lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight", [4, 32], -0.3),
            ("lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight", [32, 4], 0.2),
            ("lora_unet_transformer_blocks_0_attn_to_q.alpha", [1, 1], 3.0),
        ],
        &[],
    );
    let update = |path: &Path| {
        let lora = LoraWeights::open(path).unwrap();
        let tensors = tensors(path);
        let half = |marks: [&str; 2]| {
            let mut found = tensors.iter().filter(|(key, _)| marks.iter().any(|mark| key.contains(mark)));
            found.next().unwrap().1.1.clone()
        };
        let (down, up) = (half(["lora_A", "lora_down"]), half(["lora_B", "lora_up"]));
        let scale = lora.layers()[TO_Q].scale;
        // Row 1 of up times column 2 of down: one element of the product.
        (0..4).map(|rank| scale * up[4 + rank] * down[32 * rank + 2]).sum::<f32>()
    };
    let expected: f32 = (0..4)
        .map(|rank| 0.75 * (0.2 + 0.01 * (4 + rank) as f32) * (-0.3 + 0.01 * (32 * rank + 2) as f32))
        .sum();
    // Sums of four products of order 0.1.
    assert_close(&[update(&kohya)], &[expected], 1e-7);
    let converted = small.folder.path().join("converted.safetensors");
    lora::convert(&kohya, &converted, LoraFormat::Diffusers).unwrap();
    assert_close(&[update(&converted)], &[expected], 1e-7);
    let saved = small.folder.path().join("saved.safetensors");
    let model = small.load(&kohya).unwrap();
    lora::save(&model, &saved, &BTreeMap::new(), LoraFormat::Diffsynth).unwrap();
    assert_close(&[update(&saved)], &[expected], 1e-7);

    let source = small.folder.path().join("model");
    small
        .model
        .save_pretrained(&small.folder.path().into(), &source, WeightType::F32, &BTreeMap::new())
        .unwrap();
    let fusion = Fusion {
        model: source.clone(),
        loras: vec![LoraFile { path: kohya, alpha: 2.0 }],
        output: small.folder.path().join("fused"),
        dtype: None,
        max_shard_bytes: lora::MAX_SHARD_BYTES,
    };
    lora::fuse(&fusion).unwrap();
    let weight = |folder: &Path| {
        let files = WeightFiles::open(&folder.join("transformer")).unwrap();
        files.read(&format!("{TO_Q}.weight")).unwrap().1[32 + 2]
    };
    assert_close(&[weight(&fusion.output) - weight(&source)], &[2.0 * expected], 1e-6);
}

#[test]
fn layers_may_have_ranks_of_their_own() {
    let small = Small::new();
    let path = small.file(
        &[
            ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0),
            ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 4], 0.0),
            ("transformer_blocks.1.attn.to_k.lora_A.weight", [2, 32], 0.0),
            ("transformer_blocks.1.attn.to_k.lora_B.weight", [32, 2], 0.0),
        ],
        &[],
    );
    let lora = LoraWeights::open(&path).unwrap();
    assert_eq!((lora.layers()[TO_Q].rank, lora.layers()[TO_K].rank), (4, 2));
    let sizes: Vec<usize> = adapters(&small.load(&path).unwrap()).values().map(Vec::len).collect();
    assert_eq!(sizes, [128, 128, 64, 64]);
}

#[test]
fn a_lora_of_other_layers_is_refused_with_both_sides_named() {
    let small = Small::new();
    let said = small.error(&[
        ("double_blocks.0.img_attn.qkv.lora_A.weight", [4, 32], 0.0),
        ("double_blocks.0.img_attn.qkv.lora_B.weight", [96, 4], 0.0),
    ]);
    assert!(said.contains("1 of its 1 layers") && said.contains("double_blocks.0.img_attn.qkv"), "{said}");
    assert!(said.contains("time_text_embed.timestep_embedder.linear_1") && said.contains("hint:"), "{said}");
    let said = small.error(&[
        ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0),
        ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 4], 0.0),
        ("transformer_blocks.2.attn.to_q.lora_A.weight", [4, 32], 0.0),
        ("transformer_blocks.2.attn.to_q.lora_B.weight", [32, 4], 0.0),
    ]);
    assert!(said.contains("1 of its 2 layers") && said.contains("transformer_blocks.2.attn.to_q"), "{said}");
}

#[test]
fn keys_that_are_not_understood_are_listed() {
    let small = Small::new();
    let down = ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0);
    let up = ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 4], 0.0);
    let said =
        small.error(&[down, up, ("transformer_blocks.0.attn.to_q.lora_magnitude_vector", [1, 32], 0.0)]);
    assert!(said.contains("1 unknown (transformer_blocks.0.attn.to_q.lora_magnitude_vector)"), "{said}");
    let said = small.error(&[down]);
    assert!(said.contains("1 missing (transformer_blocks.0.attn.to_q.lora_B.default.weight)"), "{said}");
    let twice = ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0);
    let said = small.error(&[twice, down, up]);
    assert!(said.contains("1 unknown"), "{said}");
    let said = small.error(&[("transformer_blocks.0.attn.to_q.weight", [32, 32], 0.0)]);
    assert!(said.contains("no LoRA that can be read") && said.contains("hint:"), "{said}");
}

#[test]
fn factors_of_another_size_are_named_with_both_shapes() {
    let small = Small::new();
    let said = small.error(&[
        ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 48], 0.0),
        ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 4], 0.0),
    ]);
    assert!(said.contains("lora_A.weight has shape [4, 48], expected [4, 32]"), "{said}");
    let said = small.error(&[
        ("transformer_blocks.0.attn.to_q.lora_A.weight", [4, 32], 0.0),
        ("transformer_blocks.0.attn.to_q.lora_B.weight", [32, 8], 0.0),
    ]);
    assert!(said.contains("lora_B.weight has shape [32, 8], expected [32, 4]"), "{said}");
}

#[test]
fn a_fused_student_keeps_what_its_adapter_says_of_its_training() {
    let small = Small::new();
    let source = small.folder.path().join("model");
    small
        .model
        .save_pretrained(&small.folder.path().into(), &source, WeightType::F32, &BTreeMap::new())
        .unwrap();
    let config = LoraConfig { rank: 2, alpha: 2.0, target_modules: vec!["attn.to_q".into()] };
    let (student, _) = lora::attach(small.model.clone(), &config, 1).unwrap();
    let path = small.folder.path().join("student.safetensors");
    let hash = fewstep_models::weights_hash(&ModelSource::from(&source)).unwrap();
    let info = [("fewstep.task", "direct_distill"), (lora::BASE_HASH, hash.as_str())]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    lora::save(&student, &path, &info.into(), LoraFormat::Diffusers).unwrap();
    let mut fusion = Fusion {
        model: source,
        loras: vec![LoraFile { path, alpha: 1.0 }],
        output: small.folder.path().join("fused"),
        dtype: None,
        max_shard_bytes: lora::MAX_SHARD_BYTES,
    };
    lora::fuse(&fusion).unwrap();
    let info = read_info(&fusion.output.join("transformer/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(info["fewstep.task"], "direct_distill");
    assert!(info["fewstep.fused"].contains(&hash) && !info.contains_key(lora::BASE_HASH), "{info:?}");

    // An adapter of one base does not go into another.
    fusion.model = fusion.output.clone();
    fusion.output = small.folder.path().join("twice");
    let other = Model::random(&small.folder.path().into(), 2, &Device::flex()).unwrap();
    fs::remove_dir_all(&fusion.model).unwrap();
    other
        .save_pretrained(&small.folder.path().into(), &fusion.model, WeightType::F32, &BTreeMap::new())
        .unwrap();
    let error = lora::fuse(&fusion).unwrap_err();
    assert!(matches!(error, ModelError::OtherBase { .. }), "{error}");
    assert!(!fusion.output.exists());
}
