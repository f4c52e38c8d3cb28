//! T5's tokenizer: a unigram model over SentencePiece's normal form, as `tokenizer.json` has it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use tokenizers::Tokenizer;

use crate::ModelError;
use crate::parts::whole_tokenizer::{WHOLE, read_whole};

const END: &str = "</s>";
const PADDING: &str = "<pad>";

/// Makes rows of tokens of prompts: the prompt's tokens, the end, padding.
#[derive(Clone, Debug)]
pub struct T5Tokenizer {
    tokenizer: Arc<Tokenizer>,
    end: u32,
    padding: u32,
    folder: Arc<Path>,
}

/// Rows of tokens and how many of each are no padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct T5Tokens {
    /// One row per prompt, all of one length.
    pub ids: Vec<Vec<u32>>,
    /// Tokens before the padding.
    pub lengths: Vec<usize>,
}

impl T5Tokens {
    /// `[B, T, 1]`, 1 for tokens and 0 for padding.
    pub(crate) fn inside(&self, device: &Device) -> Tensor<3> {
        let longest = self.ids.first().map_or(0, Vec::len);
        let row = |length: &usize| {
            let length = *length;
            (0..longest).map(move |at| f32::from(u8::from(at < length)))
        };
        let mask: Vec<f32> = self.lengths.iter().flat_map(row).collect();
        Tensor::from_data(TensorData::new(mask, [self.lengths.len(), longest, 1]), device)
    }
}

impl T5Tokenizer {
    /// Reads a tokenizer's folder.
    ///
    /// # Errors
    /// If its file is missing or damaged, or lacks a token.
    pub fn read(folder: PathBuf) -> Result<Self, ModelError> {
        let error = |reason: String| ModelError::Tokenizer { path: folder.clone(), reason };
        let tokenizer = read_whole(&folder)?;
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| error(format!("{WHOLE} has no token {token}")))
        };
        let (end, padding) = (id(END)?, id(PADDING)?);
        Ok(Self { tokenizer: Arc::new(tokenizer), end, padding, folder: folder.into() })
    }

    /// Checks that an encoder has an embedding for every id that text can have.
    pub(crate) fn check_ids(&self, embeddings: usize) -> Result<(), ModelError> {
        let largest = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest < embeddings {
            return Ok(());
        }
        Err(self
            .error(format!("the largest id is {largest}, but the text encoder has {embeddings} embeddings")))
    }

    /// Tokenises prompts into rows of `length` tokens; longer prompts are cut before the end.
    ///
    /// # Errors
    /// If the tokenizer refuses a prompt.
    pub fn encode(&self, prompts: &[String], length: usize) -> Result<T5Tokens, ModelError> {
        let mut tokens = T5Tokens { ids: Vec::new(), lengths: Vec::new() };
        for prompt in prompts {
            let mut row = self.tokens(prompt)?;
            row.truncate(length.saturating_sub(1));
            row.push(self.end);
            tokens.lengths.push(row.len());
            row.resize(length.max(1), self.padding);
            tokens.ids.push(row);
        }
        Ok(tokens)
    }

    /// Tokens of a prompt with its end, however many of them are read.
    ///
    /// # Errors
    /// If the tokenizer refuses the prompt.
    pub fn count(&self, prompt: &str) -> Result<usize, ModelError> {
        Ok(self.tokens(prompt)?.len() + 1)
    }

    fn tokens(&self, prompt: &str) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode_fast(prompt, false);
        Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.folder.to_path_buf(), reason }
    }
}
