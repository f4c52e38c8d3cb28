//! Query, key and value as the fused attention takes them.

use burn::tensor::Tensor;

/// Query, key and value, side by side in each token, by heads.
///
/// # Shapes
/// - `qkv`: `[B, T, 3 · K · E]`; output `[3, B, K, T, E]`
pub(crate) fn by_heads(qkv: Tensor<3>, heads: usize) -> Tensor<5> {
    let [batch, tokens, width] = qkv.dims();
    qkv.reshape([batch, tokens, 3, heads, width / 3 / heads]).permute([2, 0, 3, 1, 4])
}
