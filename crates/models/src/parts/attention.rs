//! Attention: its heads, and attention to states of another sequence.

use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

/// Query, key and value side by side as the fused attention takes them.
///
/// # Shapes
/// - `qkv`: `[B, T, 3 · K · E]`; output `[3, B, K, T, E]`
pub(crate) fn by_heads(qkv: Tensor<3>, heads: usize) -> Tensor<5> {
    let [batch, tokens, width] = qkv.dims();
    qkv.reshape([batch, tokens, 3, heads, width / 3 / heads]).permute([2, 0, 3, 1, 4])
}

/// `softmax(q kᵀ / √E) v`.
///
/// # Shapes
/// - `query`: `[B, N, D]`; `key`, `value`: `[B, S, D]`, D = heads · E; output `[B, N, D]`
pub(crate) fn cross_attention(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>, heads: usize) -> Tensor<3> {
    let [batch, tokens, width] = query.dims();
    let dim = width / heads;
    let split = |x: Tensor<3>| -> Tensor<4> {
        let [batch, tokens, _] = x.dims();
        x.reshape([batch, tokens, heads, dim]).swap_dims(1, 2)
    };
    let scores = split(query).matmul(split(key).swap_dims(2, 3)).div_scalar((dim as f32).sqrt());
    softmax(scores, 3).matmul(split(value)).swap_dims(1, 2).reshape([batch, tokens, width])
}
