//! Sums of parameter gradients that backward passes add to as they go.
//!
//! A second set of gradients, as large as what learns, then never exists beside the sum: each gradient is added when it
//! is made, and its memory is free for the next.

use std::cell::RefCell;
use std::collections::HashMap;

use burn::backend::autodiff::NodeId;
use burn::tensor::Tensor;

use crate::adamw::add_in_place;
use crate::extension::{Input, Values, is_fused};
use crate::scoped::scoped;

/// Sums by the nodes of the parameters that they belong to.
#[derive(Default)]
pub struct GradientSums(HashMap<NodeId, Values>);

thread_local! {
    /// Of the backward passes that run on the thread.
    static SUMS: RefCell<GradientSums> = RefCell::default();
}

impl GradientSums {
    /// Has gradients of a parameter added to `sum`; on devices other than the CPU, gives it back.
    pub fn insert<const D: usize>(&mut self, parameter: Tensor<D>, sum: Tensor<D>) -> Option<Tensor<D>> {
        assert_eq!(parameter.dims(), sum.dims(), "a parameter and its gradient");
        if !is_fused(&sum) {
            return Some(sum);
        }
        self.0.insert(Input::new(parameter).node().id(), Values::detached(sum));
        None
    }

    /// What became of a parameter's sum.
    pub fn remove<const D: usize>(&mut self, parameter: Tensor<D>) -> Option<Tensor<D>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.remove(&Input::new(parameter).node().id()).map(Values::into_tensor)
    }

    /// Does `backward`, whose passes add to the sums. A gradient that was added is not among those that they give; those
    /// of burn's own operations are never added.
    pub fn filled_by<T>(self, backward: impl FnOnce() -> T) -> (T, Self) {
        assert!(SUMS.with_borrow(|sums| sums.0.is_empty()), "backward passes do not lie in each other");
        scoped(&SUMS, self, backward)
    }
}

/// Adds a gradient to the sum of its parameter; gives it back where there is none.
pub(crate) fn added_to_sum(node: NodeId, gradient: Values) -> Option<Values> {
    SUMS.with_borrow_mut(|sums| match sums.0.get_mut(&node) {
        Some(sum) => {
            add_in_place(sum.as_mut_slice(), &gradient);
            None
        }
        None => Some(gradient),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Projection, linear, with_plain_twins};
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
        assert!(sums.insert(summed.clone(), weight(7)).is_none());
        let (gradients, mut sums) = sums.filled_by(|| (loss(&summed) + loss(&other)).backward());
        assert!(summed.grad(&gradients).is_none());
        assert!(other.grad(&gradients).is_some());
        assert!(sums.remove(other).is_none());
        assert_close(&values(sums.remove(summed.clone()).unwrap()), &expected, 1e-5);
        let gradients = loss(&summed).backward();
        assert!(summed.grad(&gradients).is_some(), "passes outside know of no sums");
    }

    #[test]
    fn where_operations_are_not_fused_the_sum_is_given_back() {
        let parameter = weight(1).autodiff().require_grad();
        with_plain_twins(|| {
            let sum = GradientSums::default().insert(parameter, weight(7));
            assert_eq!(values(sum.unwrap()), values(weight(7)));
        });
    }
}
