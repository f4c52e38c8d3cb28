//! Matrix products on strided views, by the `gemm` crate.

use gemm::{Parallelism, gemm};

/// A read-only strided view.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    shape: Strided,
}

/// A writable view with contiguous rows.
pub(crate) struct MatrixMut<'a> {
    values: &'a mut [f32],
    shape: Strided,
}

#[derive(Clone, Copy)]
struct Strided {
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Strided {
    /// Number of elements from the first to the last, both included.
    fn span(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

impl<'a> Matrix<'a> {
    /// Row-major values without gaps.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Row-major values, `row_stride` elements from one row to the next.
    pub(crate) fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { values, shape: Strided { rows, columns, row_stride, column_stride: 1 } }
    }

    pub(crate) fn transposed(self) -> Self {
        let Strided { rows, columns, row_stride, column_stride } = self.shape;
        let shape =
            Strided { rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride };
        Self { values: self.values, shape }
    }
}

impl<'a> MatrixMut<'a> {
    /// Row-major values without gaps.
    pub(crate) fn new(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Row-major values, `row_stride` elements from one row to the next.
    pub(crate) fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(row_stride >= columns, "rows of {columns} elements overlap at a stride of {row_stride}");
        Self { values, shape: Strided { rows, columns, row_stride, column_stride: 1 } }
    }
}

/// What a product does with the values that its output already holds.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Output {
    Overwrite,
    Accumulate,
}

/// Cores a product runs on.
#[derive(Clone, Copy)]
pub(crate) enum Cores {
    /// For products inside of a parallel loop.
    One,
    All,
}

/// `output = scale · left · right`, or `+=`.
pub(crate) fn multiply(into: (MatrixMut, Output), scale: f32, left: Matrix, right: Matrix, cores: Cores) {
    let (into, output) = into;
    let (c, a, b) = (into.shape, left.shape, right.shape);
    assert_eq!((a.rows, a.columns), (c.rows, b.rows), "left factor's rows and columns");
    assert_eq!(b.columns, c.columns, "right factor's columns");
    assert!(c.span() <= into.values.len() && a.span() <= left.values.len() && b.span() <= right.values.len());
    let parallelism = match cores {
        Cores::One => Parallelism::None,
        Cores::All => Parallelism::Rayon(0),
    };
    // SAFETY: the assertions above keep every element of the three views inside its slice, `into` is borrowed
    // exclusively and its rows do not overlap, and f32 slices are aligned.
    unsafe {
        gemm(
            c.rows,
            c.columns,
            a.columns,
            into.values.as_mut_ptr(),
            c.column_stride as isize,
            c.row_stride as isize,
            output == Output::Accumulate,
            left.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            right.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::{assert_close, random_values};

    #[test]
    fn strided_products_agree_with_three_loops() {
        for (rows, columns, depth) in [(1, 1, 1), (7, 5, 3), (78, 79, 64), (33, 130, 17), (5, 8, 300)] {
            for (cores, mode) in [(Cores::One, Output::Overwrite), (Cores::All, Output::Accumulate)] {
                let (stride, left) = (columns + 3, random_values(depth * rows, 1));
                let right = random_values(columns * depth, 2);
                let before = random_values(rows * stride, 3);
                let mut found = before.clone();
                let into = MatrixMut::strided(&mut found, rows, columns, stride);
                // Both factors are stored transposed.
                let (a, b) = (Matrix::new(&left, depth, rows), Matrix::new(&right, columns, depth));
                multiply((into, mode), 0.5, a.transposed(), b.transposed(), cores);
                let mut expected = before;
                for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                    let terms = (0..depth).map(|k| left[k * rows + row] * right[column * depth + k]);
                    let kept = if mode == Output::Accumulate { expected[row * stride + column] } else { 0.0 };
                    expected[row * stride + column] = kept + 0.5 * terms.sum::<f32>();
                }
                // Sums of up to 300 products in another order.
                assert_close(&found, &expected, 2e-5);
            }
        }
    }

    #[test]
    #[should_panic(expected = "left factor's rows and columns")]
    fn factors_that_do_not_fit_are_refused() {
        let mut output = [0.0; 4];
        let into = MatrixMut::new(&mut output, 2, 2);
        multiply(
            (into, Output::Overwrite),
            1.0,
            Matrix::new(&[1.0; 6], 2, 3),
            Matrix::new(&[1.0; 4], 2, 2),
            Cores::One,
        );
    }
}
