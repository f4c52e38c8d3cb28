//! Results that a computation takes over from the one that it repeats.
//!
//! A step of training may do the same twice: a recomputed part does in the backward pass, and a whole evaluation that is
//! not recorded on the way to the picture is done again with a graph. Each repeats the same operations in the same order,
//! so that a list is enough to find a result again.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::thread::LocalKey;

use crate::extension::Values;
use crate::scoped::scoped;

const SAME: &str = "what is computed again does the same operations";

type Slot = LocalKey<RefCell<Results>>;

thread_local! {
    /// Of the recomputed part that the thread is in.
    static PART: RefCell<Results> = const { RefCell::new(Results::Absent) };
    /// Of the evaluation that the thread is in.
    static EVALUATION: RefCell<Results> = const { RefCell::new(Results::Absent) };
}

/// Results in the order in which they came.
enum Results {
    /// The thread is in nothing that is repeated.
    Absent,
    /// The first time.
    Kept(Vec<Values>),
    /// The second time.
    TakenOver(VecDeque<Values>),
}

impl Results {
    fn into_list(self) -> VecDeque<Values> {
        match self {
            Self::Absent => VecDeque::new(),
            Self::Kept(results) => results.into(),
            Self::TakenOver(left) => left,
        }
    }
}

/// What a result takes beside what it cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Price {
    /// Worth its memory for as long as the backward pass of its evaluation is under way.
    Usual,
    /// Worth its memory from one evaluation to the next: attention among the tokens of a picture, and layers that make few
    /// numbers of many, of their input or of their weight.
    High,
}

/// What `compute` gives, or what it gave the first time.
pub(crate) fn computed_once<const N: usize>(
    price: Price,
    compute: impl FnOnce() -> [Values; N],
) -> [Values; N] {
    if let Some(results) = taken_over(&PART) {
        return results;
    }
    let results = match price {
        Price::Usual => compute(),
        Price::High => {
            let results = taken_over(&EVALUATION).unwrap_or_else(compute);
            keep(&EVALUATION, &results);
            results
        }
    };
    keep(&PART, &results);
    results
}

fn taken_over<const N: usize>(slot: &'static Slot) -> Option<[Values; N]> {
    slot.with_borrow_mut(|results| match results {
        Results::TakenOver(left) => {
            let mut next = || left.pop_front().expect(SAME);
            Some([(); N].map(|()| next()))
        }
        _ => None,
    })
}

fn keep(slot: &'static Slot, results: &[Values]) {
    slot.with_borrow_mut(|kept| {
        if let Results::Kept(kept) = kept {
            kept.extend(results.iter().cloned());
        }
    });
}

/// Whether the thread is in a recomputed part.
pub(super) fn in_part() -> bool {
    PART.with_borrow(|results| !matches!(results, Results::Absent))
}

/// Runs a recomputed part for the first time; gives what it computed once.
pub(super) fn first_run<R>(part: impl FnOnce() -> R) -> (R, VecDeque<Values>) {
    kept_in(&PART, part)
}

/// Runs it again.
pub(super) fn second_run<R>(results: VecDeque<Values>, part: impl FnOnce() -> R) -> R {
    taken_over_in(&PART, results, part)
}

/// What an evaluation computed at a high price, for the same evaluation of the same values. By default nothing.
///
/// On the CPU that is what attention among a picture's tokens gives, and layers that make few numbers of many: the second
/// of an MLP, and modulations, which read a weight for one row. Elsewhere, and inside of [`crate::with_plain_twins`], it
/// is nothing.
#[derive(Default)]
pub struct Remembered(Option<VecDeque<Values>>);

impl Remembered {
    /// Runs an evaluation, and remembers.
    pub fn of<R>(evaluate: impl FnOnce() -> R) -> (R, Self) {
        let (output, results) = kept_in(&EVALUATION, evaluate);
        (output, Self(Some(results)))
    }

    /// Runs the same evaluation, with a graph or without: the same operations on the same values.
    pub fn taken_over_in<R>(self, evaluate: impl FnOnce() -> R) -> R {
        match self.0 {
            Some(results) => taken_over_in(&EVALUATION, results, evaluate),
            None => evaluate(),
        }
    }
}

fn kept_in<R>(slot: &'static Slot, run: impl FnOnce() -> R) -> (R, VecDeque<Values>) {
    let (output, kept) = scoped(slot, Results::Kept(Vec::new()), run);
    (output, kept.into_list())
}

fn taken_over_in<R>(slot: &'static Slot, results: VecDeque<Values>, run: impl FnOnce() -> R) -> R {
    let (output, left) = scoped(slot, Results::TakenOver(results), run);
    assert!(left.into_list().is_empty(), "{SAME}");
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two results, one of each price: how many had been computed when each was.
    fn evaluated(count: &mut f32) -> [f32; 2] {
        [Price::Usual, Price::High].map(|price| {
            let [result] = computed_once(price, || {
                *count += 1.0;
                [Values::from_vec(vec![*count], &[1])]
            });
            result[0]
        })
    }

    #[test]
    fn an_evaluation_that_remembers_computes_only_what_was_cheap() {
        let mut count = 0.0;
        let (first, remembered) = Remembered::of(|| evaluated(&mut count));
        assert_eq!((first, count), ([1.0, 2.0], 2.0));
        assert_eq!(remembered.taken_over_in(|| evaluated(&mut count)), [3.0, 2.0]);
        assert_eq!(Remembered::default().taken_over_in(|| evaluated(&mut count)), [4.0, 5.0]);
        assert_eq!(evaluated(&mut count), [6.0, 7.0], "outside of both");
    }

    #[test]
    fn a_part_keeps_what_its_evaluation_remembers() {
        let mut count = 0.0;
        let (_, remembered) = Remembered::of(|| evaluated(&mut count));
        let (first, kept) = remembered.taken_over_in(|| first_run(|| evaluated(&mut count)));
        assert_eq!(first, [3.0, 2.0]);
        assert_eq!(second_run(kept, || evaluated(&mut count)), first);
        assert_eq!(count, 3.0);
    }

    #[test]
    #[should_panic(expected = "what is computed again does the same operations")]
    fn an_evaluation_that_does_less_than_is_remembered_is_found_out() {
        let mut count = 0.0;
        let (_, remembered) = Remembered::of(|| [(); 2].map(|()| evaluated(&mut count)));
        remembered.taken_over_in(|| evaluated(&mut count));
    }

    #[test]
    #[should_panic(expected = "what is computed again does the same operations")]
    fn an_evaluation_that_does_more_than_is_remembered_is_found_out() {
        let mut count = 0.0;
        let (_, remembered) = Remembered::of(|| evaluated(&mut count));
        remembered.taken_over_in(|| [(); 2].map(|()| evaluated(&mut count)));
    }
}
