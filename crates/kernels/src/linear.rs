//! Linear layers with bias and low-rank branch in one operation, alone or several side by side.
//!
//! A frozen weight costs neither its gradient nor the memory of the input that the gradient would need, and may be kept
//! in bf16 or f16: it is widened to f32 in a buffer that is used again, and the arithmetic is f32 throughout.

use burn::tensor::{DType, Tensor};

use crate::extension::{Input, Pullback, Values, is_fused, operation, unwritten};
use crate::gradient_sums::{Factors, Sum, with_sums};
use crate::matmul::{Matrix, MatrixMut, Output, Product, multiply_all};
use crate::recompute::{Price, computed_once};
use crate::weight::{HalfType, Numbers};
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
    let weights = std::array::from_fn::<_, P, _>(|index| tensors(&inputs, index)[WEIGHT].learning_node());
    operation(inputs, |values, tracked| {
        let [output, hidden] = forward(&layout, &values, &shape);
        let saved = Saved::new(layout, values, hidden, tracked);
        let pullback: Pullback<N> = Box::new(move |gradient| {
            with_sums(&weights, |sums| saved.pull_back(gradient, &input_shape, sums))
        });
        (output, pullback)
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

    /// Room for `rows` rows of each branch's rank, one branch after the other.
    fn branches(&self) -> Vec<f32> {
        unwritten(self.rows * self.parts.iter().map(Part::rank).sum::<usize>())
    }

    /// What belongs to each part of what [`Layout::branches`] gave.
    fn of_parts<'a>(&self, mut branches: &'a [f32]) -> Vec<&'a [f32]> {
        let of_part = |part: &Part| branches.split_off(..self.rows * part.rank()).expect("each has its room");
        self.parts.iter().map(of_part).collect()
    }

    fn of_parts_mut<'a>(&self, mut branches: &'a mut [f32]) -> Vec<&'a mut [f32]> {
        let of_part =
            |part: &Part| branches.split_off_mut(..self.rows * part.rank()).expect("each has its room");
        self.parts.iter().map(of_part).collect()
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

    fn rank(&self) -> usize {
        self.low_rank.map_or(0, |branch| branch.rank)
    }

    fn weight<'a>(&self, tensors: &'a [Values], input: usize) -> Matrix<'a> {
        Matrix::of_numbers(Numbers::new(&tensors[WEIGHT], self.rounded_to), self.output, input)
    }

    /// Axes of one of its tensors.
    fn shape(&self, tensor: usize, input: usize) -> Vec<usize> {
        match tensor {
            WEIGHT => vec![self.output, input],
            BIAS => vec![self.output],
            DOWN => vec![self.rank(), input],
            _ => vec![self.output, self.rank()],
        }
    }
}

/// What belongs to the tensors of one projection, of what belongs to all inputs.
fn tensors<T>(inputs: &[T], index: usize) -> &[T] {
    &inputs[1 + index * INPUTS..][..INPUTS]
}

/// Whether [`crate::Remembered`] has the output of a layer of such an input: it reads twice as many numbers as it gives.
pub fn makes_few_of_many([input, output]: [usize; 2]) -> bool {
    input >= 2 * output
}

/// The output, and what [`hidden`] gives; both are kept where they would be computed again.
fn forward(layout: &Layout, values: &[Values], shape: &[usize]) -> [Values; 2] {
    let is_dear = layout.rows <= FEW_ROWS || makes_few_of_many([layout.input, layout.width]);
    let price = if is_dear { Price::High } else { Price::Usual };
    computed_once(price, || {
        let hidden = hidden(layout, values);
        let output = output(layout, values, &hidden);
        let len = hidden.len();
        [Values::from_vec(output, shape), Values::from_vec(hidden, &[len])]
    })
}

fn output(layout: &Layout, values: &[Values], hidden: &[f32]) -> Vec<f32> {
    let hidden = layout.of_parts(hidden);
    let mut output = unwritten(layout.rows * layout.width);
    if (1..=FEW_ROWS).contains(&layout.rows) {
        for (index, (part, hidden)) in layout.parts.iter().zip(hidden).enumerate() {
            few_rows(layout, part, (&values[0], tensors(values, index)), hidden, &mut output);
        }
        return output;
    }
    let x = Matrix::new(&values[0], layout.rows, layout.input);
    let mut products = Vec::with_capacity(layout.parts.len());
    let mut rest = MatrixMut::new(&mut output, layout.rows, layout.width);
    for (index, (part, hidden)) in layout.parts.iter().zip(hidden).enumerate() {
        let tensors = tensors(values, index);
        let (into, next) = rest.split_columns(part.output);
        rest = next;
        let mut product = Product::new(into, x, part.weight(tensors, layout.input).transposed());
        if part.has_bias {
            product.start = Output::Row(&tensors[BIAS]);
        }
        if let Some(Branch { rank, .. }) = part.low_rank {
            let up = Matrix::new(&tensors[UP], part.output, rank).transposed();
            product.terms.push((Matrix::new(hidden, layout.rows, rank), up));
        }
        products.push(product);
    }
    multiply_all(products);
    output
}

/// `scale · x downᵀ` of each projection, empty where it has no branch.
fn hidden(layout: &Layout, values: &[Values]) -> Vec<f32> {
    let mut hidden = layout.branches();
    let x = Matrix::new(&values[0], layout.rows, layout.input);
    let of_parts = layout.of_parts_mut(&mut hidden);
    let products = layout.parts.iter().zip(of_parts).enumerate().filter_map(|(index, (part, hidden))| {
        let Branch { rank, scale } = part.low_rank?;
        let down = Matrix::new(&tensors(values, index)[DOWN], rank, layout.input).transposed();
        Some(Product { scale, ..Product::new(MatrixMut::new(hidden, layout.rows, rank), x, down) })
    });
    multiply_all(products.collect());
    hidden
}

/// Rows of x up to which a product is as fast as its weight is read, once and as it lies.
const FEW_ROWS: usize = 4;

/// Rows of a weight that one piece of work reads.
const WEIGHT_ROWS: usize = 128;

/// One projection of few rows of x, by inner products, into its columns of the output.
fn few_rows(
    layout: &Layout,
    part: &Part,
    (x, tensors): (&[f32], &[Values]),
    hidden: &[f32],
    output: &mut [f32],
) {
    let Layout { rows, input, width, .. } = *layout;
    let rank = part.rank();
    let weight = Numbers::new(&tensors[WEIGHT], part.rounded_to);
    let mut sums = unwritten(part.output * rows);
    parallel::for_each(sums.chunks_mut(WEIGHT_ROWS * rows).enumerate(), |(piece, sums)| {
        let mut widened = vec![0.0; input];
        for (offset, sums) in sums.chunks_exact_mut(rows).enumerate() {
            let column = piece * WEIGHT_ROWS + offset;
            let weights = weight.lend(column * input..(column + 1) * input, &mut widened);
            let up = if rank > 0 { &tensors[UP][column * rank..][..rank] } else { &[] };
            let bias = if part.has_bias { tensors[BIAS][column] } else { 0.0 };
            for (row, sum) in sums.iter_mut().enumerate() {
                let added = simd::dot(&hidden[row * rank..][..rank], up);
                *sum = bias + simd::dot(&x[row * input..][..input], weights) + added;
            }
        }
    });
    for (row, output) in output.chunks_mut(width).enumerate() {
        let columns = &mut output[part.first_column..][..part.output];
        for (target, sums) in columns.iter_mut().zip(sums.chunks_exact(rows)) {
            *target = sums[row];
        }
    }
}

/// What the pullback needs.
struct Saved<const N: usize> {
    layout: Layout,
    values: [Values; N],
    /// What [`hidden`] gave.
    hidden: Values,
    tracked: [bool; N],
}

impl<const N: usize> Saved<N> {
    /// Lets go of the input and of `x downᵀ` where no tracked weight needs them.
    fn new(layout: Layout, mut values: [Values; N], mut hidden: Values, tracked: [bool; N]) -> Self {
        let projections = || tracked[1..].chunks_exact(INPUTS);
        if !projections().any(|tracked| tracked[WEIGHT] || tracked[DOWN]) {
            values[0] = Values::from_vec(Vec::new(), &[0]);
        }
        if !projections().any(|tracked| tracked[UP]) {
            hidden = Values::from_vec(Vec::new(), &[0]);
        }
        Self { layout, values, hidden, tracked }
    }

    /// Gradients of weights are added to their sums where there are any.
    fn pull_back(
        &self,
        gradient: Values,
        input_shape: &[usize],
        sums: &mut [Option<Sum>],
    ) -> [Option<Values>; N] {
        let inner = self.inner_gradients(&gradient);
        let inner = self.layout.of_parts(&inner);
        let shapes: [Vec<usize>; N] = std::array::from_fn(|index| match index.checked_sub(1) {
            None => input_shape.to_vec(),
            Some(index) => self.layout.parts[index / INPUTS].shape(index % INPUTS, self.layout.input),
        });
        let mut made_here = self.tracked;
        let parts = self.layout.parts.iter().zip(made_here[1..].chunks_exact_mut(INPUTS));
        for ((part, made_here), sum) in parts.zip(sums.iter_mut()) {
            if let Some(sum) = sum {
                sum.wait_for(self.factors(part, &gradient));
                made_here[WEIGHT] = false;
            }
        }
        let mut gradients: [Option<Vec<f32>>; N] =
            std::array::from_fn(|index| made_here[index].then(|| unwritten(shapes[index].iter().product())));
        let (of_input, of_parameters) = gradients.split_first_mut().expect("x is the first input");
        let mut products: Vec<Product> =
            of_input.iter_mut().map(|into| self.input_gradient(&gradient, &inner, into)).collect();
        for (index, gradients) in of_parameters.chunks_exact_mut(INPUTS).enumerate() {
            products.extend(self.parameter_gradients(index, &gradient, inner[index], gradients));
        }
        products.extend(sums.iter_mut().flatten().filter_map(Sum::due));
        multiply_all(products);
        sums.iter_mut().flatten().for_each(Sum::settle);
        let mut shapes = shapes.iter();
        gradients.map(|gradient| {
            let shape = shapes.next().expect("a shape for each input");
            gradient.map(|gradient| Values::from_vec(gradient, shape))
        })
    }

    /// Those of a weight's gradient.
    fn factors(&self, part: &Part, gradient: &Values) -> Factors {
        let Layout { rows, width, .. } = self.layout;
        let (gradient, x) = (gradient.clone(), self.values[0].clone());
        Factors { gradient, width, first_column: part.first_column, x, rows }
    }

    /// The gradients of `x downᵀ`; empty without a branch.
    fn inner_gradients(&self, gradient: &[f32]) -> Vec<f32> {
        let layout = &self.layout;
        let mut inner = layout.branches();
        let of_parts = layout.of_parts_mut(&mut inner);
        let products = layout.parts.iter().zip(of_parts).enumerate().filter_map(|(index, (part, inner))| {
            let Branch { rank, scale } = part.low_rank?;
            let up = Matrix::new(&tensors(&self.values, index)[UP], part.output, rank);
            let into = MatrixMut::new(inner, layout.rows, rank);
            Some(Product { scale, ..Product::new(into, layout.columns(part, gradient), up) })
        });
        multiply_all(products.collect());
        inner
    }

    /// Fills a projection's tracked gradients: the bias's at once, the others by products that are still to be done.
    fn parameter_gradients<'a>(
        &'a self,
        index: usize,
        gradient: &'a [f32],
        inner: &'a [f32],
        gradients: &'a mut [Option<Vec<f32>>],
    ) -> impl Iterator<Item = Product<'a>> {
        let Layout { rows, input, .. } = self.layout;
        let part = &self.layout.parts[index];
        let columns = self.layout.columns(part, gradient).transposed();
        let rank = part.rank();
        gradients.iter_mut().enumerate().filter_map(move |(tensor, into)| {
            let into = into.as_mut()?;
            if tensor == BIAS {
                *into = self.layout.column_sums(part, gradient);
                return None;
            }
            let (left, right) = match tensor {
                WEIGHT => (columns, Matrix::new(&self.values[0], rows, input)),
                DOWN => {
                    (Matrix::new(inner, rows, rank).transposed(), Matrix::new(&self.values[0], rows, input))
                }
                _ => (columns, Matrix::new(self.layout.of_parts(&self.hidden)[index], rows, rank)),
            };
            let shape = part.shape(tensor, input);
            Some(Product::new(MatrixMut::new(into, shape[0], shape[1]), left, right))
        })
    }

    fn input_gradient<'a>(
        &'a self,
        gradient: &'a [f32],
        inner: &[&'a [f32]],
        into: &'a mut [f32],
    ) -> Product<'a> {
        let Layout { rows, input, .. } = self.layout;
        let terms = self.layout.parts.iter().zip(inner).enumerate().flat_map(|(index, (part, inner))| {
            let tensors = tensors(&self.values, index);
            let base = (self.layout.columns(part, gradient), part.weight(tensors, input));
            let branch = part.low_rank.map(|Branch { rank, .. }| {
                (Matrix::new(inner, rows, rank), Matrix::new(&tensors[DOWN], rank, input))
            });
            [Some(base), branch].into_iter().flatten()
        });
        let terms = terms.collect();
        Product { into: MatrixMut::new(into, rows, input), start: Output::Overwrite, scale: 1.0, terms }
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
