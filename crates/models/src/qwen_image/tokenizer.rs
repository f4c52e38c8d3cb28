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

/// The file that lists the special tokens.
const CONFIG: &str = "tokenizer_config.json";

/// Wraps prompts in the template and tokenises them.
#[derive(Clone, Debug)]
pub struct PromptTokenizer {
    tokenizer: Arc<Tokenizer>,
    template: PromptTemplate,
    /// Longest prompt in tokens, the template's tail included.
    max_tokens: usize,
    folder: Arc<Path>,
}

/// How long a prompt is, in tokens without the template's dropped ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLength {
    /// The prompt's tokens and those of the template's end.
    pub found: usize,
    /// How many are read; the rest is cut, the template's end with it.
    pub limit: usize,
    /// Tokens of the template's beginning, which are encoded and then dropped.
    pub dropped: usize,
}

impl PromptLength {
    /// Whether the end of the prompt is not read.
    pub fn is_cut(self) -> bool {
        self.found > self.limit
    }
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
        check_files(&folder)?;
        let added = added_tokens(&folder)?;
        let listed = |token: &&str| added.iter().any(|(_, added)| added.content == **token);
        if let Some(token) = template.special_tokens().find(|token| !listed(token)) {
            let reason = format!("no special token {token} in {CONFIG}, which the prompt template needs");
            return Err(ModelError::Tokenizer { path: folder.to_path_buf(), reason });
        }
        let tokenizer = Arc::new(build(&folder, added)?);
        let max_tokens = template.max_tokens.unwrap_or(max_tokens);
        Ok(Self { tokenizer, template, max_tokens, folder })
    }

    /// Checks that there is an embedding for every id.
    pub(super) fn check_ids(&self, embeddings: usize) -> Result<(), ModelError> {
        let largest = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest < embeddings {
            return Ok(());
        }
        Err(self
            .error(format!("the largest id is {largest}, but the text encoder has {embeddings} embeddings")))
    }

    /// Tokenises prompts; each has at least one token after the dropped ones.
    ///
    /// # Errors
    /// If the tokenizer refuses a prompt.
    pub fn encode(&self, prompts: &[String]) -> Result<PromptTokens, ModelError> {
        let limit = self.template.drop_tokens + self.max_tokens;
        let mut ids = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut tokens = self.all_tokens(prompt)?;
            tokens.truncate(limit);
            ids.push(tokens);
        }
        Ok(PromptTokens { ids, drop_tokens: self.template.drop_tokens })
    }

    /// How long a prompt is, and how much of it [`Self::encode`] keeps.
    ///
    /// # Errors
    /// If the tokenizer refuses the prompt.
    pub fn length(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        let dropped = self.template.drop_tokens;
        let found = self.all_tokens(prompt)?.len().saturating_sub(dropped);
        Ok(PromptLength { found, limit: self.max_tokens, dropped })
    }

    /// The tokens of the template with the prompt in it.
    fn all_tokens(&self, prompt: &str) -> Result<Vec<u32>, ModelError> {
        let text = self.template.text.replacen("{}", prompt, 1);
        let encoding = self.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.folder.to_path_buf(), reason }
    }
}

fn check_files(folder: &Path) -> Result<(), ModelError> {
    for name in ["vocab.json", "merges.txt", CONFIG] {
        if !folder.join(name).is_file() {
            let reason = format!("{name} is missing");
            return Err(ModelError::Tokenizer { path: folder.to_owned(), reason });
        }
    }
    Ok(())
}

/// Builds the tokenizer from the slow-format files: vocab.json, merges.txt, tokenizer_config.json.
fn build(folder: &Path, added: Vec<(u32, AddedToken)>) -> Result<Tokenizer, ModelError> {
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
    for (id, token) in added {
        let content = token.content.clone();
        tokenizer.add_special_tokens(&[token]);
        let found = tokenizer.token_to_id(&content);
        if found != Some(id) {
            return Err(error(format!(
                "special token {content} has id {found:?} by vocab.json, expected {id}"
            )));
        }
    }
    Ok(tokenizer)
}

/// The added tokens of tokenizer_config.json with their ids, in the order of these.
fn added_tokens(folder: &Path) -> Result<Vec<(u32, AddedToken)>, ModelError> {
    #[derive(Deserialize)]
    struct Config {
        added_tokens_decoder: std::collections::BTreeMap<String, Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        content: String,
        special: bool,
    }
    let path = folder.join(CONFIG);
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
        .map(|(id, token)| (id, AddedToken::from(token.content, token.special).normalized(false)))
        .collect())
}
