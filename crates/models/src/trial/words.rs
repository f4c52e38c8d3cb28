//! Tokenizers whose words are single characters.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Tokens of [`Words::Clip`]: each byte within a word and at its end, start and end of the text.
pub(super) const CLIP_SIZE: usize = 2 * 256 + 2;

/// The kinds of tokenizers that text encoders come with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// CLIP's.
    Clip,
    /// Qwen2's, with the marks of its chat template.
    Qwen,
    /// T5's.
    T5,
}

/// The marks of Qwen2's chat template.
const MARKS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

impl Words {
    /// Tokens.
    pub(crate) fn count(self) -> usize {
        match self {
            Self::Clip => CLIP_SIZE,
            Self::Qwen => 256 + MARKS.len(),
            Self::T5 => 4 + letters().len(),
        }
    }

    /// The files of its folder.
    pub(super) fn files(self) -> Vec<(&'static str, String)> {
        match self {
            Self::Clip => {
                let within = bytes().into_iter();
                let at_end = bytes().into_iter().map(|byte| format!("{byte}</w>"));
                let ends = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
                pairs_of_bytes(within.chain(at_end).chain(ends), json!({}))
            }
            Self::Qwen => {
                let marks = (256..)
                    .zip(MARKS)
                    .map(|(id, mark)| (id.to_string(), json!({ "content": mark, "special": true })));
                let marks: serde_json::Map<String, Value> = marks.collect();
                pairs_of_bytes(bytes().into_iter(), json!({ "added_tokens_decoder": marks }))
            }
            Self::T5 => vec![("tokenizer.json", unigram().to_string())],
        }
    }
}

/// The characters that stand for bytes, in a fixed order.
fn bytes() -> Vec<String> {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    bytes.into_iter().map(String::from).collect()
}

/// The files of a byte-pair encoding that joins no pairs.
fn pairs_of_bytes(tokens: impl Iterator<Item = String>, config: Value) -> Vec<(&'static str, String)> {
    let vocabulary: BTreeMap<String, usize> = tokens.zip(0..).collect();
    vec![
        ("vocab.json", json!(vocabulary).to_string()),
        ("merges.txt", "#version: 0.2\n".into()),
        ("tokenizer_config.json", config.to_string()),
    ]
}

fn letters() -> impl ExactSizeIterator<Item = char> {
    ('a'..='z').collect::<Vec<char>>().into_iter()
}

/// A unigram model of letters in SentencePiece's form.
fn unigram() -> Value {
    let special = ["<pad>", "</s>", "<unk>"];
    let mut vocabulary: Vec<(String, f64)> = special.iter().map(|token| ((*token).to_owned(), 0.0)).collect();
    vocabulary.extend(std::iter::once('▁').chain(letters()).map(|letter| (letter.to_string(), -3.0)));
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true },
        "model": { "type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": false },
    })
}
