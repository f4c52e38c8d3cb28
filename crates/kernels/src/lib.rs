//! The operations that training and sampling spend their time in, fused for the CPU.
//!
//! burn's flex backend runs element-wise operations on one core and stores every intermediate. Each operation here is
//! one pass over its inputs on all cores, keeps only what its backward needs, and skips the gradients nobody asked for.
//! It is registered as one node of burn's autodiff graph. On every other device, and inside of [`with_plain_twins`], the
//! same call runs [`plain`], the same formula written with burn's own operations; the tests hold both to each other.
//!
//! Everything is `f32`, save that a linear layer's weight may be stored in bf16 or f16. The same input gives the same
//! bits on every run: work is cut into fixed pieces that do not depend on which thread runs them. `unsafe` code of the
//! project lives here.
//!
//! The crate leaves out mixed precision and anything that reads or writes files.

mod activation;
mod adamw;
mod adamw8bit;
mod allocator;
mod attention;
mod channel_norm;
mod conv;
mod extension;
mod glu;
mod gradient_sums;
mod group_norm;
mod inject;
mod linear;
mod matmul;
mod norm;
mod parallel;
pub mod plain;
mod quantized;
mod recompute;
mod residual;
mod rotary;
mod scoped;
mod simd;
#[cfg(test)]
mod testing;
mod tokens;
mod twins;
mod weight;

pub use activation::{After, Gelu, gelu};
pub use adamw::{AdamW, AdamWStep, Moments, SquaredNorm, added, lerp_in_place};
pub use adamw8bit::Moments8bit;
pub use allocator::TunedAllocator;
pub use attention::{AttentionOptions, KeyMask, attention, cross_attention};
pub use channel_norm::channel_norm;
pub use conv::{ConvShape, conv2d};
pub use extension::{updated, with_values};
pub use glu::{Gate, glu, glu_halves};
pub use gradient_sums::GradientSums;
pub use group_norm::{GroupNorm, group_norm};
pub use inject::inject;
pub use linear::{LowRank, Projection, linear, linear_concat, makes_few_of_many};
pub use norm::{Modulation, norm_modulate, rms_norm};
pub use quantized::Quantized;
pub use recompute::{Remembered, recomputed, recomputed_outputs};
pub use residual::gated_residual;
pub use rotary::{QkvStream, RotaryTable, joint_qkv, single_qkv};
pub use simd::instructions;
pub use tokens::split_tokens;
pub use twins::{takes_plain_twins, with_plain_twins};
pub use weight::HalfType;
