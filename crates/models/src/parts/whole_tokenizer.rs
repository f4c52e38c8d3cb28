//! Tokenizers that are one file, all there is in folders that transformers 5 writes.

use std::path::Path;

use fewstep_data::bounded;
use tokenizers::Tokenizer;

use crate::ModelError;

/// The file's name.
pub(crate) const WHOLE: &str = "tokenizer.json";

/// Reads the file of a tokenizer's folder; prompts are cut and padded elsewhere.
///
/// # Errors
/// If it is missing or damaged.
pub(crate) fn read_whole(folder: &Path) -> Result<Tokenizer, ModelError> {
    let path = folder.join(WHOLE);
    if !path.is_file() {
        let reason = format!("{WHOLE} is missing");
        return Err(ModelError::Tokenizer { path: folder.to_owned(), reason });
    }
    bounded::open(&path, bounded::MAX_TEXT_BYTES).map_err(ModelError::io(&path))?;
    let read = Tokenizer::from_file(&path).and_then(|mut tokenizer| {
        tokenizer.with_truncation(None)?.with_padding(None);
        Ok(tokenizer)
    });
    read.map_err(|error| ModelError::Config { path, reason: error.to_string() })
}
