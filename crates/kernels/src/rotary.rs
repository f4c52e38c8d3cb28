//! From two streams' projections to the joined query, key and value of an attention: RMS norm of queries and keys,
//! rotary position embedding, and the change of layout, in one pass.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Tensor, TensorData};

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::norm::{chunk, inverse_rms, rms_row, rms_row_backward};
use crate::{parallel, plain, simd};

/// Cosines and sines of every position's rotation angles. Cloning copies nothing.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    pairs: usize,
    /// Both on the device that first asked for them.
    sent: Arc<OnceLock<[Tensor<2>; 2]>>,
}

impl RotaryTable {
    /// `cos` and `sin` have a row of `pairs` elements for each position. Pair `i` rotates elements `2i` and `2i + 1`.
    pub fn new(cos: Vec<f32>, sin: Vec<f32>, pairs: usize) -> Self {
        assert_eq!(cos.len(), sin.len(), "cosines and sines");
        assert!(pairs > 0 && cos.len().is_multiple_of(pairs), "{} cosines in rows of {pairs}", cos.len());
        Self { cos: cos.into(), sin: sin.into(), pairs, sent: Arc::default() }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.pairs
    }

    /// Cosines and sines `[positions, pairs]` on a device; to the first one they are sent once.
    pub(crate) fn on(&self, device: &Device) -> [Tensor<2>; 2] {
        let plain = device.clone().without_autodiff();
        let send = || {
            let shape = [self.positions(), self.pairs];
            [&self.cos, &self.sin]
                .map(|table| Tensor::from_data(TensorData::new(table.to_vec(), shape), &plain))
        };
        let mut tables = self.sent.get_or_init(send).clone();
        if tables[0].device() != plain {
            tables = send();
        }
        if device.is_autodiff() { tables.map(Tensor::autodiff) } else { tables }
    }

    /// Rotates one head in place; `direction` -1 turns back.
    #[inline(always)]
    fn rotate(&self, position: usize, row: &mut [f32], direction: f32) {
        let (cos, sin) = (chunk(&self.cos, position, self.pairs), chunk(&self.sin, position, self.pairs));
        for ((pair, cos), sin) in row.chunks_exact_mut(2).zip(cos).zip(sin) {
            let (real, imaginary, sin) = (pair[0], pair[1], direction * sin);
            pair[0] = real * cos - imaginary * sin;
            pair[1] = real * sin + imaginary * cos;
        }
    }
}

/// One stream's projections and the weights of its query and key norms.
#[derive(Clone, Debug)]
pub struct QkvStream {
    /// `[batch, tokens, 3 · heads · E]`, query, key and value side by side.
    pub qkv: Tensor<3>,
    /// `[E]`: each head is normalised by itself; or `[heads · E]`: all heads of a token together.
    pub norm_q: Tensor<1>,
    /// As [`Self::norm_q`].
    pub norm_k: Tensor<1>,
}

/// Normalises queries and keys, rotates them head by head and joins both streams, text first.
///
/// # Shapes
/// - `rotary`: at least as many positions as both streams have tokens, position 0 being the first text token
/// - returns: `[3, batch, heads, text + image, E]`
pub fn joint_qkv(
    text: QkvStream,
    image: QkvStream,
    heads: usize,
    rotary: &RotaryTable,
    epsilon: f32,
) -> Tensor<5> {
    if !is_fused(&image.qkv) {
        return plain::joint_qkv(text, image, heads, rotary, epsilon);
    }
    let joint = Joint::new(&text, &image, heads, rotary, epsilon);
    let inputs = [text, image]
        .map(|stream| [Input::new(stream.qkv), Input::new(stream.norm_q), Input::new(stream.norm_k)]);
    let [[text, text_q, text_k], [image, image_q, image_k]] = inputs;
    operation([text, text_q, text_k, image, image_q, image_k], |values, tracked| {
        let output = joint.forward(values.each_ref().map(|values| &**values));
        let shape = joint.shape();
        let pullback: Pullback<6> = Box::new(move |gradient| {
            joint.backward(values.each_ref().map(|values| &**values), tracked, &gradient)
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// [`joint_qkv`] of one sequence, all of whose tokens have the same weights.
///
/// # Shapes
/// - `rotary`: at least as many positions as the stream has tokens
/// - returns: `[3, batch, heads, tokens, E]`
pub fn single_qkv(stream: QkvStream, heads: usize, rotary: &RotaryTable, epsilon: f32) -> Tensor<5> {
    if !is_fused(&stream.qkv) {
        return plain::single_qkv(stream, heads, rotary, epsilon);
    }
    let single = Joint::single(&stream, heads, rotary, epsilon);
    let inputs = [Input::new(stream.qkv), Input::new(stream.norm_q), Input::new(stream.norm_k)];
    operation(inputs, |[qkv, norm_q, norm_k], tracked| {
        let output = single.forward([&[], &[], &[], &qkv, &norm_q, &norm_k]);
        let shape = single.shape();
        let pullback: Pullback<3> = Box::new(move |gradient| {
            let tracked = [false, false, false, tracked[0], tracked[1], tracked[2]];
            let values: [&[f32]; 6] = [&[], &[], &[], &qkv, &norm_q, &norm_k];
            let [_, _, _, qkv, norm_q, norm_k] = single.backward(values, tracked, &gradient);
            [qkv, norm_q, norm_k]
        });
        (Values::from_vec(output, &shape), pullback)
    })
}

/// The second stream may be the only one.
struct Joint {
    batch: usize,
    heads: usize,
    dim: usize,
    /// Elements that are normalised together: those of one head, or of all.
    normed: usize,
    /// Tokens of the text and of the image.
    tokens: [usize; 2],
    rotary: RotaryTable,
    epsilon: f32,
}

/// Tensors of one stream, in the order of these indices.
const INPUTS: usize = 3;
const QKV: usize = 0;
const NORM_Q: usize = 1;

/// Tokens from the one that is worked on to the one that memory is asked for: they lie further apart than what processors
/// ask for by themselves.
const TOKENS_AHEAD: usize = 4;

impl Joint {
    fn new(text: &QkvStream, image: &QkvStream, heads: usize, rotary: &RotaryTable, epsilon: f32) -> Self {
        let ([batch, tokens, width], [image_batch, _, image_width]) = (text.qkv.dims(), image.qkv.dims());
        assert_eq!((batch, width), (image_batch, image_width), "batch and width of text and image");
        for (norm, other) in [(&text.norm_q, &image.norm_q), (&text.norm_k, &image.norm_k)] {
            assert_eq!(norm.dims(), other.dims(), "norm weights of text and image");
        }
        let single = Self::of_tokens(image, tokens, heads, rotary);
        Self { epsilon, ..single }
    }

    fn single(stream: &QkvStream, heads: usize, rotary: &RotaryTable, epsilon: f32) -> Self {
        Self { epsilon, ..Self::of_tokens(stream, 0, heads, rotary) }
    }

    /// A stream behind so many tokens of another one like it.
    fn of_tokens(stream: &QkvStream, before: usize, heads: usize, rotary: &RotaryTable) -> Self {
        let [batch, tokens, width] = stream.qkv.dims();
        let dim = width / 3 / heads;
        assert_eq!(3 * heads * dim, width, "query, key and value of {heads} heads");
        let [normed] = stream.norm_q.dims();
        assert!([dim, heads * dim].contains(&normed), "{normed} norm weights, of heads of {dim}");
        assert_eq!(stream.norm_k.dims(), [normed], "norm weights of queries and keys");
        assert_eq!(rotary.pairs * 2, dim, "rotary pairs of a head");
        let (total, positions) = (before + tokens, rotary.positions());
        assert!(positions >= total, "{total} tokens have {positions} positions");
        let tokens = [before, tokens];
        Self { batch, heads, dim, normed, tokens, rotary: rotary.clone(), epsilon: 0.0 }
    }

    fn total(&self) -> usize {
        self.tokens[0] + self.tokens[1]
    }

    fn shape(&self) -> [usize; 5] {
        [3, self.batch, self.heads, self.total(), self.dim]
    }

    fn forward(&self, values: [&[f32]; 6]) -> Vec<f32> {
        let slab = self.total() * self.dim;
        let mut output = unwritten(3 * self.batch * self.heads * slab);
        parallel::for_each(output.chunks_mut(slab).enumerate(), |(index, slab)| {
            simd::vectorized(
                #[inline(always)]
                || {
                    let (text, image) = slab.split_at_mut(self.tokens[0] * self.dim);
                    self.fill(0, &values[..INPUTS], index, text);
                    self.fill(1, &values[INPUTS..], index, image);
                },
            );
        });
        output
    }

    /// Fills one stream's rows of slab `index`, which counts query, key, value, then samples, then heads.
    #[inline(always)]
    fn fill(&self, stream: usize, values: &[&[f32]], index: usize, output: &mut [f32]) {
        let (part, sample, head) =
            (index / self.heads / self.batch, index / self.heads % self.batch, index % self.heads);
        let first_position = stream * self.tokens[0];
        for (token, output) in output.chunks_exact_mut(self.dim).enumerate() {
            let row = sample * self.tokens[stream] + token;
            let x = chunk(values[QKV], (row * 3 + part) * self.heads + head, self.dim);
            let ahead = x.as_ptr().wrapping_add(TOKENS_AHEAD * 3 * self.heads * self.dim);
            simd::prefetch_lines(ahead, self.dim.div_ceil(simd::LINE));
            if part == 2 {
                output.copy_from_slice(x);
                continue;
            }
            let norm = values[NORM_Q + part];
            if self.normed == self.dim {
                rms_row(x, norm, self.epsilon, output);
            } else {
                let inverse = inverse_rms(chunk(values[QKV], row * 3 + part, self.normed), self.epsilon);
                let weights = chunk(norm, head, self.dim);
                for ((output, x), weight) in output.iter_mut().zip(x).zip(weights) {
                    *output = x * inverse * weight;
                }
            }
            self.rotary.rotate(first_position + token, output, 1.0);
        }
    }

    fn backward(&self, values: [&[f32]; 6], tracked: [bool; 6], gradient: &[f32]) -> [Option<Values>; 6] {
        let mut gradients = [const { None }; 6];
        for stream in 0..2 {
            let range = stream * INPUTS..(stream + 1) * INPUTS;
            if !tracked[range.clone()].contains(&true) {
                continue;
            }
            let (qkv, norms) = self.stream_backward(stream, &values[range.clone()], gradient);
            let shape = [self.batch, self.tokens[stream], 3 * self.heads * self.dim];
            let (norm_q, norm_k) = norms.split_at(self.normed);
            let found = [
                Values::from_vec(qkv, &shape),
                Values::from_vec(norm_q.to_vec(), &[self.normed]),
                Values::from_vec(norm_k.to_vec(), &[self.normed]),
            ];
            for (index, found) in range.zip(found) {
                gradients[index] = tracked[index].then_some(found);
            }
        }
        gradients
    }

    /// Gradients of one stream's projections and of its two norm weights, joined.
    fn stream_backward(&self, stream: usize, values: &[&[f32]], gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let width = 3 * self.heads * self.dim;
        let units = parallel::units(self.batch, self.tokens[stream], width);
        let mut output = unwritten(self.batch * self.tokens[stream] * width);
        let mut norms = vec![0.0; units.len() * 2 * self.normed];
        let pieces = parallel::pieces(&mut output, &units, width);
        let work = units.iter().zip(pieces).zip(norms.chunks_mut(2 * self.normed));
        parallel::for_each(work, |((unit, output), norms)| {
            simd::vectorized(
                #[inline(always)]
                || {
                    for (token, output) in unit.rows.clone().zip(output.chunks_exact_mut(width)) {
                        self.token_backward((stream, unit.sample, token), values, gradient, output, norms);
                    }
                },
            );
        });
        (output, parallel::sum_rows(&norms, 2 * self.normed))
    }

    /// `at` is stream, sample and token.
    #[inline(always)]
    fn token_backward(
        &self,
        at: (usize, usize, usize),
        values: &[&[f32]],
        gradient: &[f32],
        output: &mut [f32],
        norms: &mut [f32],
    ) {
        let (stream, sample, token) = at;
        let position = stream * self.tokens[0] + token;
        let x = chunk(values[QKV], sample * self.tokens[stream] + token, output.len());
        for (index, output) in output.chunks_exact_mut(self.dim).enumerate() {
            let (part, head) = (index / self.heads, index % self.heads);
            let slab = (part * self.batch + sample) * self.heads + head;
            let gradient = chunk(gradient, slab * self.total() + position, self.dim);
            let ahead = gradient.as_ptr().wrapping_add(TOKENS_AHEAD * self.dim);
            simd::prefetch_lines(ahead, self.dim.div_ceil(simd::LINE));
            output.copy_from_slice(gradient);
            if part < 2 {
                self.rotary.rotate(position, output, -1.0);
            }
        }
        let queries_and_keys = 2 * self.heads * self.dim;
        let rows = output[..queries_and_keys].chunks_exact_mut(self.normed);
        for (index, output) in rows.enumerate() {
            let part = index * self.normed / (self.heads * self.dim);
            let norm = &mut norms[part * self.normed..][..self.normed];
            let x = chunk(x, index, self.normed);
            rms_row_backward(x, values[NORM_Q + part], self.epsilon, output, norm);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Outcome, Probe, assert_agree, assert_derivative};
    use fewstep_testkit::{random_values, values};

    type Operation = fn(QkvStream, QkvStream, usize, &RotaryTable, f32) -> Tensor<5>;

    fn table(positions: usize, pairs: usize) -> RotaryTable {
        let angles = random_values(positions * pairs, 50);
        RotaryTable::new(
            angles.iter().map(|angle| angle.cos()).collect(),
            angles.iter().map(|angle| angle.sin()).collect(),
            pairs,
        )
    }

    fn run(
        operation: Operation,
        [batch, text, image]: [usize; 3],
        ([heads, dim], normed): ([usize; 2], usize),
        tracked: u32,
    ) -> Outcome {
        let mut probe = Probe::new();
        let mut stream = |tokens, bits: u32| QkvStream {
            qkv: probe.input([batch, tokens, 3 * heads * dim], bits & 1 != 0),
            norm_q: probe.input([normed], bits & 2 != 0),
            norm_k: probe.input([normed], bits & 4 != 0),
        };
        let (text_stream, image_stream) = (stream(text, tracked), stream(image, tracked >> 3));
        let output = operation(text_stream, image_stream, heads, &table(text + image, dim / 2), 1e-6);
        probe.finish(output)
    }

    #[test]
    fn a_table_is_sent_to_a_device_once_whether_it_records_or_not() {
        let table = table(3, 2);
        let sent = [Device::flex(), Device::flex().autodiff()].map(|device| table.clone().on(&device));
        assert_eq!(sent.each_ref().map(|[cos, _]| cos.device().is_autodiff()), [false, true]);
        let [first, second] = sent.map(|tables| tables.map(Values::detached));
        assert_eq!(first.each_ref().map(|values| values.as_ptr()), second.map(|values| values.as_ptr()));
        assert_eq!(first.map(|values| values.to_vec()), [table.cos.to_vec(), table.sin.to_vec()]);
    }

    #[test]
    fn joint_qkv_agrees_with_its_twin() {
        for (sizes, heads) in
            [([2, 7, 5], [3, 8]), ([1, 16, 64], [4, 64]), ([3, 1, 2], [1, 2]), ([2, 3, 9], [2, 22])]
        {
            for normed in [heads[1], heads[0] * heads[1]] {
                let fused = run(joint_qkv, sizes, (heads, normed), 0b111_111);
                // The norm weights' gradients sum over batch, tokens and heads.
                assert_agree(&fused, &run(plain::joint_qkv, sizes, (heads, normed), 0b111_111), 5e-6);
            }
        }
    }

    #[test]
    fn single_qkv_agrees_with_its_twin_whatever_is_tracked() {
        for (batch, tokens, [heads, dim]) in [(2, 7, [3, 8]), (1, 1, [2, 4]), (3, 80, [4, 64])] {
            for (normed, tracked) in
                [dim, heads * dim].into_iter().flat_map(|normed| (1..8).map(move |bits| (normed, bits)))
            {
                let run = |operation: fn(QkvStream, usize, &RotaryTable, f32) -> Tensor<5>| {
                    let mut probe = Probe::new();
                    let stream = QkvStream {
                        qkv: probe.input([batch, tokens, 3 * heads * dim], tracked & 1 != 0),
                        norm_q: probe.input([normed], tracked & 2 != 0),
                        norm_k: probe.input([normed], tracked & 4 != 0),
                    };
                    let output = operation(stream, heads, &table(tokens, dim / 2), 1e-6);
                    probe.finish(output)
                };
                assert_agree(&run(single_qkv), &run(plain::single_qkv), 5e-6);
            }
        }
    }

    #[test]
    fn untracked_inputs_get_no_gradient() {
        for tracked in [0b000_001, 0b001_000, 0b010_100, 0b110_001] {
            for heads in [([3, 8], 8), ([3, 8], 24)] {
                let fused = run(joint_qkv, [2, 7, 5], heads, tracked);
                assert_agree(&fused, &run(plain::joint_qkv, [2, 7, 5], heads, tracked), 5e-6);
            }
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        let (text, image, heads, dim) = (2, 3, 2, 4);
        let width = 3 * heads * dim;
        for normed in [dim, heads * dim] {
            assert_derivative((text + image) * width + 4 * normed, |flat| {
                let mut cut = Cutter::new(flat);
                let mut stream = |tokens| QkvStream {
                    qkv: cut.next([1, tokens, width]),
                    norm_q: cut.next([normed]),
                    norm_k: cut.next([normed]),
                };
                let (text_stream, image_stream) = (stream(text), stream(image));
                joint_qkv(text_stream, image_stream, heads, &table(text + image, dim / 2), 1e-5)
            });
        }
    }

    #[test]
    fn a_quarter_turn_moves_each_pair_counterclockwise() {
        let device = burn::tensor::Device::flex();
        let stream = |value: f32| QkvStream {
            qkv: Tensor::from_data([[[value, 0.0, 0.0, value, 5.0, 6.0]]], &device),
            norm_q: Tensor::ones([2], &device),
            norm_k: Tensor::ones([2], &device),
        };
        // The text's token stands still, the image's turns by 90 degrees.
        let rotary = RotaryTable::new(vec![1.0, 0.0], vec![0.0, 1.0], 1);
        let joint = values(joint_qkv(stream(3.0), stream(2.0), 1, &rotary, 0.0));
        let one = 2.0_f32.sqrt();
        fewstep_testkit::assert_close(
            &joint,
            // Query, key and value, the text's token first: the norm makes each row's mean square one.
            &[one, 0.0, 0.0, one, 0.0, one, -one, 0.0, 5.0, 6.0, 5.0, 6.0],
            1e-6,
        );
    }
}
