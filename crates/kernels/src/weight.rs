//! The weights of linear layers, stored in or rounded to two bytes a number and used as f32.

use std::cell::Cell;

use burn::tensor::{DType, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::extension::{Stored, Values};
use crate::simd;
use crate::transpose::transpose;

/// A number type of two bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfType {
    /// bfloat16: the range of f32 with 8 bits of precision.
    Bf16,
    /// IEEE half precision: up to 65,504 with 11 bits.
    F16,
}

impl HalfType {
    /// burn's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// The nearest numbers of the type, as f32. The gradient passes unchanged; that of burn's cast would be rounded.
    pub fn nearest<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        let fixed = x.clone().detach();
        fixed.clone().cast(self.dtype()).cast(DType::F32) + (x - fixed)
    }
}

/// Elements of one piece of work.
const PIECE: usize = 16 * 1024;

thread_local! {
    /// As long as the largest weight that came by. Freed and allocated anew it would end up between the activations
    /// that backward keeps, each time somewhere else.
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends a weight as f32: its own memory where that is f32 and nothing is rounded, otherwise the thread's buffer.
pub(crate) fn with_f32<R>(
    weight: &Values,
    rounded_to: Option<HalfType>,
    body: impl FnOnce(&[f32]) -> R,
) -> R {
    match (weight.stored(), rounded_to) {
        (Stored::F32(values), None) => body(values),
        (Stored::F32(values), Some(half)) => in_buffer(values, |from, to| round(half, from, to), body),
        (Stored::Bf16(values), _) => in_buffer(values, widen_bf16, body),
        (Stored::F16(values), _) => in_buffer(values, |from, to| from.convert_to_f32_slice(to), body),
    }
}

/// Lends the transpose of a `[rows, columns]` weight as f32, in the thread's buffer.
pub(crate) fn with_transpose<R>(
    weight: &Values,
    rounded_to: Option<HalfType>,
    shape: [usize; 2],
    body: impl FnOnce(&[f32]) -> R,
) -> R {
    match (weight.stored(), rounded_to) {
        (Stored::F32(values), None) => turned(values, shape, |x| x, body),
        (Stored::F32(values), Some(HalfType::Bf16)) => {
            turned(values, shape, |x| bf16::from_f32(x).to_f32(), body)
        }
        (Stored::F32(values), Some(HalfType::F16)) => {
            turned(values, shape, |x| f16::from_f32(x).to_f32(), body)
        }
        (Stored::Bf16(values), _) => turned(values, shape, bf16::to_f32, body),
        (Stored::F16(values), _) => turned(values, shape, f16::to_f32, body),
    }
}

fn turned<T: Copy + Sync, R>(
    values: &[T],
    shape: [usize; 2],
    widen: impl Fn(T) -> f32 + Sync,
    body: impl FnOnce(&[f32]) -> R,
) -> R {
    with_buffer(values.len(), |target| transpose(values, shape, target, widen), body)
}

fn in_buffer<T: Sync, R>(
    values: &[T],
    convert: impl Fn(&[T], &mut [f32]) + Sync,
    body: impl FnOnce(&[f32]) -> R,
) -> R {
    let fill = |target: &mut [f32]| {
        target.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).for_each(|(to, from)| convert(from, to));
    };
    with_buffer(values.len(), fill, body)
}

/// Lends the thread's buffer once `fill` has written all of it.
fn with_buffer<R>(len: usize, fill: impl FnOnce(&mut [f32]), body: impl FnOnce(&[f32]) -> R) -> R {
    // Taken out, not borrowed: a thread that waits for others may come by here a second time.
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        drop(buffer);
        buffer = vec![0.0; len];
    }
    let target = &mut buffer[..len];
    fill(target);
    let result = body(target);
    BUFFER.set(buffer);
    result
}

fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    simd::vectorized(
        #[inline(always)]
        || to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32()),
    );
}

fn round(half: HalfType, from: &[f32], to: &mut [f32]) {
    let pairs = to.iter_mut().zip(from);
    simd::vectorized(
        #[inline(always)]
        || match half {
            HalfType::Bf16 => pairs.for_each(|(to, from)| *to = bf16::from_f32(*from).to_f32()),
            HalfType::F16 => pairs.for_each(|(to, from)| *to = f16::from_f32(*from).to_f32()),
        },
    );
}
