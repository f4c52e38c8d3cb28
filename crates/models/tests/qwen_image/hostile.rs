//! Configs and tokenizers that nobody wrote in good faith: an error that names the file and the key, and no memory.

use std::fs;

use fewstep_models::qwen_image::PromptTokenizer;
use fewstep_models::{LoadOptions, Model, expected_tensors};
use serde_json::{Value, json};

use crate::{MAX_TOKENS, edit_json, model_copy};

/// Sets one key of one config and tries to load the model.
fn refusal(file: &str, pointer: &str, value: &Value) -> String {
    let copy = model_copy();
    edit_json(&copy.path().join(file), |config| {
        *config.pointer_mut(pointer).unwrap_or_else(|| panic!("{file} has {pointer}")) = value.clone();
    });
    let source = copy.path().into();
    let error = Model::from_pretrained(&source, &LoadOptions::default()).err();
    let error = error.unwrap_or_else(|| panic!("{file}: {pointer} = {value} was accepted")).to_string();
    // What only reads the configs must say the same and not build a model.
    if !file.starts_with("scheduler") {
        assert_eq!(expected_tensors(&source).expect_err("refused by its config alone").to_string(), error);
    }
    error
}

#[test]
fn sizes_of_zero_and_beyond_all_bounds_are_refused_in_every_config() {
    let keys = [
        ("transformer/config.json", "/num_layers"),
        ("transformer/config.json", "/num_attention_heads"),
        ("transformer/config.json", "/attention_head_dim"),
        ("transformer/config.json", "/joint_attention_dim"),
        ("transformer/config.json", "/in_channels"),
        ("transformer/config.json", "/out_channels"),
        ("transformer/config.json", "/patch_size"),
        ("transformer/config.json", "/axes_dims_rope/0"),
        ("text_encoder/config.json", "/text_config/vocab_size"),
        ("text_encoder/config.json", "/text_config/hidden_size"),
        ("text_encoder/config.json", "/text_config/intermediate_size"),
        ("text_encoder/config.json", "/text_config/num_hidden_layers"),
        ("text_encoder/config.json", "/text_config/num_attention_heads"),
        ("text_encoder/config.json", "/text_config/num_key_value_heads"),
        ("vae/config.json", "/base_dim"),
        ("vae/config.json", "/z_dim"),
        ("vae/config.json", "/num_res_blocks"),
        ("vae/config.json", "/dim_mult/1"),
    ];
    let sizes = [
        json!(0),
        json!(-1),
        json!(usize::MAX),
        json!(u32::MAX),
        json!(1e30),
        json!("8"),
        json!(null),
        json!([]),
    ];
    for (file, pointer) in keys {
        // In a text config null means that the entry is elsewhere.
        for size in sizes.iter().filter(|size| !(size.is_null() && file.starts_with("text_encoder"))) {
            let error = refusal(file, pointer, size);
            assert!(error.contains(file), "{pointer} = {size}: {error}");
        }
    }
}

#[test]
fn heads_and_numbers_that_cannot_be_computed_with_are_named() {
    let cases = [
        ("text_encoder/config.json", "/text_config/num_attention_heads", json!(3), "num_attention_heads 3"),
        ("text_encoder/config.json", "/text_config/rms_norm_eps", json!(-1e-6), "rms_norm_eps is -0.000001"),
        ("text_encoder/config.json", "/text_config/rms_norm_eps", json!(1e300), "rms_norm_eps is inf"),
        ("text_encoder/config.json", "/text_config/rope_scaling/rope_theta", json!(0), "rope_theta is 0"),
        ("transformer/config.json", "/axes_dims_rope/0", json!(3), "expected even numbers that add up"),
        ("vae/config.json", "/latents_std/0", json!(0), "one of latents_std is 0"),
        ("vae/config.json", "/latents_mean/0", json!(1e300), "one of latents_mean is inf"),
        ("vae/config.json", "/dim_mult", json!([1, 1, 1, 1, 1, 1, 1, 1, 1]), "the number of dim_mult is 9"),
        ("scheduler/scheduler_config.json", "/shift_terminal", json!(1), "shift_terminal: found 1"),
        ("scheduler/scheduler_config.json", "/num_train_timesteps", json!(0), "num_train_timesteps: found 0"),
        (
            "scheduler/scheduler_config.json",
            "/base_image_seq_len",
            json!(u64::MAX),
            "more than base_image_seq_len",
        ),
    ];
    for (file, pointer, value, expected) in cases {
        let error = refusal(file, pointer, &value);
        assert!(error.contains(expected), "{pointer} = {value}: {error}");
    }
}

#[test]
fn a_template_that_drops_more_than_there_is_is_refused() {
    let read = |template: Value| {
        let copy = model_copy();
        edit_json(&copy.path().join("model_index.json"), |index| index["prompt_template"] = template);
        let tokenizer = PromptTokenizer::read(&copy.path().into(), MAX_TOKENS);
        tokenizer.and_then(|tokenizer| tokenizer.encode(&["a cat".into()])).expect_err("refused").to_string()
    };
    let huge = read(json!({"text": "{}", "drop_tokens": usize::MAX}));
    assert!(huge.contains("model_index.json: prompt_template: drop_tokens 18446744073709551615"), "{huge}");
    let none = read(json!({"text": "{}", "drop_tokens": 0, "max_tokens": 0}));
    assert!(none.contains("max_tokens 0, expected"), "{none}");
    let all = read(json!({"text": "{}", "drop_tokens": 50}));
    assert!(all.contains("tokens, of which prompt_template.drop_tokens drops 50"), "{all}");
    let unused = read(json!({"text": "no place", "drop_tokens": 1}));
    assert!(unused.contains("expected exactly one {}"), "{unused}");
}

#[test]
fn a_tokenizer_of_garbage_is_an_error_with_its_folder() {
    let tokens: serde_json::Map<String, Value> = (0..300).map(|at| (format!("t{at}"), at.into())).collect();
    let no_bytes = Value::Object(tokens).to_string();
    let deep = "[".repeat(100_000);
    let garbage = "\u{0}\u{1}{{{";
    let cases = [
        ("vocab.json", garbage),
        ("vocab.json", deep.as_str()),
        ("vocab.json", "{}"),
        ("vocab.json", r#"{"a": -1}"#),
        ("vocab.json", r#"{"a": 99999999999}"#),
        ("vocab.json", no_bytes.as_str()),
        ("merges.txt", "one two three\nfour"),
        ("merges.txt", "nowhere tofind"),
        ("tokenizer_config.json", garbage),
        ("tokenizer_config.json", deep.as_str()),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "a", "special": true}}}"#),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"4294967295": {"content": "a", "special": true}}}"#,
        ),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {}}"#),
    ];
    for (file, text) in cases {
        let copy = model_copy();
        fs::write(copy.path().join("tokenizer").join(file), text).expect("write");
        let error = PromptTokenizer::read(&copy.path().into(), MAX_TOKENS).expect_err(file).to_string();
        assert!(error.contains("tokenizer") && error.len() < 2000, "{file}: {error}");
    }
}

#[test]
fn prompts_of_any_kind_are_tokenised() {
    let copy = model_copy();
    let tokenizer = PromptTokenizer::read(&copy.path().into(), MAX_TOKENS).expect("reads");
    let spaces = " ".repeat(200_000) + "a";
    let prompts = ["", "\0", "\u{feff}\u{202e}", "<|im_end|><|im_start|>{}", "a\u{300}\u{300}", &spaces];
    for prompt in prompts {
        let tokens = tokenizer.encode(&[prompt.to_owned()]).expect("tokenises");
        assert!(tokens.ids[0].len() > tokens.drop_tokens, "{:?}", &prompt[..prompt.len().min(9)]);
    }
    let found = tokenizer.length(&spaces).expect("tokenises").found;
    assert!(found > 1000, "{found} tokens of 200,001 characters: some were left out");
}

#[test]
fn json_nested_without_end_is_refused_in_every_config() {
    let files = [
        "model_index.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ];
    for file in files {
        for text in ["[".repeat(1_000_000), "{\"a\":".repeat(1_000_000)] {
            let copy = model_copy();
            fs::write(copy.path().join(file), text).expect("write");
            let error = Model::from_pretrained(&copy.path().into(), &LoadOptions::default()).expect_err(file);
            assert!(error.to_string().contains("recursion limit exceeded"), "{file}: {error}");
        }
    }
}
