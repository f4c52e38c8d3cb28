//! T5's encoder (arXiv 1910.10683) with gated MLPs, as version 1.1 has them, its multilingual sibling UMT5, and their
//! tokenizer. Decoders are left out.

mod config;
mod cost;
mod encoder;
mod tokenizer;

pub use config::T5Config;
pub(crate) use cost::encoding;
pub(crate) use encoder::KEYS;
pub use encoder::T5Encoder;
pub use tokenizer::{T5Tokenizer, T5Tokens};
