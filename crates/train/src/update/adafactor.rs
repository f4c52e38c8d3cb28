//! Adafactor (arXiv 1804.04235) with the numbers of `transformers.optimization.Adafactor(scale_parameter=False,
//! relative_step=False)`: the learning rate is the one given, and there is no first moment.

use rayon::prelude::*;

use super::{PIECE, Step};

/// Exponent of the decay of second moments over steps: 1 − step^−0.8.
const DECAY_EXPONENT: f64 = -0.8;
/// Root mean square that longer updates are scaled down to.
const CLIP_THRESHOLD: f64 = 1.0;
/// Added to squared gradients.
const EPSILON: f64 = 1e-30;

/// Mean squares of the gradient: of whole rows and columns where there are both, or of each element.
///
/// A tensor of a higher rank counts as a matrix, its last axis being the columns.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MeanSquares {
    Factored { rows: Vec<f32>, columns: Vec<f32> },
    Whole(Vec<f32>),
}

impl MeanSquares {
    /// Before the first step.
    pub(crate) fn zeros(shape: &[usize]) -> Self {
        let len: usize = shape.iter().product();
        match shape {
            [_, .., columns] if len > 0 => {
                Self::Factored { rows: vec![0.0; len / columns], columns: vec![0.0; *columns] }
            }
            _ => Self::Whole(vec![0.0; len]),
        }
    }
}

/// Moves `parameter` and `squares` by one step.
pub(crate) fn step(parameter: &mut [f32], gradient: &[f32], squares: &mut MeanSquares, at: &Step) {
    let keep = 1.0 - (at.number as f64).powf(DECAY_EXPONENT);
    match squares {
        MeanSquares::Factored { rows, columns } => {
            let width = columns.len();
            follow(rows, &row_means(gradient, width, at), keep);
            follow(columns, &column_means(gradient, width, at), keep);
            let mean = rows.iter().copied().map(f64::from).sum::<f64>() / rows.len() as f64;
            let by_row: Vec<f32> =
                rows.iter().map(|row| (f64::from(*row) / mean).sqrt().recip() as f32).collect();
            apply(parameter, gradient, at, [&by_row, &inverse_roots(columns)]);
        }
        MeanSquares::Whole(squares) => {
            let new: Vec<f32> = gradient.iter().map(|gradient| square(*gradient, at) as f32).collect();
            follow(squares, &new, keep);
            apply(parameter, gradient, at, [&[1.0], &inverse_roots(squares)]);
        }
    }
}

fn inverse_roots(squares: &[f32]) -> Vec<f32> {
    squares.iter().map(|square| square.sqrt().recip()).collect()
}

fn square(gradient: f32, at: &Step) -> f64 {
    f64::from(gradient * at.gradient_scale).powi(2) + EPSILON
}

fn row_means(gradient: &[f32], width: usize, at: &Step) -> Vec<f32> {
    let mean =
        |row: &[f32]| (row.iter().map(|value| square(*value, at)).sum::<f64>() / row.len() as f64) as f32;
    gradient.par_chunks(width).map(mean).collect()
}

fn column_means(gradient: &[f32], width: usize, at: &Step) -> Vec<f32> {
    let piece = (PIECE / width).max(1) * width;
    let sums = |rows: &[f32]| {
        let mut sums = vec![0.0; width];
        for row in rows.chunks(width) {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += square(*value, at));
        }
        sums
    };
    let partial: Vec<Vec<f64>> = gradient.par_chunks(piece).map(sums).collect();
    let rows = (gradient.len() / width) as f64;
    (0..width).map(|column| (partial.iter().map(|sums| sums[column]).sum::<f64>() / rows) as f32).collect()
}

/// `mean ← keep · mean + (1 − keep) · new`
fn follow(means: &mut [f32], new: &[f32], keep: f64) {
    let (keep, weight) = (keep as f32, (1.0 - keep) as f32);
    means.iter_mut().zip(new).for_each(|(mean, new)| *mean = *mean * keep + weight * new);
}

/// Takes gradient · inverse root of its row and column, no longer than the threshold, off the parameter, and the decay.
fn apply(parameter: &mut [f32], gradient: &[f32], at: &Step, [by_row, by_column]: [&[f32]; 2]) {
    let width = by_column.len();
    let update = |gradient: f32, row: f32, column: f32| gradient * at.gradient_scale * (row * column);
    let lengths: Vec<f64> = gradient
        .par_chunks(width)
        .zip(by_row)
        .map(|(gradient, row)| {
            let updates =
                gradient.iter().zip(by_column).map(|(gradient, column)| update(*gradient, *row, *column));
            updates.map(|update| f64::from(update).powi(2)).sum()
        })
        .collect();
    let root_mean_square = (lengths.iter().sum::<f64>() / gradient.len() as f64).sqrt();
    let rate = (at.learning_rate / (root_mean_square / CLIP_THRESHOLD).max(1.0)) as f32;
    let decay = (1.0 - at.learning_rate * at.weight_decay) as f32;
    let rows = parameter.par_chunks_mut(width).zip(gradient.par_chunks(width)).zip(by_row);
    rows.for_each(|((parameter, gradient), row)| {
        for ((parameter, gradient), column) in parameter.iter_mut().zip(gradient).zip(by_column) {
            *parameter = *parameter * decay - rate * update(*gradient, *row, *column);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::assert_close;

    const AT: Step = Step { learning_rate: 0.1, gradient_scale: 1.0, number: 1, weight_decay: 0.0 };

    /// The squares of the first step are those of its gradient. Where that is an outer product a bᵀ, its factors give
    /// all elements exactly, and the update is the sign of the gradient: length 1, not clipped.
    #[test]
    fn the_factors_of_an_outer_product_give_every_element() {
        let gradient = [1.0, -2.0, 3.0, -2.0, 4.0, -6.0];
        let mut squares = MeanSquares::zeros(&[2, 3]);
        let mut parameter = [1.0; 6];
        step(&mut parameter, &gradient, &mut squares, &AT);
        assert_close(&parameter, &[0.9, 1.1, 0.9, 1.1, 0.9, 1.1], 1e-6);
        let MeanSquares::Factored { rows, columns } = squares else { panic!("a matrix has factors") };
        assert_close(&rows, &[14.0 / 3.0, 56.0 / 3.0], 1e-5);
        assert_close(&columns, &[2.5, 10.0, 22.5], 1e-5);
    }

    /// At step 2 the squares keep 1 − 2^−0.8 = 0.4257 of the first step's.
    #[test]
    fn updates_longer_than_the_threshold_are_scaled_down() {
        let mut squares = MeanSquares::zeros(&[2]);
        let mut parameter = [0.0; 2];
        step(&mut parameter, &[1.0, 1.0], &mut squares, &AT);
        assert_close(&parameter, &[-0.1, -0.1], 1e-6);
        step(&mut parameter, &[10.0, 10.0], &mut squares, &Step { number: 2, ..AT });
        let kept = 1.0 - 2_f32.powf(-0.8);
        let MeanSquares::Whole(squares) = squares else { panic!("a vector has no factors") };
        assert_close(&squares, &[kept + (1.0 - kept) * 100.0; 2], 1e-4);
        // 10 / √57.9 = 1.314 is longer than 1.
        assert_close(&parameter, &[-0.2, -0.2], 1e-6);
    }
}
