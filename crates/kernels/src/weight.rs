//! The weights of linear layers, stored in or rounded to two bytes a number and used as f32.

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::extension::{Stored, Values};
use crate::simd;

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

/// The numbers of a factor of a product, which is done in f32.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    /// The nearest numbers of a half type are used.
    Rounded(&'a [f32], HalfType),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Numbers<'a> {
    /// A weight's. Numbers of two bytes are what they are.
    pub(crate) fn new(weight: &'a Values, rounded_to: Option<HalfType>) -> Self {
        match (weight.stored(), rounded_to) {
            (Stored::F32(values), None) => Self::F32(values),
            (Stored::F32(values), Some(half)) => Self::Rounded(values, half),
            (Stored::Bf16(values), _) => Self::Bf16(values),
            (Stored::F16(values), _) => Self::F16(values),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(values) | Self::Rounded(values, _) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Numbers that are f32 as they lie.
    pub(crate) fn f32s(self) -> &'a [f32] {
        match self {
            Self::F32(values) => values,
            _ => panic!("only a right factor is widened"),
        }
    }

    /// Some of the numbers as f32: themselves, or widened into `buffer`.
    pub(crate) fn lend<'b>(self, range: Range<usize>, buffer: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        if let Self::F32(values) = self {
            return &values[range];
        }
        simd::vectorized(
            #[inline(always)]
            || self.widen(range, buffer),
        );
        buffer
    }

    /// Writes some of the numbers as f32.
    #[inline(always)]
    pub(crate) fn widen(self, range: Range<usize>, to: &mut [f32]) {
        match self {
            Self::F32(values) => to.copy_from_slice(&values[range]),
            Self::Rounded(values, HalfType::Bf16) => {
                each(
                    &values[range],
                    to,
                    #[inline(always)]
                    |value| bf16::from_f32(value).to_f32(),
                );
            }
            Self::Rounded(values, HalfType::F16) => {
                each(
                    &values[range],
                    to,
                    #[inline(always)]
                    |value| f16::from_f32(value).to_f32(),
                );
            }
            Self::Bf16(values) => each(
                &values[range],
                to,
                #[inline(always)]
                |value| value.to_f32(),
            ),
            Self::F16(values) => values[range].convert_to_f32_slice(to),
        }
    }
}

#[inline(always)]
fn each<T: Copy>(from: &[T], to: &mut [f32], convert: impl Fn(T) -> f32) {
    to.iter_mut().zip(from).for_each(
        #[inline(always)]
        |(to, from)| *to = convert(*from),
    );
}
