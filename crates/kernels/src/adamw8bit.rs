//! AdamW with both moments in 8 bits.

use burn::tensor::Tensor;

use crate::adamw::Factors;
use crate::extension::{updated, with_values};
use crate::quantized::{BLOCK, Quantized, SIGNED, UNSIGNED};
use crate::{AdamW, AdamWStep, parallel, simd};

/// Running moments of one parameter's gradient, quantised.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments8bit {
    /// Of the gradient, by the signed map.
    pub first: Quantized,
    /// Of its square, by the unsigned map.
    pub second: Quantized,
}

impl Moments8bit {
    /// The moments before the first step, of a parameter of `len` elements.
    pub fn zeros(len: usize) -> Self {
        Self { first: Quantized::zeros(len), second: Quantized::zeros(len) }
    }
}

/// Blocks of one piece of work.
const PIECE: usize = 64 * BLOCK;

impl AdamW {
    /// [`AdamW::step`] with moments that are read from 8 bits and rounded to them again; the parameter moves by the
    /// moments as they are before that rounding. The numbers of `bitsandbytes.optim.AdamW8bit`.
    pub fn step_8bit<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        moments: &mut Moments8bit,
        at: AdamWStep,
    ) -> Tensor<D> {
        assert_eq!(parameter.dims(), gradient.dims(), "parameter and gradient");
        let len = gradient.shape().num_elements();
        assert_eq!(
            (moments.first.codes.len(), moments.second.codes.len()),
            (len, len),
            "moments of {len} elements"
        );
        let factors = Factors::new(self, at);
        with_values(gradient, |gradient| {
            updated(parameter, |parameter| update(&factors, parameter, gradient, moments))
        })
    }
}

fn update(factors: &Factors, parameter: &mut [f32], gradient: &[f32], moments: &mut Moments8bit) {
    let Moments8bit { first, second } = moments;
    let values = parameter.chunks_mut(PIECE).zip(gradient.chunks(PIECE));
    parallel::for_each(
        values.zip(pieces(first)).zip(pieces(second)),
        |(((parameter, gradient), first), second)| {
            simd::vectorized(
                #[inline(always)]
                || update_piece(factors, parameter, gradient, [first, second]),
            );
        },
    );
}

/// Codes and scales of some blocks.
type Blocks<'a> = (&'a mut [u8], &'a mut [f32]);

fn pieces(moment: &mut Quantized) -> impl Iterator<Item = Blocks<'_>> {
    moment.codes.chunks_mut(PIECE).zip(moment.scales.chunks_mut(PIECE / BLOCK))
}

#[inline(always)]
fn update_piece(factors: &Factors, parameter: &mut [f32], gradient: &[f32], [first, second]: [Blocks; 2]) {
    let (mut first_values, mut second_values) = ([0.0; BLOCK], [0.0; BLOCK]);
    let blocks = parameter.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
    let first = first.0.chunks_mut(BLOCK).zip(first.1);
    let second = second.0.chunks_mut(BLOCK).zip(second.1);
    for (((parameter, gradient), first), second) in blocks.zip(first).zip(second) {
        let (first_values, second_values) =
            (&mut first_values[..gradient.len()], &mut second_values[..gradient.len()]);
        SIGNED.read(first.0, *first.1, first_values);
        UNSIGNED.read(second.0, *second.1, second_values);
        factors.update(parameter, gradient, first_values, second_values);
        *first.1 = SIGNED.write(first_values, first.0);
        *second.1 = UNSIGNED.write(second_values, second.0);
    }
}
