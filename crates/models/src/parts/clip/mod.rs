//! CLIP's text tower (arXiv 2103.00020): its tokenizer and its transformer.

mod config;
mod cost;
mod text_encoder;
mod tokenizer;

pub use config::ClipTextConfig;
pub(crate) use cost::encoding;
pub(crate) use text_encoder::KEYS;
pub use text_encoder::{ClipStates, ClipTextEncoder};
pub use tokenizer::ClipTokenizer;
