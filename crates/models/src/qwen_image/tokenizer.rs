//! Prompts to token ids: the Qwen2 byte-level BPE and the prompt template.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::config::PromptTemplate;
use crate::{ModelError, ModelSource};

/// The pre-tokenisation of Qwen2 (digits one by one), from transformers' `Qwen2Tokenizer`.
const PRETOKENIZE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Wraps prompts in the template and tokenises them.
#[derive(Clone, Debug)]
pub struct PromptTokenizer {
    tokenizer: Arc<Tokenizer>,
    template: PromptTemplate,
    /// Longest prompt in tokens, the template's tail included.
    max_tokens: usize,
    folder: Arc<Path>,
}

/// Token ids of a batch of prompts, unpadded.
#[derive(Clone, Debug)]
pub struct PromptTokens {
    /// One list per prompt, template included.
    pub ids: Vec<Vec<u32>>,
    /// Leading tokens of each list that belong to the template's instruction.
    pub drop_tokens: usize,
}

impl PromptTokenizer {
    /// Reads the tokenizer and the template of a model; `max_tokens` is the limit of a prompt where the
    /// template does not set its own.
    ///
    /// # Errors
    /// If the files are missing, damaged, or do not define the template's special tokens.
    pub fn read(source: &ModelSource, max_tokens: usize) -> Result<Self, ModelError> {
        let template = PromptTemplate::read(source)?;
        let folder: Arc<Path> = source.tokenizer()?.into();
        let tokenizer = build(&folder)?;
        let max_tokens = template.max_tokens.unwrap_or(max_tokens);
        Ok(Self { tokenizer: Arc::new(tokenizer), template, max_tokens, folder })
    }

    /// Tokenises prompts; each has at least one token after the dropped ones.
    ///
    /// # Errors
    /// If the tokenizer refuses a prompt.
    pub fn encode(&self, prompts: &[String]) -> Result<PromptTokens, ModelError> {
        let limit = self.template.drop_tokens + self.max_tokens;
        let mut ids = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let text = self.template.text.replacen("{}", prompt, 1);
            let encoding =
                self.tokenizer.encode_fast(text, false).map_err(|error| self.error(error.to_string()))?;
            let tokens = encoding.get_ids();
            ids.push(tokens[..tokens.len().min(limit)].to_vec());
        }
        Ok(PromptTokens { ids, drop_tokens: self.template.drop_tokens })
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.folder.to_path_buf(), reason }
    }
}

/// Builds the tokenizer from the slow-format files: vocab.json, merges.txt, tokenizer_config.json.
fn build(folder: &Path) -> Result<Tokenizer, ModelError> {
    let error = |reason: String| ModelError::Tokenizer { path: folder.to_owned(), reason };
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let bpe = BPE::from_file(&file("vocab.json"), &file("merges.txt"))
        .build()
        .map_err(|reason| error(format!("vocab.json or merges.txt: {reason}")))?;
    let split = Split::new(SplitPattern::Regex(PRETOKENIZE.into()), SplitDelimiterBehavior::Isolated, false)
        .map_err(|reason| error(reason.to_string()))?;
    let byte_level = ByteLevel::new(false, true, false);
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(NFC));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ])));
    let added = added_tokens(folder)?;
    tokenizer.add_special_tokens(&added);
    for token in &added {
        if tokenizer.token_to_id(&token.content).is_none() {
            return Err(error(format!("special token {} got no id", token.content)));
        }
    }
    Ok(tokenizer)
}

/// The added tokens of tokenizer_config.json in the order of their ids.
fn added_tokens(folder: &Path) -> Result<Vec<AddedToken>, ModelError> {
    #[derive(Deserialize)]
    struct Config {
        added_tokens_decoder: std::collections::BTreeMap<String, Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        content: String,
        special: bool,
    }
    let path = folder.join("tokenizer_config.json");
    let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
    let config: Config = serde_json::from_str(&text)
        .map_err(|error| ModelError::Config { path: path.clone(), reason: error.to_string() })?;
    let mut added: Vec<(u32, Added)> = Vec::new();
    for (id, token) in config.added_tokens_decoder {
        let id = id.parse().map_err(|_| ModelError::Config {
            path: path.clone(),
            reason: format!("added_tokens_decoder: key {id:?}, expected a token id"),
        })?;
        added.push((id, token));
    }
    added.sort_by_key(|(id, _)| *id);
    Ok(added
        .into_iter()
        .map(|(_, token)| AddedToken::from(token.content, token.special).normalized(false))
        .collect())
}
