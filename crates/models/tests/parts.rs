//! Parts that families share against numbers of transformers and diffusers (goldens/sd15, sdxl, flux).

use burn::tensor::{Device, Tensor};
use fewstep_models::{AutoencoderKl, ClipStates, ClipTextEncoder, ClipTokenizer, ModelSource, WeightType};
use fewstep_testkit::{Golden, assert_tensors_close, copy_folder, golden, values};
use serde_json::Value;

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;

const FAMILIES: [&str; 3] = ["sd15", "sdxl", "flux"];

fn source(family: &str) -> ModelSource {
    ModelSource::from(&golden(&format!("{family}/model")))
}

fn numbers(family: &str) -> Golden {
    Golden::open(golden(&format!("{family}/goldens.safetensors")))
}

/// The prompts of a family and what the peers' tokenizers make of them.
fn tokens(family: &str) -> Vec<Value> {
    let text =
        std::fs::read_to_string(golden(&format!("{family}/goldens.json"))).expect("the golden is there");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    json["tokens"].as_array().expect("a list").clone()
}

fn ids(row: &Value) -> Vec<u32> {
    row.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn tokenizer(family: &str, folder: &str) -> ClipTokenizer {
    ClipTokenizer::read(golden(&format!("{family}/model/{folder}"))).expect("the golden tokenizer loads")
}

fn states(family: &str, component: &'static str, ids: &[Vec<u32>]) -> ClipStates {
    let encoder =
        ClipTextEncoder::from_pretrained(&source(family), component, WeightType::F32, &Device::flex());
    encoder.expect("the golden text encoder loads").forward(ids)
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn clip_tokens_equal_the_peers_and_are_padded_as_each_tokenizer_says() {
    for (family, folder, key) in [
        ("sd15", "tokenizer", "clip"),
        ("flux", "tokenizer", "clip"),
        ("sdxl", "tokenizer", "clip"),
        // Its padding is the token "!", which is then no part of words.
        ("sdxl", "tokenizer_2", "clip2"),
    ] {
        let tokenizer = tokenizer(family, folder);
        for row in tokens(family) {
            let prompt = row["prompt"].as_str().expect("text").to_owned();
            let found = tokenizer.encode(std::slice::from_ref(&prompt)).expect("it can be tokenised");
            assert_eq!(found, [ids(&row[key])], "{family} {folder}: {prompt}");
        }
    }
}

/// What transformers 5 writes of a tokenizer in the place of `vocab.json` and `merges.txt`.
fn whole_tokenizer(folder: &std::path::Path) -> Value {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect("read");
    let vocabulary: Value = serde_json::from_str(&read("vocab.json")).expect("JSON");
    let merges = read("merges.txt");
    let merges: Vec<&str> = merges.lines().filter(|line| !line.starts_with("#version")).collect();
    let token = |content: &str, normalized: bool| {
        serde_json::json!({
            "id": vocabulary[content], "content": content, "normalized": normalized, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    };
    let words =
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [token("<|startoftext|>", true), token("<|endoftext|>", false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": {
            "type": "RobertaProcessing", "trim_offsets": false, "add_prefix_space": false,
            "sep": ["<|endoftext|>", vocabulary["<|endoftext|>"]],
            "cls": ["<|startoftext|>", vocabulary["<|startoftext|>"]],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges,
        },
    })
}

#[test]
fn clip_tokens_of_a_tokenizer_in_one_file_are_the_same() {
    let temporary = tempfile::tempdir().expect("a temporary folder");
    let folder = temporary.path();
    copy_folder(&golden("sd15/model/tokenizer"), folder, &|_| true);
    std::fs::write(folder.join("tokenizer.json"), whole_tokenizer(folder).to_string()).expect("written");
    for name in ["vocab.json", "merges.txt"] {
        std::fs::remove_file(folder.join(name)).expect("removed");
    }
    let tokenizer = ClipTokenizer::read(folder.to_owned()).expect("one file is enough");
    for row in tokens("sd15") {
        let prompt = row["prompt"].as_str().expect("text").to_owned();
        let found = tokenizer.encode(std::slice::from_ref(&prompt)).expect("it can be tokenised");
        assert_eq!(found, [ids(&row["clip"])], "{prompt}");
    }
    std::fs::remove_file(folder.join("tokenizer.json")).expect("removed");
    let error = ClipTokenizer::read(folder.to_owned()).expect_err("nothing is left").to_string();
    assert!(error.contains("vocab.json is missing"), "{error}");
}

#[test]
fn clip_tokens_are_counted_without_marks_and_cut_before_the_end() {
    let tokenizer = tokenizer("sd15", "tokenizer");
    let long = ["cat"; 100].join(" ");
    let count = tokenizer.count(&long).expect("counted");
    assert!(count >= 100 && tokenizer.limit() == 75, "{count}");
    let rows = tokenizer.encode(&[long, String::new()]).expect("tokenised");
    let (start, end) = (921, 922);
    assert_eq!((rows[0].len(), rows[0][0], rows[0][76]), (77, start, end));
    assert!(!rows[0][1..76].contains(&end));
    assert_eq!((rows[1][0], &rows[1][1..]), (start, &[end; 76][..]));
    assert_eq!(tokenizer.count("<|endoftext|> A").expect("counted"), 2, "a mark is one token, in any case");
}

#[test]
fn clip_states_after_the_final_norm_equal_the_peers() {
    for (family, key) in [("sd15", "hidden"), ("flux", "clip_last_hidden")] {
        let golden = numbers(family);
        for (index, row) in tokens(family).iter().enumerate() {
            let found = states(family, "text_encoder", &[ids(&row["clip"])]).last;
            assert_tensors_close(
                found,
                golden.tensor(&format!("p{index}.{key}"), &Device::flex()),
                TOLERANCE,
            );
        }
    }
}

#[test]
fn clip_pools_the_state_at_the_end_of_the_text() {
    let golden = numbers("flux");
    let rows: Vec<Vec<u32>> = tokens("flux").iter().map(|row| ids(&row["clip"])).collect();
    let pooled = states("flux", "text_encoder", &rows).pooled;
    let expected =
        (0..rows.len()).map(|index| golden.tensor::<2>(&format!("p{index}.pooled"), &Device::flex()));
    assert_tensors_close(pooled, Tensor::cat(expected.collect(), 0), TOLERANCE);
}

#[test]
fn both_text_encoders_of_sdxl_equal_the_peers() {
    let golden = numbers("sdxl");
    for (index, row) in tokens("sdxl").iter().enumerate() {
        let small = states("sdxl", "text_encoder", &[ids(&row["clip"])]);
        let large = states("sdxl", "text_encoder_2", &[ids(&row["clip2"])]);
        let both = Tensor::cat(vec![small.penultimate(), large.penultimate()], 2);
        // The penultimate states are not normalised.
        assert_relatively_close(both, golden.tensor(&format!("p{index}.hidden"), &Device::flex()));
        assert_relatively_close(large.pooled, golden.tensor(&format!("p{index}.pooled"), &Device::flex()));
    }
}

#[test]
fn the_kl_autoencoder_equals_the_peer_with_4_and_16_channels() {
    let device = Device::flex();
    for family in FAMILIES {
        let (golden, vae) = (numbers(family), autoencoder(family));
        let sizes =
            ["64x64", "96x64"].into_iter().filter(|size| golden.keys().contains(&format!("vae.{size}.z")));
        for size in sizes {
            let of = |part: &str| golden.tensor::<4>(&format!("vae.{size}.{part}"), &device);
            let posterior = vae.posterior(of("pixels"));
            assert_relatively_close(posterior.mean, of("mean"));
            assert_relatively_close(posterior.logvar, of("logvar"));
            assert_tensors_close(vae.decode(vae.latents(of("z"))), of("decoded"), TOLERANCE);
        }
    }
}

#[test]
fn every_layer_of_the_kl_autoencoder_equals_the_peers() {
    let device = Device::flex();
    for family in FAMILIES {
        let (golden, vae) = (numbers(family), autoencoder(family));
        let mut states = vae.encode_states(golden.tensor("vae.layers.pixels", &device));
        states.extend(vae.decode_states(golden.tensor("vae.layers.z", &device)));
        let mut compared = 0;
        // Attention within a middle block was recorded for the encoder only.
        for (name, found) in states.into_iter().filter(|(name, _)| name != "dec.mid.attn") {
            // Residual streams grow above unit scale.
            assert_relatively_close(found, golden.tensor(&format!("vae.layers.{name}"), &device));
            compared += 1;
        }
        let recorded = golden.keys().iter().filter(|key| key.starts_with("vae.layers.")).count();
        // All but the two inputs and the two final outputs, which the whole passes cover.
        assert_eq!(compared, recorded - 4);
    }
}

#[test]
fn latents_are_scaled_and_shifted_as_the_config_says() {
    let device = Device::flex();
    for (family, scale, shift) in [("sd15", 0.18215, 0.0), ("sdxl", 0.13025, 0.0), ("flux", 0.3611, 0.1159)] {
        let (golden, vae) = (numbers(family), autoencoder(family));
        let mean: Tensor<4> = golden.tensor("vae.64x64.mean", &device);
        let latents = vae.encode(golden.tensor("vae.64x64.pixels", &device));
        assert_relatively_close(latents, (mean - shift) * scale);
    }
}

#[test]
fn a_sample_of_the_posterior_moves_with_its_deviation() {
    let device = Device::flex();
    let (golden, vae) = (numbers("sd15"), autoencoder("sd15"));
    let posterior = vae.posterior(golden.tensor("vae.64x64.pixels", &device));
    let ones = Tensor::<4>::ones(posterior.mean.dims(), &device);
    let moved = posterior.clone().sample(ones) - posterior.mean;
    let deviation = posterior.logvar.exp().sqrt();
    assert_relatively_close(moved, deviation);
}

#[test]
fn new_names_of_the_attention_are_read_as_the_old_ones() {
    // The golden of sd15 has the old names, as the published file; that of sdxl has the new ones.
    let device = Device::flex();
    let keys = |family: &str| {
        Golden::open(golden(&format!("{family}/model/vae/diffusion_pytorch_model.safetensors"))).keys()
    };
    let old = |family| keys(family).iter().any(|key| key.contains("attentions.0.query."));
    assert_eq!((old("sd15"), old("sdxl"), old("flux")), (true, false, false));
    for family in FAMILIES {
        assert!(AutoencoderKl::from_pretrained(&source(family), &device).is_ok(), "{family}");
    }
}

#[test]
fn configs_that_cannot_work_say_why() {
    let refusal = |component: &'static str, name: &str, value: Value| {
        let folder = tempfile::tempdir().expect("temporary folder");
        copy_folder(&golden("sdxl/model"), folder.path(), &|_| true);
        let path = folder.path().join(component).join("config.json");
        let mut json: Value =
            serde_json::from_str(&std::fs::read_to_string(&path).expect("read")).expect("JSON");
        json[name] = value;
        std::fs::write(&path, json.to_string()).expect("write");
        let (source, device) = (ModelSource::from(folder.path()), Device::flex());
        let error = match component {
            "vae" => AutoencoderKl::from_pretrained(&source, &device).map(|_| ()),
            _ => ClipTextEncoder::from_pretrained(&source, component, WeightType::F32, &device).map(|_| ()),
        };
        error.expect_err("must not load").to_string()
    };
    let groups = refusal("vae", "norm_num_groups", 3.into());
    assert!(
        groups.contains("one of block_out_channels is 8, expected a multiple of norm_num_groups, 3"),
        "{groups}"
    );
    let blocks = refusal("vae", "up_block_types", vec!["AttnUpDecoderBlock2D"; 4].into());
    assert!(blocks.contains("expected 4 of UpDecoderBlock2D"), "{blocks}");
    let wider = refusal("vae", "latent_channels", 8.into());
    assert!(
        wider.contains("decoder.conv_in.weight has shape [16, 4, 3, 3], expected [16, 8, 3, 3]"),
        "{wider}"
    );
    let heads = refusal("text_encoder", "num_attention_heads", 5.into());
    assert!(heads.contains("hidden_size is 32, expected a multiple of num_attention_heads, 5"), "{heads}");
    let activation = refusal("text_encoder_2", "hidden_act", "relu".into());
    assert!(activation.contains("unknown variant `relu`"), "{activation}");
    let class = refusal("text_encoder", "architectures", vec!["T5EncoderModel"].into());
    assert!(class.contains("text_encoder of class T5EncoderModel"), "{class}");
}

fn autoencoder(family: &str) -> AutoencoderKl {
    AutoencoderKl::from_pretrained(&source(family), &Device::flex()).expect("the golden VAE loads")
}
