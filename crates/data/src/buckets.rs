//! Batches in which all pictures have one size.

use std::collections::HashMap;
use std::hash::Hash;

/// Splits `order`, a permutation of row indices, into batches whose rows agree in size.
///
/// Rows keep the order they are given in: each joins the open batch of its size, which is handed out when it has
/// `batch_size` rows. Batches that stay smaller come last, in the order of their first row. Equal input gives equal
/// batches, so a resumed run sees the ones it would have seen.
///
/// # Panics
/// When `batch_size` is 0 or `order` names a row that `sizes` lacks.
pub fn batches<S: Eq + Hash + Copy>(sizes: &[S], order: &[usize], batch_size: usize) -> Vec<Vec<usize>> {
    assert!(batch_size > 0, "batches need at least one row");
    let mut full = Vec::new();
    let mut open: HashMap<S, Vec<usize>> = HashMap::new();
    for &row in order {
        let batch = open.entry(sizes[row]).or_default();
        batch.push(row);
        if batch.len() == batch_size {
            full.push(std::mem::take(batch));
        }
    }
    full.extend(remainders(open, order));
    full
}

/// The batches that did not fill up, sorted by where their first row stands in `order`: a map has no order of its own.
fn remainders<S>(open: HashMap<S, Vec<usize>>, order: &[usize]) -> Vec<Vec<usize>> {
    let place: HashMap<usize, usize> = order.iter().copied().zip(0..).collect();
    let mut rest: Vec<_> = open.into_values().filter(|batch| !batch.is_empty()).collect();
    rest.sort_by_key(|batch| place[&batch[0]]);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_one_size_and_keep_the_given_order() {
        let sizes = ["tall", "wide", "tall", "tall", "wide", "square", "tall"];
        let order = [6, 1, 5, 3, 0, 4, 2];
        assert_eq!(batches(&sizes, &order, 2), [vec![6, 3], vec![1, 4], vec![0, 2], vec![5]]);
    }

    #[test]
    fn remainders_come_last_in_the_order_of_their_first_row() {
        let sizes = [64, 32, 16, 8, 64, 64];
        assert_eq!(batches(&sizes, &[3, 2, 1, 0, 4, 5], 2), [vec![0, 4], vec![3], vec![2], vec![1], vec![5]]);
    }

    #[test]
    fn every_row_is_in_exactly_one_batch() {
        let sizes: Vec<usize> = (0..100).map(|row| row % 7).collect();
        let order: Vec<usize> = (0..100).map(|at| at * 37 % 100).collect();
        let batches = batches(&sizes, &order, 6);
        assert!(batches.iter().all(|batch| batch.iter().all(|&row| sizes[row] == sizes[batch[0]])));
        let mut rows = batches.concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..100).collect::<Vec<_>>());
    }
}
