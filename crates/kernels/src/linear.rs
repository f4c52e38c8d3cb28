//! Linear layers with bias and low-rank branch in one operation, alone or several side by side.
//!
//! A frozen weight costs neither its gradient nor the memory of the input that the gradient would need, and may be kept
//! in bf16 or f16: it is widened to f32 in a buffer that is used again, and the arithmetic is f32 throughout.

use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::matmul::{Cores, Matrix, MatrixMut, Output, multiply};
use crate::weight::{HalfType, with_f32, with_transpose};
use crate::{parallel, plain, simd};

/// A low-rank branch added to a linear layer: `scale · (x downᵀ) upᵀ`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, input]`, LoRA's A.
    pub down: Tensor<2>,
    /// `[output, rank]`, LoRA's B.
    pub up: Tensor<2>,
    /// LoRA's alpha divided by the rank.
    pub scale: f32,
}

/// The parameters of one linear layer.
#[derive(Clone, Debug)]
pub struct Projection {
    /// `[output, input]`, torch's layout; f32, or where it is frozen also bf16 or f16.
    pub weight: Tensor<2>,
    /// Computes with the weight's nearest numbers of this type. Its gradient is theirs: the rounding passes it on.
    pub rounded_to: Option<HalfType>,
    /// `[output]`
    pub bias: Option<Tensor<1>>,
    /// The adapter, if there is one.
    pub low_rank: Option<LowRank>,
}

/// `x Wᵀ + b + scale (x Aᵀ) Bᵀ`.
///
/// # Shapes
/// - `x`: `[.., input]`
/// - returns: `[.., output]`
pub fn linear<const D: usize>(x: Tensor<D>, projection: Projection) -> Tensor<D> {
    if !is_fused(&x) {
        return plain::linear(x, projection);
    }
    project::<1, 5, D>(x, [projection])
}

/// Three linear layers of the same input (query, key, value) with their outputs side by side on the last axis.
///
/// # Shapes
/// - `x`: `[.., input]`
/// - returns: `[.., output 0 + output 1 + output 2]`
pub fn linear_concat<const D: usize>(x: Tensor<D>, projections: [Projection; 3]) -> Tensor<D> {
    if !is_fused(&x) {
        return plain::linear_concat(x, projections);
    }
    project::<3, 13, D>(x, projections)
}

/// `N` is the number of inputs: x, and [`INPUTS`] for each projection.
fn project<const P: usize, const N: usize, const D: usize>(
    x: Tensor<D>,
    projections: [Projection; P],
) -> Tensor<D> {
    let input_shape = x.dims();
    let layout = Layout::new(&input_shape, &projections);
    let mut shape = input_shape;
    shape[D - 1] = layout.width;
    let mut inputs = vec![Input::new(x)];
    for Projection { weight, bias, low_rank, rounded_to: _ } in projections {
        let (down, up) = low_rank.map(|branch| (branch.down, branch.up)).unzip();
        inputs.extend([
            Input::new(weight),
            Input::optional(bias),
            Input::optional(down),
            Input::optional(up),
        ]);
    }
    let inputs: [Input; N] = inputs.try_into().unwrap_or_else(|_| unreachable!("N is 1 + {INPUTS} P"));
    operation(inputs, |values, tracked| {
        let (output, hidden) = forward(&layout, &values);
        let saved = Saved::new(layout, values, hidden, tracked);
        let pullback: Pullback<N> = Box::new(move |gradient| saved.pull_back(&gradient, &input_shape));
        (Values::from_vec(output, &shape), pullback)
    })
}

/// Tensors of one projection, in the order of these indices.
const INPUTS: usize = 4;
const WEIGHT: usize = 0;
const BIAS: usize = 1;
const DOWN: usize = 2;
const UP: usize = 3;

/// Sizes and column ranges of the projections.
struct Layout {
    rows: usize,
    input: usize,
    /// Sum of the outputs.
    width: usize,
    parts: Vec<Part>,
}

struct Part {
    first_column: usize,
    output: usize,
    has_bias: bool,
    low_rank: Option<Branch>,
    rounded_to: Option<HalfType>,
}

#[derive(Clone, Copy)]
struct Branch {
    rank: usize,
    scale: f32,
}

impl Layout {
    fn new(shape: &[usize], projections: &[Projection]) -> Self {
        let (input, leading) = shape.split_last().expect("a tensor has axes");
        let (input, rows) = (*input, leading.iter().product());
        let mut width = 0;
        let parts = projections.iter().map(|projection| {
            let part = Part::new(projection, input, width);
            width += part.output;
            part
        });
        let parts = parts.collect();
        Self { rows, input, width, parts }
    }

    /// The part's columns of a matrix as wide as all outputs.
    fn columns<'a>(&self, part: &Part, matrix: &'a [f32]) -> Matrix<'a> {
        Matrix::strided(&matrix[part.first_column..], self.rows, part.output, self.width)
    }

    fn column_sums(&self, part: &Part, matrix: &[f32]) -> Vec<f32> {
        parallel::column_sums(matrix, self.width, part.first_column..part.first_column + part.output)
    }
}

impl Part {
    fn new(projection: &Projection, input: usize, first_column: usize) -> Self {
        let [output, weight_input] = projection.weight.dims();
        assert_eq!(weight_input, input, "weight [{output}, {weight_input}] meets an input of width {input}");
        let dtype = projection.weight.dtype();
        assert!(dtype == DType::F32 || !projection.weight.is_tracked(), "{dtype:?} weight that learns");
        if let Some(bias) = &projection.bias {
            assert_eq!(bias.dims(), [output], "bias of a weight [{output}, {input}]");
        }
        let low_rank = projection.low_rank.as_ref().map(|LowRank { down, up, scale }| {
            let [rank, _] = down.dims();
            assert_eq!((down.dims(), up.dims()), ([rank, input], [output, rank]), "low-rank branch");
            Branch { rank, scale: *scale }
        });
        let (has_bias, rounded_to) = (projection.bias.is_some(), projection.rounded_to);
        Self { first_column, output, has_bias, low_rank, rounded_to }
    }
}

/// The output, and `x downᵀ` of each projection (empty where it has no branch).
fn forward(layout: &Layout, values: &[Values]) -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut output = unwritten(layout.rows * layout.width);
    let mode = match joined_bias(layout, values) {
        Some(bias) => {
            fill_rows(&mut output, &bias);
            Output::Accumulate
        }
        None => Output::Overwrite,
    };
    let x = Matrix::new(&values[0], layout.rows, layout.input);
    let parts = layout.parts.iter().zip(values[1..].chunks_exact(INPUTS));
    let hidden = parts.map(|(part, tensors)| {
        let target = &mut output[part.first_column..];
        add_product(layout, part, &values[0], &tensors[WEIGHT], (target, mode));
        part.low_rank.map(|branch| add_branch(layout, (part, branch), x, tensors, target)).unwrap_or_default()
    });
    let hidden = hidden.collect();
    (output, hidden)
}

/// The part's `x Wᵀ` in its columns of the output.
fn add_product(
    layout: &Layout,
    part: &Part,
    x: &[f32],
    weight: &Values,
    (target, mode): (&mut [f32], Output),
) {
    if layout.rows <= FEW_ROWS {
        return with_f32(weight, part.rounded_to, |weight| few_rows(layout, x, weight, (target, mode)));
    }
    let x = Matrix::new(x, layout.rows, layout.input);
    let columns = MatrixMut::strided(target, layout.rows, part.output, layout.width);
    with_transpose(weight, part.rounded_to, [part.output, layout.input], |weight| {
        let weight = Matrix::new(weight, layout.input, part.output);
        multiply((columns, mode), 1.0, x, weight, Cores::All);
    });
}

/// Rows of x up to which a product is as fast as its weight is read, once and as it lies.
const FEW_ROWS: usize = 8;

/// Rows of a weight that one piece of work reads.
const WEIGHT_ROWS: usize = 64;

/// `x Wᵀ` for few rows of x, by inner products.
fn few_rows(layout: &Layout, x: &[f32], weight: &[f32], (target, mode): (&mut [f32], Output)) {
    let Layout { rows, input, width, .. } = *layout;
    let outputs = weight.len() / input;
    let mut products = unwritten(outputs * rows);
    let pieces = products.par_chunks_mut(WEIGHT_ROWS * rows).zip(weight.par_chunks(WEIGHT_ROWS * input));
    pieces.for_each(|(products, weights)| {
        for (products, weights) in products.chunks_exact_mut(rows).zip(weights.chunks_exact(input)) {
            for (product, x) in products.iter_mut().zip(x.chunks_exact(input)) {
                *product = simd::dot(x, weights);
            }
        }
    });
    for (row, target) in target.chunks_mut(width).enumerate().take(rows) {
        for (target, products) in target.iter_mut().zip(products.chunks_exact(rows)) {
            let before = if mode == Output::Accumulate { *target } else { 0.0 };
            *target = before + products[row];
        }
    }
}

/// The biases side by side, zeros where a projection has none; nothing if none has.
fn joined_bias(layout: &Layout, values: &[Values]) -> Option<Vec<f32>> {
    if !layout.parts.iter().any(|part| part.has_bias) {
        return None;
    }
    let mut joined = vec![0.0; layout.width];
    for (part, tensors) in layout.parts.iter().zip(values[1..].chunks_exact(INPUTS)) {
        if part.has_bias {
            joined[part.first_column..][..part.output].copy_from_slice(&tensors[BIAS]);
        }
    }
    Some(joined)
}

fn fill_rows(output: &mut [f32], row: &[f32]) {
    parallel::for_row_blocks(output, row.len(), |_, rows| {
        rows.chunks_exact_mut(row.len()).for_each(|target| target.copy_from_slice(row));
    });
}

/// Adds the low-rank branch to the part's columns of `target`; gives `x downᵀ`.
fn add_branch(
    layout: &Layout,
    at: (&Part, Branch),
    x: Matrix,
    tensors: &[Values],
    target: &mut [f32],
) -> Vec<f32> {
    let (part, Branch { rank, scale }) = at;
    let down = Matrix::new(&tensors[DOWN], rank, layout.input).transposed();
    let up = Matrix::new(&tensors[UP], part.output, rank).transposed();
    let hidden = product(layout.rows, rank, 1.0, x, down);
    let columns = MatrixMut::strided(target, layout.rows, part.output, layout.width);
    multiply((columns, Output::Accumulate), scale, Matrix::new(&hidden, layout.rows, rank), up, Cores::All);
    hidden
}

/// `scale · left · right` in a new buffer.
fn product(rows: usize, columns: usize, scale: f32, left: Matrix, right: Matrix) -> Vec<f32> {
    let mut output = unwritten(rows * columns);
    multiply((MatrixMut::new(&mut output, rows, columns), Output::Overwrite), scale, left, right, Cores::All);
    output
}

/// What the pullback needs.
struct Saved<const N: usize> {
    layout: Layout,
    values: [Values; N],
    hidden: Vec<Vec<f32>>,
    tracked: [bool; N],
}

impl<const N: usize> Saved<N> {
    /// Lets go of the input and of `x downᵀ` where no tracked weight needs them.
    fn new(layout: Layout, mut values: [Values; N], mut hidden: Vec<Vec<f32>>, tracked: [bool; N]) -> Self {
        let projections = || tracked[1..].chunks_exact(INPUTS);
        if !projections().any(|tracked| tracked[WEIGHT] || tracked[DOWN]) {
            values[0] = Values::from_vec(Vec::new(), &[0]);
        }
        for (hidden, tracked) in hidden.iter_mut().zip(projections()) {
            if !tracked[UP] {
                *hidden = Vec::new();
            }
        }
        Self { layout, values, hidden, tracked }
    }

    fn pull_back(&self, gradient: &[f32], input_shape: &[usize]) -> [Option<Values>; N] {
        let mut gradients = [const { None }; N];
        let mut inner = Vec::new();
        for index in 0..self.layout.parts.len() {
            inner.push(self.inner_gradient(index, gradient));
            let target = &mut gradients[1 + index * INPUTS..][..INPUTS];
            self.parameter_gradients(index, gradient, &inner[index], target);
        }
        gradients[0] =
            self.tracked[0].then(|| Values::from_vec(self.input_gradient(gradient, &inner), input_shape));
        gradients
    }

    fn tensors(&self, index: usize) -> &[Values] {
        &self.values[1 + index * INPUTS..][..INPUTS]
    }

    /// The gradient of `x downᵀ`; empty without a branch.
    fn inner_gradient(&self, index: usize, gradient: &[f32]) -> Vec<f32> {
        let part = &self.layout.parts[index];
        let Some(Branch { rank, scale }) = part.low_rank else { return Vec::new() };
        let up = Matrix::new(&self.tensors(index)[UP], part.output, rank);
        product(self.layout.rows, rank, scale, self.layout.columns(part, gradient), up)
    }

    fn parameter_gradients(
        &self,
        index: usize,
        gradient: &[f32],
        inner: &[f32],
        into: &mut [Option<Values>],
    ) {
        let (part, tracked) = (&self.layout.parts[index], &self.tracked[1 + index * INPUTS..][..INPUTS]);
        let (rows, input, output) = (self.layout.rows, self.layout.input, part.output);
        let x = || Matrix::new(&self.values[0], rows, input);
        let columns = self.layout.columns(part, gradient).transposed();
        if tracked[WEIGHT] {
            let weight = product(output, input, 1.0, columns, x());
            into[WEIGHT] = Some(Values::from_vec(weight, &[output, input]));
        }
        if tracked[BIAS] {
            let bias = self.layout.column_sums(part, gradient);
            into[BIAS] = Some(Values::from_vec(bias, &[output]));
        }
        let Some(Branch { rank, scale }) = part.low_rank else { return };
        if tracked[DOWN] {
            let down = product(rank, input, 1.0, Matrix::new(inner, rows, rank).transposed(), x());
            into[DOWN] = Some(Values::from_vec(down, &[rank, input]));
        }
        if tracked[UP] {
            let up = product(output, rank, scale, columns, Matrix::new(&self.hidden[index], rows, rank));
            into[UP] = Some(Values::from_vec(up, &[output, rank]));
        }
    }

    fn input_gradient(&self, gradient: &[f32], inner: &[Vec<f32>]) -> Vec<f32> {
        let Layout { rows, input, .. } = self.layout;
        let mut output = unwritten(rows * input);
        let mut mode = Output::Overwrite;
        for (index, part) in self.layout.parts.iter().enumerate() {
            let tensors = self.tensors(index);
            let columns = self.layout.columns(part, gradient);
            with_f32(&tensors[WEIGHT], part.rounded_to, |weight| {
                let weight = Matrix::new(weight, part.output, input);
                multiply((MatrixMut::new(&mut output, rows, input), mode), 1.0, columns, weight, Cores::All);
            });
            mode = Output::Accumulate;
            if let Some(Branch { rank, .. }) = part.low_rank {
                let down = Matrix::new(&tensors[DOWN], rank, input);
                let inner = Matrix::new(&inner[index], rows, rank);
                multiply((MatrixMut::new(&mut output, rows, input), mode), 1.0, inner, down, Cores::All);
            }
        }
        output
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cutter, Outcome, Probe, assert_agree, assert_derivative};

    /// Different summation orders of up to 300 f32 products.
    const TOLERANCE: f32 = 3e-6;

    /// Which tensors of a projection are tracked: weight and bias, or the low-rank branch.
    #[derive(Clone, Copy)]
    struct Tracked {
        x: bool,
        base: bool,
        branch: bool,
    }

    fn projection(probe: &mut Probe, [input, output, rank]: [usize; 3], tracked: Tracked) -> Projection {
        Projection {
            weight: probe.input([output, input], tracked.base),
            rounded_to: None,
            bias: Some(probe.input([output], tracked.base)),
            low_rank: (rank > 0).then(|| LowRank {
                down: probe.input([rank, input], tracked.branch),
                up: probe.input([output, rank], tracked.branch),
                scale: 0.7,
            }),
        }
    }

    fn run_linear(
        operation: fn(Tensor<3>, Projection) -> Tensor<3>,
        shape: [usize; 3],
        output: usize,
        rank: usize,
        tracked: Tracked,
    ) -> Outcome {
        let mut probe = Probe::new();
        let x = probe.input(shape, tracked.x);
        let projection = projection(&mut probe, [shape[2], output, rank], tracked);
        let output = operation(x, projection);
        probe.finish(output)
    }

    #[test]
    fn linear_agrees_with_its_twin() {
        for (shape, output, rank) in
            [([2, 7, 24], 13, 3), ([3, 33, 31], 130, 0), ([1, 1, 5], 1, 1), ([4, 80, 72], 96, 16)]
        {
            let tracked = Tracked { x: true, base: true, branch: true };
            let fused = run_linear(linear, shape, output, rank, tracked);
            assert_agree(&fused, &run_linear(plain::linear, shape, output, rank, tracked), TOLERANCE);
        }
    }

    #[test]
    fn frozen_tensors_get_no_gradient_and_the_others_agree() {
        for bits in 1..8 {
            let tracked = Tracked { x: bits & 1 != 0, base: bits & 2 != 0, branch: bits & 4 != 0 };
            let fused = run_linear(linear, [2, 5, 24], 17, 4, tracked);
            assert_agree(&fused, &run_linear(plain::linear, [2, 5, 24], 17, 4, tracked), TOLERANCE);
            let expected = [tracked.x, tracked.base, tracked.base, tracked.branch, tracked.branch];
            let found: Vec<bool> = fused.gradients.iter().map(Option::is_some).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn linear_concat_agrees_with_its_twin() {
        let run = |operation: fn(Tensor<3>, [Projection; 3]) -> Tensor<3>| {
            let mut probe = Probe::new();
            let x = probe.tracked([2, 9, 24]);
            let all = Tracked { x: true, base: true, branch: true };
            let adapter_only = Tracked { base: false, ..all };
            let first = projection(&mut probe, [24, 10, 3], all);
            let second = projection(&mut probe, [24, 21, 2], adapter_only);
            let third = Projection { bias: None, ..projection(&mut probe, [24, 7, 0], all) };
            let output = operation(x, [first, second, third]);
            probe.finish(output)
        };
        assert_agree(&run(linear_concat), &run(plain::linear_concat), TOLERANCE);
    }

    #[test]
    fn gradients_are_the_slopes_of_the_values() {
        let (rows, input, output, rank) = (5, 6, 7, 2);
        let len = rows * input + output * input + output + rank * input + output * rank;
        assert_derivative(len, |flat| {
            let mut cut = Cutter::new(flat);
            let x = cut.next([rows, input]);
            let projection = Projection {
                weight: cut.next([output, input]),
                rounded_to: None,
                bias: Some(cut.next([output])),
                low_rank: Some(LowRank {
                    down: cut.next([rank, input]),
                    up: cut.next([output, rank]),
                    scale: 0.5,
                }),
            };
            linear(x, projection)
        });
    }

    #[test]
    fn a_linear_layer_does_the_sums_of_its_formula() {
        let device = burn::tensor::Device::flex();
        let projection = Projection {
            weight: Tensor::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device),
            rounded_to: None,
            bias: Some(Tensor::from_data([0.5, 0.0, -0.5], &device)),
            low_rank: Some(LowRank {
                down: Tensor::from_data([[1.0, -1.0]], &device),
                up: Tensor::from_data([[1.0], [0.0], [2.0]], &device),
                scale: 10.0,
            }),
        };
        let y = linear(Tensor::<2>::from_data([[3.0, 1.0]], &device), projection);
        // x Wᵀ = [5, 13, 21], x Aᵀ = 2, scale · 2 Bᵀ = [20, 0, 40].
        assert_eq!(fewstep_testkit::values(y), [25.5, 13.0, 60.5]);
    }

    #[test]
    fn repeated_runs_give_the_same_bits() {
        let tracked = Tracked { x: true, base: true, branch: true };
        let run = || run_linear(linear, [8, 80, 72], 200, 16, tracked);
        assert_eq!(run(), run());
    }

    #[test]
    fn weights_that_are_views_are_read_in_the_right_order() {
        let run = |operation: fn(Tensor<2>, Projection) -> Tensor<2>| {
            let mut probe = Probe::new();
            let (x, weight) = (probe.tracked([4, 6]), probe.tracked([6, 5]));
            let weight = weight.transpose();
            let projection = Projection { weight, bias: None, low_rank: None, rounded_to: None };
            let output = operation(x, projection);
            probe.finish(output)
        };
        assert_agree(&run(linear), &run(plain::linear), TOLERANCE);
    }
    const HALVES: [HalfType; 2] = [HalfType::Bf16, HalfType::F16];

    /// Output and gradients with a weight that `prepare` makes of an f32 one.
    fn run_prepared(
        operation: fn(Tensor<3>, Projection) -> Tensor<3>,
        tracked: Tracked,
        prepare: impl Fn(Projection) -> Projection,
    ) -> Outcome {
        let mut probe = Probe::new();
        let x = probe.input([3, 33, 72], tracked.x);
        let projection = prepare(projection(&mut probe, [72, 96, 4], tracked));
        let output = operation(x, projection);
        probe.finish(output)
    }

    fn with_weight(projection: Projection, change: impl Fn(Tensor<2>) -> Tensor<2>) -> Projection {
        Projection { weight: change(projection.weight), ..projection }
    }

    #[test]
    fn a_half_weight_gives_the_bits_of_the_same_weight_in_f32() {
        let frozen = Tracked { x: true, base: false, branch: true };
        for half in HALVES {
            let stored = |projection| with_weight(projection, |weight| weight.cast(half.dtype()));
            let widened =
                |projection| with_weight(projection, |weight| weight.cast(half.dtype()).cast(DType::F32));
            let found = run_prepared(linear, frozen, stored);
            assert_eq!(found, run_prepared(linear, frozen, widened));
            assert_ne!(found, run_prepared(linear, frozen, |projection| projection));
            assert_agree(&found, &run_prepared(plain::linear, frozen, stored), TOLERANCE);
        }
    }

    #[test]
    fn a_weight_that_learns_computes_rounded_and_gets_the_gradient_of_the_rounded_one() {
        let all = Tracked { x: true, base: true, branch: false };
        for half in HALVES {
            let rounding = |projection| Projection { rounded_to: Some(half), ..projection };
            let found = run_prepared(linear, all, rounding);
            assert_agree(&found, &run_prepared(plain::linear, all, rounding), TOLERANCE);
            assert_ne!(found, run_prepared(linear, all, |projection| projection));
        }
    }

    #[test]
    #[should_panic(expected = "BF16 weight that learns")]
    fn a_half_weight_cannot_learn() {
        let device = burn::tensor::Device::flex().autodiff();
        let weight = Tensor::<2>::ones([2, 3], &device).cast(DType::BF16).require_grad();
        linear(
            Tensor::<2>::ones([1, 3], &device),
            Projection { weight, bias: None, low_rank: None, rounded_to: None },
        );
    }
}
