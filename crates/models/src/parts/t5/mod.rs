//! T5's encoder (arXiv 1910.10683) with gated MLPs, as version 1.1 has them, its multilingual sibling UMT5, and their
//! tokenizer. Decoders are left out.

mod config;
mod cost;
mod encoder;
mod tokenizer;

use crate::weights::WeightFiles;

pub use config::T5Config;
pub(crate) use cost::encoding;
pub(crate) use encoder::KEYS;
pub use encoder::T5Encoder;
pub use tokenizer::{T5Tokenizer, T5Tokens};

/// Whether weight files are an encoder of the first kind: UMT5's have positions in the second layer too.
pub(crate) fn is_of(files: &WeightFiles) -> bool {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    let second = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight";
    all(&["encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"])
        && !files.contains(second)
}
