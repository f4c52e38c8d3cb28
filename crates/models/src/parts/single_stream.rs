//! Attention's input where all tokens have the same weights.

use burn::tensor::Tensor;
use fewstep_kernels::{QkvStream, RotaryTable, single_qkv};

use super::double_stream::Scale;

/// Normalises and rotates queries and keys, head by head or all heads together, as wide as the norms' weights are.
///
/// # Shapes
/// - `qkv`: `[B, T, 3D]`, query, key and value side by side; output `[3, B, K, T, E]`
pub(crate) fn qkv_of_one(
    qkv: Tensor<3>,
    [norm_q, norm_k]: [&Scale; 2],
    heads: usize,
    (rotary, epsilon): (&RotaryTable, f32),
) -> Tensor<5> {
    let stream = QkvStream { qkv, norm_q: norm_q.weight.val(), norm_k: norm_k.weight.val() };
    single_qkv(stream, heads, rotary, epsilon)
}
