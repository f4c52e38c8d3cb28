//! The one matrix product of this crate, shared by the judge's layers and the kernels of [`crate::metrics`].

use gemm::Parallelism;

/// `out` = `a` `b`ᵀ on the calling thread; rows of `a` and `b` are `inner` long, `out` is row-major.
pub(crate) fn times_transposed(a: &[f32], b: &[f32], inner: usize, out: &mut [f32]) {
    let (rows, columns) = (a.len() / inner, b.len() / inner);
    assert_eq!(
        (a.len(), b.len(), out.len()),
        (rows * inner, columns * inner, rows * columns),
        "sizes of a product"
    );
    // SAFETY: the strides describe dense row-major matrices that fill `a`, `b` and `out` exactly, as asserted above;
    // `out` is borrowed uniquely, and not read because `read_dst` is false.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            out.as_mut_ptr(),
            1,
            columns as isize,
            false,
            a.as_ptr(),
            1,
            inner as isize,
            b.as_ptr(),
            inner as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_rows() {
        let mut out = [f32::NAN; 6];
        times_transposed(&[1., 2., 3., 4.], &[5., 6., 7., 8., 0., -1.], 2, &mut out);
        assert_eq!(out, [17., 23., -2., 39., 53., -4.]);
    }
}
