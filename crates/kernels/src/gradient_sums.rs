//! Sums of parameter gradients that backward passes add to as they go.
//!
//! A second set of gradients, as large as what learns, then never exists beside the sum: gradients of weights are added
//! by the product that makes them, others when they are made. A product that few rows of the layer's input make is not
//! done at once: it would pass over the whole sum for little work. Its factors wait for those of later passes.

use std::cell::RefCell;
use std::collections::HashMap;

use burn::backend::autodiff::NodeId;
use burn::tensor::Tensor;

use crate::adamw::add_in_place;
use crate::extension::{Input, Values, in_host_memory, is_fused, unwritten};
use crate::matmul::{Matrix, MatrixMut, Output, Product, multiply_all};
use crate::scoped::scoped;

/// Sums by the nodes of the parameters that they belong to.
#[derive(Default)]
pub struct GradientSums(HashMap<NodeId, Sum>);

thread_local! {
    /// Of the backward passes that run on the thread.
    static SUMS: RefCell<GradientSums> = RefCell::default();
}

impl GradientSums {
    /// Has gradients of a parameter added to `sum`, if there is one yet; on devices other than the CPU, gives it back.
    pub fn insert<const D: usize>(
        &mut self,
        parameter: Tensor<D>,
        sum: Option<Tensor<D>>,
    ) -> Option<Tensor<D>> {
        if !is_fused(&parameter) {
            return sum;
        }
        let shape = parameter.dims();
        assert!(sum.iter().all(|sum| sum.dims() == shape), "a parameter and its gradient");
        let sum = Sum { shape: shape.to_vec(), total: sum.map(Values::detached), waiting: Vec::new() };
        self.0.insert(Input::new(parameter).node().id(), sum);
        None
    }

    /// What became of a parameter's sum; `None` if nothing was added to none.
    pub fn remove<const D: usize>(&mut self, parameter: Tensor<D>) -> Option<Tensor<D>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.remove(&Input::new(parameter).node().id())?.finish().map(Values::into_tensor)
    }

    /// Does `backward`, whose passes add to the sums. A gradient that was added is not among those that they give; those
    /// of burn's own operations are never added.
    pub fn filled_by<T>(self, backward: impl FnOnce() -> T) -> (T, Self) {
        assert!(SUMS.with_borrow(|sums| sums.0.is_empty()), "backward passes do not lie in each other");
        scoped(&SUMS, self, backward)
    }
}

/// The sum of one parameter's gradients.
pub(crate) struct Sum {
    shape: Vec<usize>,
    /// `None` before the first.
    total: Option<Values>,
    /// Products that are still to be added.
    waiting: Vec<Factors>,
}

/// Factors of a linear layer's weight gradient, `gradientᵀ x`.
pub(crate) struct Factors {
    /// `[rows, width]`, of which the columns from `first_column` on are the layer's output.
    pub(crate) gradient: Values,
    pub(crate) width: usize,
    pub(crate) first_column: usize,
    /// `[rows, input]`
    pub(crate) x: Values,
    pub(crate) rows: usize,
}

/// Rows that make a product worth a pass over the sum.
const ENOUGH_ROWS: usize = 256;

impl Sum {
    /// Adds a product, which may wait.
    pub(crate) fn wait_for(&mut self, factors: Factors) {
        self.waiting.push(factors);
    }

    /// What is to be done now; [`Sum::settle`] follows it.
    pub(crate) fn due(&mut self) -> Option<Product<'_>> {
        self.is_due().then(|| self.product())
    }

    /// Forgets the products that [`Sum::due`] gave.
    pub(crate) fn settle(&mut self) {
        if self.is_due() {
            self.waiting.clear();
        }
    }

    /// Whether the products that wait are worth a pass over the sum, or take as much memory as the sum.
    fn is_due(&self) -> bool {
        let rows: usize = self.waiting.iter().map(|factors| factors.rows).sum();
        rows > 0
            && (rows >= ENOUGH_ROWS || rows * self.shape.iter().sum::<usize>() >= self.shape.iter().product())
    }

    /// What waits, as one product into the sum.
    fn product(&mut self) -> Product<'_> {
        let [output, input] = self.shape[..] else { unreachable!("weights of linear layers have two axes") };
        let terms = self.waiting.iter().map(|factors| {
            let Factors { gradient, width, first_column, x, rows } = factors;
            let gradient = Matrix::strided(&gradient[*first_column..], *rows, output, *width);
            (gradient.transposed(), Matrix::new(x, *rows, input))
        });
        let terms = terms.collect();
        let start = if self.total.is_some() { Output::Accumulate } else { Output::Overwrite };
        let total =
            self.total.get_or_insert_with(|| Values::from_vec(unwritten(output * input), &[output, input]));
        Product { into: MatrixMut::new(total.as_mut_slice(), output, input), start, scale: 1.0, terms }
    }

    fn add(&mut self, gradient: Values) {
        match &mut self.total {
            Some(total) => add_in_place(total.as_mut_slice(), &gradient),
            None => self.total = Some(gradient),
        }
    }

    fn finish(mut self) -> Option<Values> {
        if !self.waiting.is_empty() {
            multiply_all(vec![self.product()]);
        }
        self.total
    }
}

/// Lends the sums of some parameters; puts them back.
pub(crate) fn with_sums<T>(nodes: &[Option<NodeId>], add: impl FnOnce(&mut [Option<Sum>]) -> T) -> T {
    let node_sum = |node: &Option<NodeId>| SUMS.with_borrow_mut(|sums| sums.0.remove(node.as_ref()?));
    let mut sums: Vec<Option<Sum>> = nodes.iter().map(node_sum).collect();
    let result = add(&mut sums);
    let lent = nodes.iter().zip(sums).filter_map(|(node, sum)| Some(((*node)?, sum?)));
    SUMS.with_borrow_mut(|sums| sums.0.extend(lent));
    result
}

/// Does `backward` while the sums of the first nodes of `pairs` are those of the second.
pub(crate) fn handed_over<T>(pairs: &[(NodeId, NodeId)], backward: impl FnOnce() -> T) -> T {
    let hand_over = |from: NodeId, to: NodeId| {
        SUMS.with_borrow_mut(|sums| {
            if let Some(sum) = sums.0.remove(&from) {
                sums.0.insert(to, sum);
            }
        });
    };
    pairs.iter().for_each(|(first, second)| hand_over(*first, *second));
    let result = backward();
    pairs.iter().for_each(|(first, second)| hand_over(*second, *first));
    result
}

/// Whether gradients of a parameter are added to a sum.
pub(crate) fn has_sum(node: NodeId) -> bool {
    SUMS.with_borrow(|sums| sums.0.contains_key(&node))
}

/// Adds a gradient to the sum of its parameter; gives it back where there is none.
pub(crate) fn added_to_sum(node: NodeId, gradient: Values) -> Option<Values> {
    SUMS.with_borrow_mut(|sums| match sums.0.get_mut(&node) {
        Some(sum) => {
            sum.add(gradient);
            None
        }
        None => Some(gradient),
    })
}

/// [`added_to_sum`] of a tensor; there are no sums on devices other than the CPU.
pub(crate) fn tensor_added_to_sum<const D: usize>(node: NodeId, gradient: Tensor<D>) -> Option<Tensor<D>> {
    if !in_host_memory(&gradient) {
        return Some(gradient);
    }
    added_to_sum(node, Values::detached(gradient)).map(Values::into_tensor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Projection, linear, linear_concat, recomputed, with_plain_twins};
    use burn::module::{Module, Param};
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, random, values};

    const WIDTH: usize = 6;

    fn weight(seed: u64) -> Tensor<2> {
        random([WIDTH, WIDTH], seed, &Device::flex())
    }

    fn loss(weight: &Tensor<2>) -> Tensor<1> {
        let x = random::<2>([4, WIDTH], 2, &Device::flex()).autodiff();
        let projection = Projection { weight: weight.clone(), rounded_to: None, bias: None, low_rank: None };
        linear(x, projection).square().sum()
    }

    #[test]
    fn a_pass_adds_to_the_sums_that_it_has_and_gives_the_other_gradients() {
        let [summed, other] = [1, 3].map(|seed| weight(seed).autodiff().require_grad());
        let expected = {
            let gradients = loss(&summed).backward();
            values(summed.grad(&gradients).unwrap() + weight(7))
        };
        let mut sums = GradientSums::default();
        assert!(sums.insert(summed.clone(), Some(weight(7))).is_none());
        let (gradients, mut sums) = sums.filled_by(|| (loss(&summed) + loss(&other)).backward());
        assert!(summed.grad(&gradients).is_none());
        assert!(other.grad(&gradients).is_some());
        assert!(sums.remove(other).is_none());
        assert_close(&values(sums.remove(summed.clone()).unwrap()), &expected, 1e-5);
        let gradients = loss(&summed).backward();
        assert!(summed.grad(&gradients).is_some(), "passes outside know of no sums");
    }

    /// The sum of the gradients of passes over inputs of so many rows, in one weight of three side by side and alone.
    fn summed(rows: &[usize], start: Option<Tensor<2>>, is_recomputed: bool) -> Option<Vec<f32>> {
        let layers =
            Layers { first: Param::from_tensor(weight(1)), second: Param::from_tensor(weight(2)) }.train();
        let mut sums = GradientSums::default();
        assert!(sums.insert(layers.second.val(), start).is_none());
        for (pass, rows) in rows.iter().enumerate() {
            let x = random::<3>([1, *rows, WIDTH], 10 + pass as u64, &Device::flex()).autodiff();
            let backward = || {
                let output = match is_recomputed {
                    true => recomputed(&layers, [x], Layers::forward),
                    false => layers.forward([x]),
                };
                output.square().mean().backward()
            };
            let (gradients, filled) = sums.filled_by(backward);
            assert!(layers.first.val().grad(&gradients).is_some(), "a parameter without a sum");
            assert!(layers.second.val().grad(&gradients).is_none(), "a parameter with a sum");
            sums = filled;
        }
        sums.remove(layers.second.val()).map(values)
    }

    #[derive(Module, Debug)]
    struct Layers {
        first: Param<Tensor<2>>,
        second: Param<Tensor<2>>,
    }

    impl Layers {
        fn forward(&self, [x]: [Tensor<3>; 1]) -> Tensor<3> {
            let [first, second] = [&self.first, &self.second].map(|weight| Projection {
                weight: weight.val(),
                rounded_to: None,
                bias: None,
                low_rank: None,
            });
            linear_concat(linear(x, second.clone()), [first.clone(), second, first])
        }
    }

    /// The same by burn's sum of the gradients of every pass.
    fn summed_plainly(rows: &[usize], start: Option<Tensor<2>>) -> Vec<f32> {
        let layers =
            Layers { first: Param::from_tensor(weight(1)), second: Param::from_tensor(weight(2)) }.train();
        let passes = rows.iter().enumerate().map(|(pass, rows)| {
            let x = random::<3>([1, *rows, WIDTH], 10 + pass as u64, &Device::flex()).autodiff();
            let output = with_plain_twins(|| layers.forward([x]));
            layers.second.val().grad(&output.square().mean().backward()).unwrap()
        });
        values(start.into_iter().chain(passes).reduce(|sum, gradient| sum + gradient).unwrap())
    }

    #[test]
    fn products_that_wait_are_in_the_sum_as_others_are() {
        // Factors that take less memory than a sum, and more; alone and together rows enough for a product.
        for rows in [&[1][..], &[1, 2], &[2, 2, 1, 300, 1], &[200, 100], &[256]] {
            for start in [None, Some(weight(7))] {
                let expected = summed_plainly(rows, start.clone());
                for is_recomputed in [false, true] {
                    let found = summed(rows, start.clone(), is_recomputed).unwrap();
                    assert_close(&found, &expected, 1e-5);
                }
            }
        }
    }

    #[test]
    fn factors_wait_until_their_product_is_worth_a_pass_over_the_sum() {
        let due_after = |rows: usize| {
            let mut sum = Sum { shape: vec![64, 100], total: None, waiting: Vec::new() };
            for added in 1.. {
                let [gradient, x] =
                    [64, 100].map(|width| Values::from_vec(vec![1.0; rows * width], &[rows, width]));
                sum.wait_for(Factors { gradient, width: 64, first_column: 0, x, rows });
                if sum.due().is_some() {
                    sum.settle();
                    assert!(sum.waiting.is_empty());
                    return added;
                }
            }
            unreachable!("a sum that is never due")
        };
        assert_eq!(due_after(300), 1, "rows enough");
        // 64 * 100 numbers of the sum, 164 for each row.
        assert_eq!(due_after(39), 2);
        assert_eq!(due_after(40), 1);
    }

    #[test]
    fn nothing_is_the_sum_of_no_gradients() {
        assert!(summed(&[], None, false).is_none());
        assert_eq!(summed(&[], Some(weight(7)), false).unwrap(), values(weight(7)));
    }

    #[test]
    fn where_operations_are_not_fused_the_sum_is_given_back() {
        let parameter = weight(1).autodiff().require_grad();
        with_plain_twins(|| {
            let sum = GradientSums::default().insert(parameter, Some(weight(7)));
            assert_eq!(values(sum.unwrap()), values(weight(7)));
        });
    }
}
