//! Prompts to token ids: the Qwen2 byte-level BPE and the prompt template.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fewstep_data::bounded;
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
use crate::config_file::read_json;
use crate::parts::whole_tokenizer::{WHOLE, read_whole};
use crate::{ModelError, ModelSource, PromptLength};

/// The pre-tokenisation of Qwen2 (digits one by one), from transformers' `Qwen2Tokenizer`.
const PRETOKENIZE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The file that lists the special tokens beside vocab.json.
const CONFIG: &str = "tokenizer_config.json";

/// Where older files list them, without their properties.
const ADDED: &str = "added_tokens.json";

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
        Self::with_template(source, PromptTemplate::read(source)?, max_tokens)
    }

    /// The same with a template of a family's own.
    pub(crate) fn with_template(
        source: &ModelSource,
        template: PromptTemplate,
        max_tokens: usize,
    ) -> Result<Self, ModelError> {
        let folder: Arc<Path> = source.tokenizer("tokenizer")?.into();
        let whole = !folder.join("vocab.json").is_file() && folder.join(WHOLE).is_file();
        let tokenizer = if whole {
            let tokenizer = read_whole(&folder)?;
            check_special(&template, tokenizer.get_added_tokens_decoder().values(), &folder, WHOLE)?;
            tokenizer
        } else {
            check_files(&folder)?;
            let added = added_tokens(&folder)?;
            check_special(&template, added.iter().map(|(_, token)| token), &folder, CONFIG)?;
            build(&folder, added)?
        };
        let tokenizer = Arc::new(tokenizer);
        let max_tokens = template.max_tokens.unwrap_or(max_tokens);
        Ok(Self { tokenizer, template, max_tokens, folder })
    }

    /// Checks that there is an embedding for every id.
    pub(crate) fn check_ids(&self, embeddings: usize) -> Result<(), ModelError> {
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
    /// If the tokenizer refuses a prompt, or the template drops all of its tokens.
    pub fn encode(&self, prompts: &[String]) -> Result<PromptTokens, ModelError> {
        let limit = self.template.drop_tokens + self.max_tokens;
        let mut ids = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut tokens = self.all_tokens(prompt)?;
            tokens.truncate(limit);
            let drop = self.template.drop_tokens;
            if tokens.len() <= drop {
                let found = tokens.len();
                return Err(self.error(format!(
                    "a prompt in its template has {found} tokens, of which prompt_template.drop_tokens drops {drop}"
                )));
            }
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
        let limit = self.max_tokens;
        Ok(PromptLength { found, limit, dropped, states: found.min(limit) })
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

/// Checks that a tokenizer has the template's special tokens.
fn check_special<'a>(
    template: &PromptTemplate,
    added: impl Iterator<Item = &'a AddedToken>,
    folder: &Path,
    file: &str,
) -> Result<(), ModelError> {
    let added: Vec<&str> = added.map(|token| token.content.as_str()).collect();
    match template.special_tokens().find(|token| !added.contains(token)) {
        None => Ok(()),
        Some(token) => {
            let reason = format!("no special token {token} in {file}, which the prompt template needs");
            Err(ModelError::Tokenizer { path: folder.to_owned(), reason })
        }
    }
}

/// Builds the tokenizer from the published files: vocab.json, merges.txt, tokenizer_config.json.
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
    // What no token stands for would be left out of prompts without a word.
    if let Some(byte) =
        ByteLevel::alphabet().iter().find(|byte| tokenizer.token_to_id(&byte.to_string()).is_none())
    {
        return Err(error(format!("vocab.json has no token {byte:?}, expected one for every byte")));
    }
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

fn check_files(folder: &Path) -> Result<(), ModelError> {
    for name in ["vocab.json", "merges.txt", CONFIG] {
        let path = folder.join(name);
        if !path.is_file() {
            let reason = format!("{name} is missing");
            return Err(ModelError::Tokenizer { path: folder.to_owned(), reason });
        }
        bounded::open(&path, bounded::MAX_TEXT_BYTES).map_err(ModelError::io(&path))?;
    }
    Ok(())
}

/// The added tokens of tokenizer_config.json with their ids, in the order of these; where it lists none, those of
/// added_tokens.json, which are all taken as special.
fn added_tokens(folder: &Path) -> Result<Vec<(u32, AddedToken)>, ModelError> {
    #[derive(Deserialize)]
    struct Config {
        added_tokens_decoder: Option<BTreeMap<String, Added>>,
    }
    #[derive(Deserialize)]
    struct Added {
        content: String,
        special: bool,
    }
    let path = folder.join(CONFIG);
    let config: Config = read_json(&path)?;
    let mut added: Vec<(u32, AddedToken)> = Vec::new();
    match config.added_tokens_decoder {
        Some(tokens) => {
            for (id, Added { content, special }) in tokens {
                let id = id.parse().map_err(|_| ModelError::Config {
                    path: path.clone(),
                    reason: format!("added_tokens_decoder: key {id:?}, expected a token id"),
                })?;
                added.push((id, AddedToken::from(content, special)));
            }
        }
        None if folder.join(ADDED).is_file() => {
            let tokens: BTreeMap<String, u32> = read_json(&folder.join(ADDED))?;
            added.extend(tokens.into_iter().map(|(content, id)| (id, AddedToken::from(content, true))));
        }
        None => {}
    }
    added.sort_by_key(|(id, _)| *id);
    Ok(added.into_iter().map(|(id, token)| (id, token.normalized(false))).collect())
}
