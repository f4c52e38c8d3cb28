//! CLIP's tokenizer: lower-cased byte-level BPE whose words end in `</w>`, padded to a fixed length. Ids equal those of
//! transformers' `CLIPTokenizer`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewstep_data::bounded;
use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Lowercase, NormalizerWrapper, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use crate::ModelError;
use crate::config_file::read_json;
use crate::parts::whole_tokenizer::{WHOLE, read_whole};

/// What words are: from transformers' `CLIPTokenizer`.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// What the last token of a word ends in.
const END_OF_WORD: &str = "</w>";
const VOCABULARY: &str = "vocab.json";
const MERGES: &str = "merges.txt";
const CONFIG: &str = "tokenizer_config.json";
/// Longest row of tokens where the config says none: CLIP's.
const LONGEST: usize = 77;

/// Makes rows of tokens of prompts: the start, the prompt's tokens, the end, padding.
#[derive(Clone, Debug)]
pub struct ClipTokenizer {
    tokenizer: Arc<Tokenizer>,
    start: u32,
    end: u32,
    padding: u32,
    /// Tokens of a row.
    length: usize,
    /// Tokens of a prompt that are read.
    limit: usize,
    folder: Arc<Path>,
}

/// What is read of `tokenizer_config.json`.
#[derive(Deserialize)]
struct Config {
    #[serde(default = "start_token")]
    bos_token: Special,
    #[serde(default = "end_token")]
    eos_token: Special,
    #[serde(default = "end_token")]
    pad_token: Special,
    model_max_length: Option<f64>,
}

/// A special token as files spell it.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Added {
        content: String,
        /// Whether it is looked for after lower-casing.
        #[serde(default)]
        normalized: bool,
    },
}

fn start_token() -> Special {
    Special::Added { content: "<|startoftext|>".into(), normalized: true }
}

fn end_token() -> Special {
    Special::Added { content: "<|endoftext|>".into(), normalized: true }
}

impl Special {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Added { content, .. } => content,
        }
    }

    fn added(&self) -> AddedToken {
        let normalized = matches!(self, Self::Added { normalized: true, .. });
        AddedToken::from(self.content(), true).normalized(normalized)
    }
}

impl ClipTokenizer {
    /// Reads a tokenizer's folder: `vocab.json` and `merges.txt`, or in their place `tokenizer.json`, and
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// If a file is missing or damaged, or lacks a token.
    pub fn read(folder: PathBuf) -> Result<Self, ModelError> {
        let error = |reason: String| ModelError::Tokenizer { path: folder.clone(), reason };
        let is_whole = !folder.join(VOCABULARY).is_file() && folder.join(WHOLE).is_file();
        let files: &[&str] = if is_whole { &[CONFIG] } else { &[VOCABULARY, MERGES, CONFIG] };
        for name in files {
            let path = folder.join(name);
            if !path.is_file() {
                return Err(error(format!("{name} is missing")));
            }
            bounded::open(&path, bounded::MAX_TEXT_BYTES).map_err(ModelError::io(&path))?;
        }
        let config: Config = read_json(&folder.join(CONFIG))?;
        let length = config.model_max_length.map_or(LONGEST, |length| length as usize);
        if length < 3 {
            return Err(error(format!("model_max_length is {length}, expected at least 3")));
        }
        let tokenizer = match is_whole {
            true => read_whole(&folder)?,
            false => build(&folder, &config).map_err(error)?,
        };
        let id = |token: &Special| {
            let file = if is_whole { WHOLE } else { VOCABULARY };
            let missing = || error(format!("{file} has no token {:?}", token.content()));
            tokenizer.token_to_id(token.content()).ok_or_else(missing)
        };
        let (start, end, padding) = (id(&config.bos_token)?, id(&config.eos_token)?, id(&config.pad_token)?);
        let limit = length - 2;
        Ok(Self { tokenizer: Arc::new(tokenizer), start, end, padding, length, limit, folder: folder.into() })
    }

    /// Checks that a text model has an embedding for every id and a position for every place in a row.
    pub(crate) fn check_fits(&self, embeddings: usize, positions: usize) -> Result<(), ModelError> {
        let largest = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= embeddings {
            let reason =
                format!("the largest id is {largest}, but the text encoder has {embeddings} embeddings");
            return Err(self.error(reason));
        }
        if self.length > positions {
            let reason = format!(
                "model_max_length is {}, but the text encoder has {positions} positions",
                self.length
            );
            return Err(self.error(reason));
        }
        Ok(())
    }

    /// Tokenises prompts into rows of [`ClipTokenizer::row_length`] tokens; longer prompts are cut.
    ///
    /// # Errors
    /// If the tokenizer refuses a prompt.
    pub fn encode(&self, prompts: &[String]) -> Result<Vec<Vec<u32>>, ModelError> {
        let row = |prompt: &String| {
            let mut row = vec![self.start];
            row.extend(self.tokens(prompt)?.into_iter().take(self.limit()));
            row.push(self.end);
            row.resize(self.length, self.padding);
            Ok(row)
        };
        prompts.iter().map(row).collect()
    }

    /// Tokens of a prompt, however many of them are read.
    ///
    /// # Errors
    /// If the tokenizer refuses the prompt.
    pub fn count(&self, prompt: &str) -> Result<usize, ModelError> {
        Ok(self.tokens(prompt)?.len())
    }

    /// The most tokens of a prompt that are read.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The same tokenizer that reads fewer tokens of a prompt.
    pub(crate) fn cut_to(self, limit: usize) -> Self {
        Self { limit: self.limit.min(limit), ..self }
    }

    /// Tokens of a row, padding included.
    pub fn row_length(&self) -> usize {
        self.length
    }

    fn tokens(&self, prompt: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode_fast(prompt, false);
        Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.folder.to_path_buf(), reason }
    }
}

/// Builds the tokenizer of a folder.
fn build(folder: &Path, config: &Config) -> Result<Tokenizer, String> {
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let bpe = BPE::from_file(&file(VOCABULARY), &file(MERGES)).end_of_word_suffix(END_OF_WORD.into());
    let bpe = bpe.build().map_err(|reason| format!("vocab.json or merges.txt: {reason}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    // What no token stands for would be left out of prompts without a word.
    let token = |byte: &char| [byte.to_string(), format!("{byte}{END_OF_WORD}")];
    let absent = |token: &String| tokenizer.token_to_id(token).is_none();
    if let Some(token) = ByteLevel::alphabet().iter().flat_map(token).find(absent) {
        return Err(format!("vocab.json has no token {token:?}, expected two for every byte"));
    }
    tokenizer.with_normalizer(Some(normalizer()?));
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer()?));
    for token in [&config.bos_token, &config.eos_token, &config.pad_token] {
        tokenizer.add_special_tokens(&[token.added()]);
    }
    Ok(tokenizer)
}

/// Composed characters, single spaces, lower case.
fn normalizer() -> Result<tokenizers::normalizers::Sequence, String> {
    let spaces =
        Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|error| error.to_string())?;
    Ok(tokenizers::normalizers::Sequence::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ]))
}

fn pre_tokenizer() -> Result<Sequence, String> {
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true);
    Ok(Sequence::new(vec![
        PreTokenizerWrapper::Split(words.map_err(|error| error.to_string())?),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ]))
}
