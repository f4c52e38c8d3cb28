//! Fixed cuts of a tensor's rows, and all cores to work on them.
//!
//! The cuts depend on shapes only, never on the number of threads or on timing, and partial sums are added in the
//! order of the cuts: results have the same bits on every run.

mod pool;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::simd;

/// Elements of one piece of work: small enough for the second-level cache, large enough to hide what sharing it out costs.
const PIECE: usize = 16 * 1024;

/// Calls `work` with every piece, on all cores, and returns when all are done.
///
/// Work from inside of a piece is not shared out again: it is done where it comes up.
pub(crate) fn for_each<T: Send>(pieces: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let pieces: Vec<Mutex<Option<T>>> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
    pool::for_each_index(pieces.len(), &|index| {
        let piece = pieces[index].lock().unwrap_or_else(PoisonError::into_inner).take();
        work(piece.expect("an index comes once"));
    });
}

/// What `work` makes of every piece, in their order.
pub(crate) fn map<T: Send, R: Send>(
    pieces: impl ExactSizeIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let mut results: Vec<Option<R>> = (0..pieces.len()).map(|_| None).collect();
    for_each(pieces.zip(&mut results), |(piece, result)| *result = Some(work(piece)));
    results.into_iter().map(|result| result.expect("for_each leaves no piece out")).collect()
}

/// Calls `body(first row, rows)` on blocks of rows of `output`, on all cores and vectorised.
///
/// Mark `body` `#[inline(always)]`.
#[inline(always)]
pub(crate) fn for_row_blocks(output: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_piece(width);
    for_each(output.chunks_mut(rows * width).enumerate(), |(index, block)| {
        simd::vectorized(
            #[inline(always)]
            || body(index * rows, block),
        );
    });
}

/// Rows of one sample that one thread works on.
pub(crate) struct Unit {
    pub(crate) sample: usize,
    /// Counted within the sample.
    pub(crate) rows: Range<usize>,
}

/// Cuts `batch` samples of `rows` rows each, `width` elements a row, into units, in order.
pub(crate) fn units(batch: usize, rows: usize, width: usize) -> Vec<Unit> {
    units_of(batch, rows, rows_per_piece(width))
}

/// Cuts `batch` samples of `rows` rows each into units of at most `step` rows, in order.
fn units_of(batch: usize, rows: usize, step: usize) -> Vec<Unit> {
    (0..batch)
        .flat_map(|sample| {
            (0..rows).step_by(step).map(move |start| Unit { sample, rows: start..rows.min(start + step) })
        })
        .collect()
}

/// The part of `buffer` that belongs to each unit, `width` elements a row.
pub(crate) fn pieces<'a>(buffer: &'a mut [f32], units: &[Unit], width: usize) -> Vec<&'a mut [f32]> {
    let mut rest = buffer;
    let mut pieces = Vec::with_capacity(units.len());
    for unit in units {
        let (piece, tail) = rest.split_at_mut(unit.rows.len() * width);
        pieces.push(piece);
        rest = tail;
    }
    assert!(rest.is_empty(), "{} elements belong to no unit", rest.len());
    pieces
}

/// Sums of some columns of a row-major matrix that is `width` wide.
pub(crate) fn column_sums(matrix: &[f32], width: usize, columns: Range<usize>) -> Vec<f32> {
    let block = rows_per_piece(width) * width;
    let mut partial = vec![0.0; matrix.len().div_ceil(block) * columns.len()];
    for_each(matrix.chunks(block).zip(partial.chunks_mut(columns.len())), |(block, sums)| {
        simd::vectorized(
            #[inline(always)]
            || block.chunks_exact(width).for_each(|row| simd::add_to(sums, &row[columns.clone()])),
        );
    });
    sum_rows(&partial, columns.len())
}

/// Sums of the columns of a small matrix, on one core.
pub(crate) fn sum_rows(matrix: &[f32], width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    for row in matrix.chunks_exact(width) {
        simd::add_to(&mut total, row);
    }
    total
}

/// Rows of a piece of work.
pub(crate) fn rows_per_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_every_row_once_and_never_two_samples() {
        let units = units_of(3, 10, 4);
        let rows: Vec<(usize, usize)> =
            units.iter().flat_map(|unit| unit.rows.clone().map(|row| (unit.sample, row))).collect();
        let expected: Vec<(usize, usize)> =
            (0..3).flat_map(|sample| (0..10).map(move |row| (sample, row))).collect();
        assert_eq!(rows, expected);
        assert!(units.iter().all(|unit| unit.rows.len() <= 4));
    }

    #[test]
    fn column_sums_cross_the_blocks() {
        let (rows, width) = (3 * PIECE / 5 + 7, 5);
        let matrix: Vec<f32> = (0..rows * width).map(|index| (index % width) as f32).collect();
        let rows = rows as f32;
        assert_eq!(column_sums(&matrix, width, 2..5), [2.0 * rows, 3.0 * rows, 4.0 * rows]);
    }
}
