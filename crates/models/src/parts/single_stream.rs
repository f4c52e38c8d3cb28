//! Attention's input where all tokens have the same weights.

use burn::tensor::Tensor;
use fewstep_kernels::{QkvStream, RotaryTable, joint_qkv, split_tokens};

use super::double_stream::Scale;

/// Normalises and rotates queries and keys head by head. The fused operation joins two streams, so that one is cut in two
/// for it.
///
/// # Shapes
/// - `qkv`: `[B, T, 3D]`, at least two tokens, query, key and value side by side; output `[3, B, K, T, E]`
pub(crate) fn qkv_of_one(
    qkv: Tensor<3>,
    [norm_q, norm_k]: [&Scale; 2],
    heads: usize,
    (rotary, epsilon): (&RotaryTable, f32),
) -> Tensor<5> {
    let tokens = qkv.dims()[1];
    let part = |range| QkvStream {
        qkv: split_tokens(qkv.clone(), range),
        norm_q: norm_q.weight.val(),
        norm_k: norm_k.weight.val(),
    };
    joint_qkv(part(0..tokens / 2), part(tokens / 2..tokens), heads, rotary, epsilon)
}
