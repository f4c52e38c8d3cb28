//! Trains the demo model's tokenizer: Qwen2's kind, files and rules, with a vocabulary just large enough for the captions.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use fewstep_data::atomic;
use fewstep_data::emoji::{EmojiSet, Language, Style};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior, TokenizerBuilder, TokenizerImpl};

/// Qwen2's rule for what may become one token: contractions, a word with the sign before it, single digits, signs, space.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Added after the vocabulary, in this order, as in Qwen2.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// What Qwen-Image puts before a prompt, split where its special tokens stand: `<|im_start|>`, `<|im_end|>`, `<|im_start|>`.
const PREFIX: [&str; 3] = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the \
     objects and background:",
    "\n",
    "user\n",
];

/// What it puts behind a prompt, `<|im_end|>` and `<|im_start|>` left out.
const SUFFIX: [&str; 2] = ["\n", "assistant\n"];

/// The tokens of the prefix, special ones included; Qwen-Image drops as many text states.
const PREFIX_TOKENS: usize = 34;

/// Often enough that every word of the template becomes one token.
const TEMPLATE_COPIES: usize = 5000;

type ByteLevelBpe = TokenizerImpl<BPE, NFC, Sequence, ByteLevel, ByteLevel>;

/// Trains on all captions of a data set, held-out ones too: they hold no word that the others lack, and every caption must
/// be tokenised well. Writes the four files of a Qwen2 tokenizer.
pub(crate) fn build(emoji: &Path, output: &Path, vocabulary: usize) -> Result<()> {
    let set = EmojiSet::open(emoji)?;
    let captions: Vec<String> = set.items().flat_map(|item| [item.caption_en, item.caption_zh]).collect();
    let tokenizer = train(&captions, vocabulary)?;
    check_prefix(&tokenizer)?;
    write(output, tokenizer.get_model())?;
    print_statistics(&tokenizer, &set)
}

fn train(captions: &[String], vocabulary: usize) -> Result<ByteLevelBpe> {
    let template = PREFIX.iter().chain(&SUFFIX).flat_map(|part| std::iter::repeat_n(*part, TEMPLATE_COPIES));
    let texts = captions.iter().map(String::as_str).chain(template);
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocabulary)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut tokenizer = untrained()?;
    tokenizer.train(&mut trainer, texts).map_err(|fault| anyhow!(fault))?;
    Ok(tokenizer)
}

fn untrained() -> Result<ByteLevelBpe> {
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Isolated, false);
    let bytes = ByteLevel::new(false, false, false);
    let words = PreTokenizerWrapper::Split(words.map_err(|fault| anyhow!(fault))?);
    TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(vec![words, PreTokenizerWrapper::ByteLevel(bytes)])))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes))
        .build()
        .map_err(|fault| anyhow!(fault))
}

fn write(output: &Path, model: &BPE) -> Result<()> {
    let vocabulary: BTreeMap<u32, String> =
        model.get_vocab().into_iter().map(|(token, id)| (id, token)).collect();
    let by_id: serde_json::Map<String, Value> =
        vocabulary.iter().map(|(id, token)| (token.clone(), json!(id))).collect();
    write_json(&output.join("vocab.json"), &Value::Object(by_id))?;
    write_text(&output.join("merges.txt"), &merges(model)?)?;
    write_json(&output.join("special_tokens_map.json"), &special_tokens_map())?;
    write_json(&output.join("tokenizer_config.json"), &config(vocabulary.len()))
}

/// The merges in their order, a pair a line. The library shows them only in its JSON.
fn merges(model: &BPE) -> Result<String> {
    let json = serde_json::to_value(model)?;
    let merges = json["merges"].as_array().context("a BPE model has a list of merges")?;
    let mut text = String::from("#version: 0.2\n");
    for merge in merges {
        let pair = merge.as_array().context("a merge is a pair")?;
        let [left, right] = [&pair[0], &pair[1]].map(|token| token.as_str().unwrap_or_default());
        text += &format!("{left} {right}\n");
    }
    Ok(text)
}

fn special_tokens_map() -> Value {
    json!({
        "additional_special_tokens": &SPECIAL[1..],
        "eos_token": special("<|im_end|>"),
        "pad_token": special("<|endoftext|>"),
    })
}

fn config(vocabulary: usize) -> Value {
    let added = SPECIAL.iter().zip(vocabulary..).map(|(token, id)| {
        let mut entry = special(token);
        entry["special"] = json!(true);
        (id.to_string(), entry)
    });
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": added.collect::<serde_json::Map<_, _>>(),
        "additional_special_tokens": &SPECIAL[1..],
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    })
}

fn special(token: &str) -> Value {
    json!({ "content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_text(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    atomic::write(path, text.as_bytes()).with_context(|| path.display().to_string())
}

/// Tokens per caption: what the demo's text encoder has to read.
fn print_statistics(tokenizer: &ByteLevelBpe, set: &EmojiSet) -> Result<()> {
    println!("vocabulary: {} tokens and {} special ones", tokenizer.get_vocab_size(false), SPECIAL.len());
    for language in [Language::English, Language::Chinese] {
        let mut lengths = Vec::new();
        for concept in set.concepts() {
            for style in Style::ALL {
                lengths.push(length(tokenizer, &style.caption(language, concept.label(language)))?);
            }
        }
        lengths.sort_unstable();
        let (count, longest) = (lengths.len(), lengths.last().copied().unwrap_or_default());
        let mean = lengths.iter().sum::<usize>() as f64 / count as f64;
        println!(
            "{language:?}: {mean:.2} tokens a caption, 95 % have at most {}, the longest {longest}",
            lengths[count * 95 / 100]
        );
    }
    Ok(())
}

/// A prefix that falls into more tokens than the original tokenizer's would reach into the prompt.
fn check_prefix(tokenizer: &ByteLevelBpe) -> Result<()> {
    let lengths: Result<Vec<_>> = PREFIX.iter().map(|part| length(tokenizer, part)).collect();
    let found = PREFIX.len() + lengths?.iter().sum::<usize>();
    ensure!(
        found == PREFIX_TOKENS,
        "the prompt prefix has {found} tokens, expected {PREFIX_TOKENS}: raise --vocabulary"
    );
    Ok(())
}

fn length(tokenizer: &ByteLevelBpe, text: &str) -> Result<usize> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|fault| anyhow!(fault))?;
    Ok(encoding.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> ByteLevelBpe {
        train(&["noto emoji of man's shoe".into(), "诺托表情：男鞋".into()], 500).unwrap()
    }

    #[test]
    fn the_template_is_as_long_as_with_the_original_tokenizer() {
        check_prefix(&small()).unwrap();
    }

    #[test]
    fn any_text_survives_and_digits_stay_single() {
        let tokenizer = small();
        let text = "keycap: 10, caffè 🍎 女靴";
        let encoding = tokenizer.encode_fast(text, false).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text);
        assert_eq!(length(&tokenizer, "10").unwrap(), 2);
    }

    #[test]
    fn written_merges_rebuild_the_tokenizer() {
        let folder = std::env::temp_dir().join(format!("emoji-assets-{}", std::process::id()));
        let tokenizer = small();
        write(&folder, tokenizer.get_model()).unwrap();
        let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let read = BPE::from_file(&file("vocab.json"), &file("merges.txt")).build().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(&read, tokenizer.get_model());
    }

    #[test]
    fn special_tokens_follow_the_vocabulary() {
        let added = &config(500)["added_tokens_decoder"];
        assert_eq!(["500", "501", "502"].map(|id| added[id]["content"].as_str().unwrap()), SPECIAL);
    }
}
