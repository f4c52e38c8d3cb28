//! Softmax attention without a stored score matrix: forward and backward work on blocks of query rows, and only the
//! logarithm of each row's sum of exponentials is kept between them (FlashAttention, arXiv 2205.14135, without its
//! tiling over keys).

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::matmul::{Matrix, MatrixMut, Output, multiply};
use crate::recompute::{Price, computed_once};
use crate::{parallel, plain, simd};

/// Query rows whose scores exist at one time.
const BLOCK: usize = 128;

/// Which keys the queries see. By default all.
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// Hides padding.
    pub keys: Option<KeyMask>,
    /// Hides keys behind the query.
    pub causal: bool,
}

/// Hides the padding between a sample's last text token and its first image token.
#[derive(Clone, Debug)]
pub struct KeyMask {
    lengths: Arc<[usize]>,
    text: usize,
    image: usize,
}

impl KeyMask {
    /// Key `j` of sample `b` is visible if `j < text_lengths[b]` or `j >= text`.
    pub fn from_lengths(text_lengths: &[usize], text: usize, image: usize) -> Self {
        for (sample, length) in text_lengths.iter().enumerate() {
            assert!(*length <= text, "sample {sample} has {length} of {text} text tokens");
        }
        Self { lengths: text_lengths.into(), text, image }
    }

    /// The hidden keys of one sample.
    pub(crate) fn hidden(&self, sample: usize) -> Range<usize> {
        self.lengths[sample]..self.text
    }

    fn check(&self, batch: usize, tokens: usize) {
        assert_eq!(self.lengths.len(), batch, "samples of the key mask");
        assert_eq!(self.text + self.image, tokens, "tokens of the key mask");
    }
}

/// `softmax(q kᵀ / √E) v` over the visible keys. A query that sees no key gives zeros.
///
/// # Shapes
/// - `qkv`: `[3, batch, heads, tokens, E]`, as [`crate::joint_qkv`] makes it
/// - returns: `[batch, tokens, heads · E]`
pub fn attention(qkv: Tensor<5>, options: AttentionOptions) -> Tensor<3> {
    let [three, batch, heads, tokens, dim] = qkv.dims();
    assert_eq!(three, 3, "query, key and value");
    if let Some(keys) = &options.keys {
        keys.check(batch, tokens);
    }
    if !is_fused(&qkv) {
        return plain::attention(qkv, options);
    }
    let attention = Attention { batch, heads, queries: tokens, keys: tokens, dim, options };
    operation([Input::new(qkv)], |[qkv], _| {
        let [output, log_sums] = computed_once(Price::High, || attention.forward(thirds(&qkv)));
        let pullback: Pullback<1> = Box::new(move |gradient| {
            let mut output = unwritten(qkv.len());
            let (query, rest) = output.split_at_mut(qkv.len() / 3);
            let (key, value) = rest.split_at_mut(qkv.len() / 3);
            attention.backward(thirds(&qkv), &log_sums, &gradient, [query, key, value]);
            [Some(Values::from_vec(output, &[3, batch, heads, tokens, dim]))]
        });
        (output, pullback)
    })
}

fn thirds(qkv: &[f32]) -> [&[f32]; 3] {
    [0, 1, 2].map(|part| &qkv[part * qkv.len() / 3..][..qkv.len() / 3])
}

/// `softmax(q kᵀ / √E) v`, the keys being of another sequence than the queries; all are visible.
///
/// # Shapes
/// - `query`: `[batch, queries, heads · E]`
/// - `key`, `value`: `[batch, keys, heads · E]`
/// - returns: `[batch, queries, heads · E]`
pub fn cross_attention(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>, heads: usize) -> Tensor<3> {
    let ([batch, queries, width], [_, keys, _]) = (query.dims(), key.dims());
    assert_eq!((key.dims(), value.dims()), ([batch, keys, width], [batch, keys, width]), "keys and values");
    assert!(width.is_multiple_of(heads), "{width} elements of {heads} heads");
    if !is_fused(&query) {
        return plain::cross_attention(query, key, value, heads);
    }
    let (dim, options) = (width / heads, AttentionOptions::default());
    let attention = Attention { batch, heads, queries, keys, dim, options };
    operation([query, key, value].map(Input::new), |[query, key, value], tracked| {
        let apart = [query, key, value].map(|x| attention.apart(&x));
        let [output, log_sums] =
            computed_once(Price::Usual, || attention.forward(apart.each_ref().map(Vec::as_slice)));
        let pullback: Pullback<3> = Box::new(move |gradient| {
            let mut found = apart.each_ref().map(|x| unwritten(x.len()));
            let slices = found.each_mut().map(Vec::as_mut_slice);
            attention.backward(apart.each_ref().map(Vec::as_slice), &log_sums, &gradient, slices);
            let [query, key, value] = found;
            [(query, tracked[0]), (key, tracked[1]), (value, tracked[2])].map(|(found, tracked)| {
                let shape = [batch, found.len() / batch / width, width];
                tracked.then(|| Values::from_vec(attention.joined(&found), &shape))
            })
        });
        (output, pullback)
    })
}

struct Attention {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    dim: usize,
    options: AttentionOptions,
}

impl Attention {
    /// The output, and the log-sum-exp of each query row as `[batch, heads, queries]`.
    fn forward(&self, qkv: [&[f32]; 3]) -> [Values; 2] {
        let Self { batch, heads, queries, keys, dim, .. } = *self;
        let mut output = unwritten(batch * queries * heads * dim);
        let mut log_sums = unwritten(batch * heads * queries);
        parallel::for_each(self.pieces(&mut output, &mut log_sums), |piece| {
            let Piece { sample, head, rows, output, log_sums } = piece;
            let mut scores = unwritten(rows.len() * keys);
            let [query, key, value] = self.slabs(qkv, sample, head);
            self.scores(&query[rows.start * dim..], key, &mut scores);
            self.softmax(sample, rows.clone(), &mut scores, log_sums);
            let (weights, value) = (Matrix::new(&scores, rows.len(), keys), Matrix::new(value, keys, dim));
            multiply((output, Output::Overwrite), 1.0, weights, value);
        });
        [
            Values::from_vec(output, &[batch, queries, heads * dim]),
            Values::from_vec(log_sums, &[batch, heads, queries]),
        ]
    }

    /// Shares output and log-sum-exps out among blocks of queries of every head.
    fn pieces<'a>(&self, output: &'a mut [f32], log_sums: &'a mut [f32]) -> Vec<Piece<'a>> {
        let Self { heads, queries, dim, .. } = *self;
        let mut pieces = Vec::new();
        let samples = output.chunks_exact_mut(queries * heads * dim);
        for (sample, (output, log_sums)) in
            samples.zip(log_sums.chunks_exact_mut(heads * queries)).enumerate()
        {
            let mut other_heads = MatrixMut::new(output, queries, heads * dim);
            for (head, log_sums) in log_sums.chunks_exact_mut(queries).enumerate() {
                let (mut other_rows, rest) = other_heads.split_columns(dim);
                other_heads = rest;
                for (block, log_sums) in log_sums.chunks_mut(BLOCK).enumerate() {
                    let (output, rest) = other_rows.split_rows(log_sums.len());
                    other_rows = rest;
                    let rows = block * BLOCK..block * BLOCK + log_sums.len();
                    pieces.push(Piece { sample, head, rows, output, log_sums });
                }
            }
        }
        pieces
    }

    /// Query, key and value of one head, `[tokens, dim]` each, of `[batch, heads, tokens, dim]`.
    fn slabs<'a>(&self, qkv: [&'a [f32]; 3], sample: usize, head: usize) -> [&'a [f32]; 3] {
        qkv.map(|part| {
            let size = part.len() / (self.batch * self.heads);
            &part[(sample * self.heads + head) * size..][..size]
        })
    }

    /// `[batch, tokens, heads · dim]` to `[batch, heads, tokens, dim]`.
    fn apart(&self, x: &[f32]) -> Vec<f32> {
        let Self { batch, heads, dim, .. } = *self;
        let tokens = x.len() / (batch * heads * dim);
        let mut output = unwritten(x.len());
        parallel::for_each(output.chunks_mut(tokens * dim).enumerate(), |(slab, output)| {
            let (sample, head) = (slab / heads, slab % heads);
            for (token, output) in output.chunks_exact_mut(dim).enumerate() {
                output.copy_from_slice(&x[((sample * tokens + token) * heads + head) * dim..][..dim]);
            }
        });
        output
    }

    /// Inverse of [`Attention::apart`].
    fn joined(&self, x: &[f32]) -> Vec<f32> {
        let Self { batch, heads, dim, .. } = *self;
        let tokens = x.len() / (batch * heads * dim);
        let mut output = unwritten(x.len());
        parallel::for_each(output.chunks_mut(heads * dim).enumerate(), |(row, output)| {
            let (sample, token) = (row / tokens, row % tokens);
            for (head, output) in output.chunks_exact_mut(dim).enumerate() {
                output.copy_from_slice(&x[((sample * heads + head) * tokens + token) * dim..][..dim]);
            }
        });
        output
    }

    /// `query keyᵀ / √E` for as many query rows as `scores` has room for.
    fn scores(&self, query: &[f32], key: &[f32], scores: &mut [f32]) {
        let rows = scores.len() / self.keys;
        let query = Matrix::new(query, rows, self.dim);
        let key = Matrix::new(key, self.keys, self.dim).transposed();
        let scores = MatrixMut::new(scores, rows, self.keys);
        multiply((scores, Output::Overwrite), self.scale(), query, key);
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// The keys that one query sees: those before the padding and those after it.
    #[inline(always)]
    fn visible(&self, sample: usize, query: usize) -> [Range<usize>; 2] {
        let end = if self.options.causal { query + 1 } else { self.keys };
        match &self.options.keys {
            None => [0..end, end..end],
            Some(keys) => {
                let hidden = keys.hidden(sample);
                [0..hidden.start.min(end), hidden.end.min(end)..end]
            }
        }
    }

    /// Turns scores of some queries into weights, row by row.
    fn softmax(&self, sample: usize, queries: Range<usize>, scores: &mut [f32], log_sums: &mut [f32]) {
        let rows = scores.chunks_exact_mut(self.keys).zip(queries).zip(log_sums);
        simd::vectorized(
            #[inline(always)]
            || {
                for ((row, query), log_sum) in rows {
                    *log_sum = softmax_row(row, self.visible(sample, query));
                }
            },
        );
    }

    /// Writes the gradients of query, key and value, in the layout of these.
    fn backward(&self, qkv: [&[f32]; 3], log_sums: &[f32], gradient: &[f32], output: [&mut [f32]; 3]) {
        let Self { heads, queries, keys, dim, .. } = *self;
        let [query, key, value] = output;
        let (of_query, of_key) = (queries * dim, keys * dim);
        let slabs = query.chunks_mut(of_query).zip(key.chunks_mut(of_key));
        parallel::for_each(
            slabs.zip(value.chunks_mut(of_key)).enumerate(),
            |(index, ((query, key), value))| {
                let (sample, head) = (index / heads, index % heads);
                let head = Head {
                    attention: self,
                    sample,
                    qkv: self.slabs(qkv, sample, head),
                    gradient: &gradient[sample * heads * of_query + head * dim..],
                    log_sums: &log_sums[index * queries..][..queries],
                };
                head.backward(query, key, value);
            },
        );
    }
}

/// Some queries of one head of one sample, for the forward.
struct Piece<'a> {
    sample: usize,
    head: usize,
    rows: Range<usize>,
    output: MatrixMut<'a>,
    log_sums: &'a mut [f32],
}

/// Weights of one row; gives its log-sum-exp.
#[inline(always)]
fn softmax_row(row: &mut [f32], visible: [Range<usize>; 2]) -> f32 {
    let [first, second] = visible;
    let largest = simd::max(&row[first.clone()]).max(simd::max(&row[second.clone()]));
    let mut total = 0.0;
    for range in [first.clone(), second.clone()] {
        let scores = &mut row[range];
        for score in scores.iter_mut() {
            *score = simd::exp(*score - largest);
        }
        total += simd::sum(scores);
    }
    let inverse = 1.0 / total;
    row[first.clone()].iter_mut().for_each(|weight| *weight *= inverse);
    row[second.clone()].iter_mut().for_each(|weight| *weight *= inverse);
    hide(row, [first, second]);
    largest + total.ln()
}

/// Writes zeros wherever the query does not see.
#[inline(always)]
fn hide(row: &mut [f32], [first, second]: [Range<usize>; 2]) {
    row[first.end..second.start].fill(0.0);
    row[second.end..].fill(0.0);
}

/// One head of one sample, for the backward.
struct Head<'a> {
    attention: &'a Attention,
    sample: usize,
    qkv: [&'a [f32]; 3],
    /// Of the output, from this head's first column on; rows are `heads · dim` apart.
    gradient: &'a [f32],
    /// Of each query.
    log_sums: &'a [f32],
}

impl Head<'_> {
    /// Writes the gradients of query, key and value.
    fn backward(&self, query: &mut [f32], key: &mut [f32], value: &mut [f32]) {
        let Attention { queries: all, keys: seen, dim, .. } = *self.attention;
        let mut scratch = (unwritten(BLOCK.min(all) * seen), unwritten(BLOCK.min(all) * seen));
        let mut mode = Output::Overwrite;
        for start in (0..all).step_by(BLOCK) {
            let rows = start..all.min(start + BLOCK);
            let count = rows.len();
            let (weights, scores) = (&mut scratch.0[..count * seen], &mut scratch.1[..count * seen]);
            self.score_gradients(rows, weights, scores);
            let (weights, scores) = (Matrix::new(weights, count, seen), Matrix::new(scores, count, seen));
            let queries = Matrix::new(&self.qkv[0][start * dim..], count, dim);
            let keys = Matrix::new(self.qkv[1], seen, dim);
            let into = MatrixMut::new(&mut query[start * dim..], count, dim);
            multiply((into, Output::Overwrite), 1.0, scores, keys);
            let into = MatrixMut::new(key, seen, dim);
            multiply((into, mode), 1.0, scores.transposed(), queries);
            let into = MatrixMut::new(value, seen, dim);
            multiply((into, mode), 1.0, weights.transposed(), self.output_gradient(start, count));
            mode = Output::Accumulate;
        }
    }

    fn output_gradient(&self, start: usize, count: usize) -> Matrix<'_> {
        let width = self.attention.heads * self.attention.dim;
        Matrix::strided(&self.gradient[start * width..], count, self.attention.dim, width)
    }

    /// The weights again, and the gradient of the unscaled scores `q kᵀ`.
    fn score_gradients(&self, rows: Range<usize>, weights: &mut [f32], scores: &mut [f32]) {
        let Attention { keys, dim, .. } = *self.attention;
        let scale = self.attention.scale();
        self.attention.scores(&self.qkv[0][rows.start * dim..], self.qkv[1], weights);
        let value = Matrix::new(self.qkv[2], keys, dim).transposed();
        let into = MatrixMut::new(scores, rows.len(), keys);
        multiply((into, Output::Overwrite), 1.0, self.output_gradient(rows.start, rows.len()), value);
        let lines = weights.chunks_exact_mut(keys).zip(scores.chunks_exact_mut(keys)).zip(rows);
        simd::vectorized(
            #[inline(always)]
            || {
                for ((weights, scores), query) in lines {
                    let visible = self.attention.visible(self.sample, query);
                    score_gradient_row(weights, scores, visible, self.log_sums[query], scale);
                }
            },
        );
    }
}

/// `weights` holds scores and `gradient` that of the weights; they become the weights and the scores' gradient.
#[inline(always)]
fn score_gradient_row(
    weights: &mut [f32],
    gradient: &mut [f32],
    visible: [Range<usize>; 2],
    log_sum: f32,
    scale: f32,
) {
    let mut mean = 0.0;
    for range in visible.clone() {
        let weights = &mut weights[range.clone()];
        weights.iter_mut().for_each(|score| *score = simd::exp(*score - log_sum));
        mean += simd::dot(weights, &gradient[range]);
    }
    for range in visible.clone() {
        for (gradient, weight) in gradient[range.clone()].iter_mut().zip(&weights[range]) {
            *gradient = weight * (*gradient - mean) * scale;
        }
    }
    hide(weights, visible.clone());
    hide(gradient, visible);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Outcome, Probe, assert_agree, assert_derivative};

    /// Different summation orders over up to 300 keys.
    const TOLERANCE: f32 = 5e-6;

    fn run(
        operation: fn(Tensor<5>, AttentionOptions) -> Tensor<3>,
        shape: [usize; 4],
        options: &AttentionOptions,
    ) -> Outcome {
        let [batch, heads, tokens, dim] = shape;
        let mut probe = Probe::new();
        let qkv = probe.tracked([3, batch, heads, tokens, dim]);
        let output = operation(qkv, options.clone());
        probe.finish(output)
    }

    fn masked(lengths: &[usize], text: usize, image: usize, causal: bool) -> AttentionOptions {
        AttentionOptions { keys: Some(KeyMask::from_lengths(lengths, text, image)), causal }
    }

    #[test]
    fn attention_agrees_with_its_twin() {
        for causal in [false, true] {
            let options = AttentionOptions { keys: None, causal };
            for shape in [[2, 3, 12, 8], [1, 1, 1, 5], [2, 2, 33, 24], [1, 2, 300, 7]] {
                let fused = run(attention, shape, &options);
                assert_agree(&fused, &run(plain::attention, shape, &options), TOLERANCE);
            }
        }
    }

    #[test]
    fn masked_attention_agrees_with_its_twin() {
        for causal in [false, true] {
            // Text of 7 tokens, of which 0, 3 and 7 are real; 5 image tokens.
            let options = masked(&[0, 3, 7], 7, 5, causal);
            let fused = run(attention, [3, 2, 12, 8], &options);
            assert_agree(&fused, &run(plain::attention, [3, 2, 12, 8], &options), TOLERANCE);
        }
    }

    #[test]
    fn cross_attention_agrees_with_its_twin_whatever_is_tracked() {
        for ([batch, queries, keys], [heads, dim]) in
            [([2, 7, 5], [3, 8]), ([1, 1, 1], [1, 5]), ([1, 300, 33], [2, 7]), ([2, 3, 140], [2, 16])]
        {
            for tracked in 1..8 {
                let run = |operation: fn(Tensor<3>, Tensor<3>, Tensor<3>, usize) -> Tensor<3>| {
                    let mut probe = Probe::new();
                    let mut input =
                        |tokens, bit: u32| probe.input([batch, tokens, heads * dim], tracked >> bit & 1 == 1);
                    let (query, key, value) = (input(queries, 0), input(keys, 1), input(keys, 2));
                    let output = operation(query, key, value, heads);
                    probe.finish(output)
                };
                assert_agree(&run(cross_attention), &run(plain::cross_attention), TOLERANCE);
            }
        }
    }

    #[test]
    fn cross_attention_gradients_are_the_slopes_of_the_values() {
        let (queries, keys, heads, dim) = (3, 5, 2, 4);
        assert_derivative((queries + 2 * keys) * heads * dim, |flat| {
            let mut cut = crate::testing::Cutter::new(flat);
            let mut next = |tokens| cut.next([1, tokens, heads * dim]);
            let (query, key, value) = (next(queries), next(keys), next(keys));
            cross_attention(query, key, value, heads)
        });
    }

    #[test]
    fn hidden_keys_and_values_get_no_gradient_and_move_nothing() {
        let (heads, tokens, dim) = (2, 12, 8);
        let options = masked(&[3], 7, 5, false);
        let outcome = run(attention, [1, heads, tokens, dim], &options);
        let gradient = outcome.gradients[0].as_ref().unwrap();
        for (part, head, token) in [(1, 0, 3), (1, 1, 6), (2, 0, 5), (2, 1, 3)] {
            let row = chunk(gradient, (part * heads + head) * tokens + token, dim);
            assert!(
                row.iter().all(|value| *value == 0.0),
                "part {part}, head {head}, token {token}: {row:?}"
            );
        }
        let qkv = fewstep_testkit::random::<5>([3, 1, heads, tokens, dim], 0, &burn::tensor::Device::flex());
        let hidden = qkv.clone().slice_fill([1..3, 0..1, 0..heads, 3..7, 0..dim], 100.0);
        let moved = fewstep_testkit::values(attention(hidden, options.clone()));
        assert_eq!(moved, outcome.output);
    }

    #[test]
    fn a_query_without_visible_keys_gives_zeros() {
        let outcome = run(attention, [1, 2, 6, 8], &masked(&[0], 6, 0, false));
        assert!(outcome.output.iter().all(|value| *value == 0.0));
        assert!(outcome.gradients[0].as_ref().unwrap().iter().all(|value| *value == 0.0));
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let qkv =
            fewstep_testkit::random::<5>([3, 1, 1, 9, 4], 0, &burn::tensor::Device::flex()).mul_scalar(100.0);
        let output = fewstep_testkit::values(attention(qkv.clone(), AttentionOptions::default()));
        let expected = fewstep_testkit::values(plain::attention(qkv, AttentionOptions::default()));
        // Scores near 1e4 carry a rounding error near 1e-3, and values are near 100.
        fewstep_testkit::assert_close(&output, &expected, 0.3);
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        for options in [AttentionOptions::default(), masked(&[1, 3], 4, 3, true)] {
            assert_derivative(3 * 2 * 2 * 7 * 4, |flat| {
                attention(flat.reshape([3, 2, 2, 7, 4]), options.clone())
            });
        }
    }

    #[test]
    fn repeated_runs_give_the_same_bits() {
        let once = || run(attention, [3, 4, 80, 64], &AttentionOptions::default());
        assert_eq!(once(), once());
    }

    fn chunk(values: &[f32], index: usize, width: usize) -> &[f32] {
        crate::norm::chunk(values, index, width)
    }
}
