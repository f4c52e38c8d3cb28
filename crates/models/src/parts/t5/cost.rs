//! What the encoder holds, counted off [`super::encoder`].

use super::T5Config;
use crate::footprint::Encoding;

/// What the encoder holds for rows of so many tokens; nothing is said of pixels.
pub(crate) fn encoding(config: &T5Config, tokens: usize) -> Encoding {
    let [width, inner, hidden, layers] =
        [config.d_model, config.inner(), config.d_ff, config.num_layers].map(|size| size as u64);
    // The stream and its norm beside query, key and value, these by heads, and their output; or beside both branches of the
    // MLP, the activation and the product. Scores of all heads come on top, a row of them for each token.
    let scores = 3 * (config.num_heads * tokens) as u64;
    let per_token = (2 * width + 7 * inner + scores).max(2 * width + 4 * hidden);
    Encoding {
        per_token,
        per_token_training: layers * (4 * width + 8 * inner + 5 * hidden) + per_token,
        per_pixel: 0,
        flops_per_token: 2 * layers * (4 * width * inner + 3 * width * hidden),
        flops_per_pixel: 0,
    }
}
