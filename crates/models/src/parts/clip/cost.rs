//! What the text model holds, counted off [`super::text_encoder`].

use super::ClipTextConfig;
use crate::footprint::Encoding;

/// What the text model holds; nothing is said of pixels.
pub(crate) fn encoding(config: &ClipTextConfig) -> Encoding {
    let [width, inner, layers] =
        [config.hidden_size, config.intermediate_size, config.num_hidden_layers].map(|size| size as u64);
    // The stream, its norm, query, key and value, these packed, and the attention's output; or the MLP before and after its
    // activation. The states of all layers are there at the end.
    let moment = (9 * width).max(2 * width + 2 * inner);
    Encoding {
        per_token: moment + layers * width,
        per_token_training: layers * (9 * width + 2 * inner) + moment,
        per_pixel: 0,
        flops_per_token: 2 * layers * (4 * width * width + 2 * width * inner),
        flops_per_pixel: 0,
    }
}
