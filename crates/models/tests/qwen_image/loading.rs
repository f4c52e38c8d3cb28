//! Folders that load and folders that are refused: every layout on disk, and what is said about bad ones.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use fewstep_models::qwen_image::{PromptTokenizer, TextEncoder};
use fewstep_models::{LoadOptions, Model, ModelError, WeightFiles, WeightType, save_tensors};
use fewstep_testkit::{Golden, assert_tensors_close, golden, values};

use crate::{edit_json, folder, model_copy, source};

fn load(folder: &Path) -> Result<Model, ModelError> {
    Model::from_pretrained(&folder.into(), &LoadOptions::default())
}

fn refusal(folder: &Path) -> String {
    load(folder).expect_err("must not load").to_string()
}

/// Text states of two prompts, and latents of a picture: all of a model but its transformer.
fn outputs(model: &Model) -> [Vec<f32>; 3] {
    let condition = model.encode_prompts(&["a cat".into(), "一只猫".into()]).expect("tokenises");
    let pixels: Tensor<4> =
        Golden::open(golden("qwen_image/vae.safetensors")).tensor("layers.pixels", &Device::flex());
    let latents = model.encode_images(pixels, 1);
    let pixels = model.decode_latents(latents.clone(), 1);
    [values(condition.text), values(latents), values(pixels)]
}

/// Rewrites the weight files of a component as one file, with other keys or another type.
fn rewrite(folder: &Path, dtype: WeightType, rename: impl Fn(&str) -> String) {
    let files = WeightFiles::open(folder).expect("weights are there");
    let tensors: Vec<_> = files
        .keys()
        .map(|key| {
            let (shape, values) = files.read(key).expect("reads");
            (rename(key), shape, values)
        })
        .collect();
    for entry in std::fs::read_dir(folder).expect("folder") {
        let path = entry.expect("entry").path();
        if path.to_string_lossy().contains(".safetensors") {
            std::fs::remove_file(path).expect("remove");
        }
    }
    save_tensors(&folder.join("model.safetensors"), tensors, dtype, &BTreeMap::new()).expect("writes");
}

fn keys(folder: &Path) -> Vec<String> {
    WeightFiles::open(folder).expect("weights are there").keys().map(str::to_owned).collect()
}

#[test]
fn a_saved_folder_loads_to_the_same_model_and_keeps_what_only_the_peers_read() {
    let target = tempfile::tempdir().expect("temporary folder");
    let model = load(&folder()).expect("the golden model loads");
    model.save_pretrained(&source(), target.path(), WeightType::F32, &BTreeMap::new()).expect("saves");
    assert_eq!(outputs(&load(target.path()).expect("loads again")), outputs(&model));
    for component in ["text_encoder", "transformer", "vae"] {
        assert_eq!(keys(&target.path().join(component)), keys(&folder().join(component)), "{component}");
    }
    let bytes =
        |folder: &Path| std::fs::read(folder.join("vae/diffusion_pytorch_model.safetensors")).expect("VAE");
    assert!(bytes(target.path()) == bytes(&folder()), "the VAE is copied");
}

#[test]
fn sixteen_bit_weights_load_as_the_numbers_they_hold() {
    let exact = outputs(&load(&folder()).expect("the golden model loads"));
    for (dtype, rounding) in [(WeightType::F16, 5e-2), (WeightType::BF16, 4e-1)] {
        let (half, widened) = (model_copy(), model_copy());
        for component in ["text_encoder", "transformer", "vae"] {
            rewrite(&half.path().join(component), dtype, str::to_owned);
            rewrite(&widened.path().join(component), dtype, str::to_owned);
            rewrite(&widened.path().join(component), WeightType::F32, str::to_owned);
        }
        let found = outputs(&load(half.path()).expect("16-bit weights load"));
        assert_eq!(found, outputs(&load(widened.path()).expect("32-bit weights load")));
        // Rounded weights change the outputs, but by no more than three layers of their rounding.
        for (found, exact) in found.iter().zip(&exact) {
            assert_ne!(found, exact);
            let distance = found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            assert!(distance < rounding, "{dtype:?} is off by {distance}");
        }
    }
}

#[test]
fn both_spellings_of_the_text_encoders_keys_load() {
    let copy = model_copy();
    let nested = |key: &str| match key.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None if key.starts_with("visual.") => format!("model.{key}"),
        None => key.to_owned(),
    };
    rewrite(&copy.path().join("text_encoder"), WeightType::F32, nested);
    let model = load(copy.path()).expect("the newer spelling loads");
    assert_eq!(outputs(&model), outputs(&load(&folder()).expect("the golden model loads")));
    let target = tempfile::tempdir().expect("temporary folder");
    model
        .save_pretrained(&copy.path().into(), target.path(), WeightType::F32, &BTreeMap::new())
        .expect("saves");
    assert_eq!(keys(&target.path().join("text_encoder")), keys(&folder().join("text_encoder")));
}

#[test]
fn flat_and_nested_text_configs_are_the_same() {
    let expected = outputs(&load(&folder()).expect("the golden model loads"));
    let edits: [fn(&mut serde_json::Value); 3] = [
        |config| {
            config.as_object_mut().expect("object").remove("text_config");
        },
        |config| {
            let mut text = config["text_config"].take();
            let mut rope = text["rope_scaling"].take();
            rope["rope_theta"] = text["rope_theta"].take();
            text["rope_parameters"] = rope;
            *config = serde_json::json!({
                "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
                "text_config": text,
            });
        },
        |config| {
            // What is on top loses.
            config["hidden_size"] = 1.into();
            config["rope_theta"] = 1.0.into();
            config["rope_scaling"]["rope_theta"] = 1.0.into();
        },
    ];
    for edit in edits {
        let copy = model_copy();
        edit_json(&copy.path().join("text_encoder/config.json"), edit);
        assert_eq!(outputs(&load(copy.path()).expect("loads")), expected);
    }
}

#[test]
fn the_base_of_the_rotary_frequencies_counts() {
    let copy = model_copy();
    edit_json(&copy.path().join("text_encoder/config.json"), |config| {
        config["text_config"]["rope_theta"] = 10_000.0.into();
        config["text_config"]["rope_scaling"]["rope_theta"] = 10_000.0.into();
    });
    let [other, ..] = outputs(&load(copy.path()).expect("loads"));
    let [text, ..] = outputs(&load(&folder()).expect("the golden model loads"));
    assert_ne!(other, text);
}

#[test]
fn a_text_config_that_cannot_work_says_why() {
    let refused = |edit: fn(&mut serde_json::Value)| {
        let copy = model_copy();
        edit_json(&copy.path().join("text_encoder/config.json"), |config| edit(&mut config["text_config"]));
        let error = TextEncoder::from_pretrained(&copy.path().into(), &Device::flex());
        error.expect_err("must not load").to_string()
    };
    let sections = refused(|text| text["rope_scaling"]["mrope_section"] = vec![2, 3, 4].into());
    assert!(sections.contains("[2, 3, 4], expected to add up to half of the head dim, 8"), "{sections}");
    let kind = refused(|text| text["rope_scaling"]["rope_type"] = "yarn".into());
    assert!(kind.contains("type yarn, expected default or mrope"), "{kind}");
    let window = refused(|text| text["use_sliding_window"] = true.into());
    assert!(window.contains("use_sliding_window is true, expected false"), "{window}");
    let activation = refused(|text| text["hidden_act"] = "gelu".into());
    assert!(activation.contains("hidden_act is gelu, expected silu"), "{activation}");
}

#[test]
fn a_missing_file_is_named() {
    for file in [
        "model_index.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ] {
        let copy = model_copy();
        std::fs::remove_file(copy.path().join(file)).expect("remove");
        let error = refusal(copy.path());
        let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
        assert!(error.contains(folder) && error.contains(&format!("{name} is missing")), "{error}");
    }
    for (component, file) in
        [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model-00002-of-00002.safetensors")]
    {
        let copy = model_copy();
        std::fs::remove_file(copy.path().join(component).join(file)).expect("remove");
        let error = refusal(copy.path());
        assert!(error.contains(component) && error.contains(".safetensors"), "{error}");
    }
}

#[test]
fn a_config_of_another_class_is_refused_with_both_names() {
    let refused = |file: &str, edit: fn(&mut serde_json::Value)| {
        let copy = model_copy();
        edit_json(&copy.path().join(file), edit);
        refusal(copy.path())
    };
    let pipeline = refused("model_index.json", |json| json["_class_name"] = "KandinskyPipeline".into());
    assert!(
        pipeline.contains("class KandinskyPipeline, expected one of FluxPipeline, QwenImagePipeline"),
        "{pipeline}"
    );
    let transformer =
        refused("transformer/config.json", |json| json["_class_name"] = "FluxTransformer2DModel".into());
    assert!(
        transformer.contains("class FluxTransformer2DModel, expected one of QwenImageTransformer2DModel"),
        "{transformer}"
    );
    let text = refused("text_encoder/config.json", |json| json["architectures"][0] = "T5EncoderModel".into());
    assert!(
        text.contains("class T5EncoderModel, expected one of Qwen2_5_VLForConditionalGeneration"),
        "{text}"
    );
}

#[test]
fn components_of_different_models_are_refused() {
    let refused = |file: &str, edit: fn(&mut serde_json::Value)| {
        let copy = model_copy();
        edit_json(&copy.path().join(file), edit);
        refusal(copy.path())
    };
    let width = refused("transformer/config.json", |json| json["joint_attention_dim"] = 80.into());
    assert!(width.contains("joint_attention_dim is 80, expected the text encoder's width, 64"), "{width}");
    let channels = refused("transformer/config.json", |json| {
        json["in_channels"] = 48.into();
        json["out_channels"] = 12.into();
    });
    assert!(channels.contains("out_channels is 12, expected the VAE's latent channels, 16"), "{channels}");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let refused = |edit: fn(&mut serde_json::Value)| {
        let copy = model_copy();
        edit_json(&copy.path().join("tokenizer/tokenizer_config.json"), |config| {
            edit(&mut config["added_tokens_decoder"])
        });
        refusal(copy.path())
    };
    let missing = refused(|added| {
        added.as_object_mut().expect("object").retain(|_, token| token["content"] != "<|im_start|>");
    });
    assert!(missing.contains("<|im_start|>"), "{missing}");
    let none = refused(|added| *added = serde_json::json!({}));
    assert!(none.contains("no special token <|im_start|> in tokenizer_config.json"), "{none}");
    let many = refused(|added| {
        let first = added.as_object().expect("object").keys().filter_map(|id| id.parse::<u32>().ok()).max();
        for id in first.expect("tokens") + 1..900 {
            added[id.to_string()] = serde_json::json!({ "content": format!("<|{id}|>"), "special": true });
        }
    });
    assert!(many.contains("the largest id is 899, but the text encoder has 832 embeddings"), "{many}");
}

/// Token ids of two prompts with a folder's tokenizer.
fn ids(folder: &Path) -> Vec<Vec<u32>> {
    let tokenizer = PromptTokenizer::read(&folder.into(), 1024).expect("the tokenizer loads");
    tokenizer.encode(&["café <|im_end|> 12".into(), "一只猫 😀".into()]).expect("tokenises").ids
}

/// What transformers 5 writes: one file, here without the text that the published files say the same of.
fn whole_tokenizer(folder: &Path) -> serde_json::Value {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("read");
    let json = |name: &str| serde_json::from_str::<serde_json::Value>(&read(name)).expect("JSON");
    let config = json("tokenizer_config.json");
    let added = config["added_tokens_decoder"].as_object().expect("an object").iter();
    let added: Vec<serde_json::Value> = added
        .map(|(id, token)| {
            let mut token = token.clone();
            token["id"] = id.parse::<u32>().expect("an id").into();
            token
        })
        .collect();
    let merges = read("merges.txt");
    let merges: Vec<&str> = merges.lines().filter(|line| !line.starts_with("#version")).collect();
    let words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    serde_json::json!({
        "version": "1.0",
        // Prompts are not cut by the file's limit.
        "truncation": {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": json("vocab.json"), "merges": merges},
    })
}

#[test]
fn a_tokenizer_in_one_file_gives_the_same_ids() {
    let copy = model_copy();
    let tokenizer = copy.path().join("tokenizer");
    let whole = whole_tokenizer(&tokenizer);
    for entry in std::fs::read_dir(&tokenizer).expect("folder") {
        std::fs::remove_file(entry.expect("entry").path()).expect("remove");
    }
    std::fs::write(tokenizer.join("tokenizer.json"), whole.to_string()).expect("write");
    assert_eq!(ids(copy.path()), ids(&folder()));
    edit_json(&tokenizer.join("tokenizer.json"), |json| json["added_tokens"] = serde_json::json!([]));
    let error = refusal(copy.path());
    assert!(error.contains("no special token <|im_start|> in tokenizer.json"), "{error}");
}

#[test]
fn special_tokens_in_a_file_of_their_own_give_the_same_ids() {
    let copy = model_copy();
    edit_json(&copy.path().join("tokenizer/tokenizer_config.json"), |config| {
        config.as_object_mut().expect("object").remove("added_tokens_decoder").expect("was there");
    });
    assert_eq!(ids(copy.path()), ids(&folder()));
}

#[test]
fn configs_may_leave_out_what_equals_the_published_classes_defaults() {
    let expected = outputs(&load(&folder()).expect("the golden model loads"));
    let copy = model_copy();
    let remove = |file: &str, keys: &[&str]| {
        edit_json(&copy.path().join(file), |config| {
            for key in keys {
                config.as_object_mut().expect("object").remove(*key).expect("was there");
            }
        });
    };
    remove("transformer/config.json", &["patch_size", "in_channels", "out_channels"]);
    let vae = ["z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample"];
    remove("vae/config.json", &[&vae[..], &["latents_mean", "latents_std"]].concat());
    assert_eq!(outputs(&load(copy.path()).expect("loads")), expected);
    remove("transformer/config.json", &["num_layers"]);
    let error = refusal(copy.path());
    assert!(error.contains("1824 missing"), "57 blocks of 32 tensors: {error}");
}

#[test]
fn missing_and_unknown_keys_are_listed() {
    let copy = model_copy();
    rewrite(&copy.path().join("vae"), WeightType::F32, |key| key.replace("quant_conv.bias", "quant.bias"));
    let error = load(copy.path()).expect_err("must not load");
    let ModelError::Keys { missing, unknown, .. } = &error else { panic!("{error}") };
    assert_eq!(missing, &["post_quant_conv.bias", "quant_conv.bias"]);
    assert_eq!(unknown, &["post_quant.bias", "quant.bias"]);
}

#[test]
fn the_part_of_the_files_that_one_frame_needs_is_kept() {
    // Filling the unused frames of a kernel and the convolutions over time with other numbers changes nothing.
    let copy = model_copy();
    let component = copy.path().join("vae");
    let files = WeightFiles::open(&component).expect("weights are there");
    let scrambled: Vec<_> = files
        .keys()
        .map(|key| {
            let (shape, mut values) = files.read(key).expect("reads");
            if shape.len() == 5 {
                let frame = shape[3] * shape[4];
                for kernel in values.chunks_exact_mut(shape[2] * frame) {
                    kernel[..(shape[2] - 1) * frame].fill(7.0);
                }
            }
            if key.contains("time_conv") {
                values.fill(3.0);
            }
            (key.to_owned(), shape, values)
        })
        .collect();
    let file = component.join("diffusion_pytorch_model.safetensors");
    save_tensors(&file, scrambled, WeightType::F32, &BTreeMap::new()).expect("writes");
    let pixels: Tensor<4> =
        Golden::open(golden("qwen_image/vae.safetensors")).tensor("64x96.pixels", &Device::flex());
    let encode = |folder: &Path| load(folder).expect("loads").encode_images(pixels.clone(), 1);
    assert_tensors_close(encode(copy.path()), encode(&folder()), 0.0);
}
