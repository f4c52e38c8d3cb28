//! The switch between the fused operations and their plain twins.
//!
//! An operation chooses when it is called: the fused one where its tensors are in host memory, [`crate::plain`]
//! elsewhere. Within [`with_plain_twins`] every operation takes its twin, so that whole models can be compared with
//! what burn's own operations make of them.

use std::cell::RefCell;

use crate::scoped::scoped;

thread_local! {
    /// Operations are called by the thread that builds a graph, never by those that share an operation's work.
    static PLAIN: RefCell<bool> = const { RefCell::new(false) };
}

/// Runs `body`; every operation that this thread calls in it takes its plain twin, on any device.
///
/// A graph that `body` builds has the twins' backward whenever that runs. Calls may be nested; a panic ends the choice
/// as a return does.
pub fn with_plain_twins<R>(body: impl FnOnce() -> R) -> R {
    scoped(&PLAIN, true, body).0
}

/// Whether operations that this thread calls take their plain twins: it is inside of [`with_plain_twins`].
pub fn takes_plain_twins() -> bool {
    PLAIN.with_borrow(|plain| *plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gelu, gelu, plain};
    use burn::tensor::Device;
    use fewstep_testkit::{random, values};

    /// Far arguments, where the twin's tanh and the fused logistic function round differently.
    fn gelu_of(operation: fn(burn::tensor::Tensor<1>, Gelu) -> burn::tensor::Tensor<1>) -> Vec<f32> {
        values(operation(random::<1>([4096], 1, &Device::flex()) * 3.0, Gelu::Tanh))
    }

    #[test]
    fn inside_operations_give_the_bits_of_their_twins_and_outside_their_own() {
        let (fused, twin) = (gelu_of(gelu), gelu_of(plain::gelu));
        assert_ne!(fused, twin);
        assert_eq!(with_plain_twins(|| gelu_of(gelu)), twin);
        assert_eq!(gelu_of(gelu), fused);
    }

    #[test]
    fn the_choice_ends_with_its_scope_whatever_ends_that() {
        with_plain_twins(|| {
            with_plain_twins(|| ());
            assert!(takes_plain_twins());
        });
        assert!(!takes_plain_twins());
        assert!(std::panic::catch_unwind(|| with_plain_twins(|| panic!("on purpose"))).is_err());
        assert!(!takes_plain_twins());
    }

    #[test]
    fn other_threads_are_left_alone() {
        with_plain_twins(|| {
            assert!(!std::thread::spawn(takes_plain_twins).join().unwrap());
        });
    }
}
