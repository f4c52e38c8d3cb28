//! Transposing a weight on its way into a matrix product.
//!
//! The `gemm` crate packs a factor whose rows are not contiguous number by number, and up to a size on one core. At a few
//! hundred tokens that takes as long as a fifth of the product itself; this takes a tenth of that.

use rayon::prelude::*;

/// Side of a tile that is turned in registers.
const TILE: usize = 8;

/// Columns of the source that one piece of work reads: whole cache lines of a row.
const STRIP: usize = 32;

/// Writes the `[rows, columns]` matrix `from` as `[columns, rows]`, each number widened on the way, on all cores.
pub(crate) fn transpose<T: Copy + Sync>(
    from: &[T],
    [rows, columns]: [usize; 2],
    into: &mut [f32],
    widen: impl Fn(T) -> f32 + Sync,
) {
    assert_eq!((from.len(), into.len()), (rows * columns, rows * columns), "a matrix and its transpose");
    if rows == 0 {
        return;
    }
    let turn = Turn::new();
    into.par_chunks_mut(STRIP * rows).enumerate().for_each(|(index, strip)| {
        turn.strip(&from[index * STRIP..], [rows, columns], strip, &widen);
    });
}

/// How a tile is turned on this machine.
#[derive(Clone, Copy)]
enum Turn {
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    Plain,
}

impl Turn {
    fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Self::Avx2(simd);
        }
        Self::Plain
    }

    /// Turns as many columns, from the first of `from` on, as `into` has rows.
    fn strip<T: Copy>(
        self,
        from: &[T],
        shape: [usize; 2],
        into: &mut [f32],
        widen: &(impl Fn(T) -> f32 + Sync),
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(
                #[inline(always)]
                || strip(from, shape, into, widen, |tile| avx2(simd, tile)),
            ),
            Self::Plain => strip(from, shape, into, widen, plain),
        }
    }
}

#[inline(always)]
fn strip<T: Copy>(
    from: &[T],
    [rows, columns]: [usize; 2],
    into: &mut [f32],
    widen: &impl Fn(T) -> f32,
    turn: impl Fn([[f32; TILE]; TILE]) -> [[f32; TILE]; TILE],
) {
    let width = into.len() / rows;
    let (whole_rows, whole_columns) = (rows / TILE * TILE, width / TILE * TILE);
    for row in (0..whole_rows).step_by(TILE) {
        for column in (0..whole_columns).step_by(TILE) {
            let tile = std::array::from_fn(|index| {
                let line: [T; TILE] =
                    from[(row + index) * columns + column..][..TILE].try_into().expect("that long");
                line.map(widen)
            });
            for (index, line) in turn(tile).iter().enumerate() {
                into[(column + index) * rows + row..][..TILE].copy_from_slice(line);
            }
        }
    }
    for row in 0..rows {
        let first = if row < whole_rows { whole_columns } else { 0 };
        for column in first..width {
            into[column * rows + row] = widen(from[row * columns + column]);
        }
    }
}

#[inline(always)]
fn plain(tile: [[f32; TILE]; TILE]) -> [[f32; TILE]; TILE] {
    std::array::from_fn(|column| std::array::from_fn(|row| tile[row][column]))
}

/// Pairs of rows, pairs of pairs, then the halves of the registers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn avx2(simd: pulp::x86::V3, tile: [[f32; TILE]; TILE]) -> [[f32; TILE]; TILE] {
    use std::arch::x86_64::__m256;
    let avx = simd.avx;
    let rows: [__m256; TILE] = tile.map(|row| pulp::cast(row));
    let pairs: [__m256; TILE] = std::array::from_fn(|index| {
        let (first, second) = (rows[index / 2 * 2], rows[index / 2 * 2 + 1]);
        match index % 2 {
            0 => avx._mm256_unpacklo_ps(first, second),
            _ => avx._mm256_unpackhi_ps(first, second),
        }
    });
    let fours: [__m256; TILE] = std::array::from_fn(|index| {
        let (half, part) = (index / 4 * 4, index % 4);
        let (first, second) = (pairs[half + part / 2], pairs[half + part / 2 + 2]);
        match part % 2 {
            0 => avx._mm256_shuffle_ps::<0b01_00_01_00>(first, second),
            _ => avx._mm256_shuffle_ps::<0b11_10_11_10>(first, second),
        }
    });
    std::array::from_fn(|index| {
        let (first, second) = (fours[index % 4], fours[index % 4 + 4]);
        pulp::cast(match index / 4 {
            0 => avx._mm256_permute2f128_ps::<0x20>(first, second),
            _ => avx._mm256_permute2f128_ps::<0x31>(first, second),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn every_number_changes_row_with_column() {
        for shape in [[1, 1], [8, 8], [7, 9], [16, 40], [33, 65], [5, 100], [100, 3], [64, 32]] {
            let [rows, columns] = shape;
            let from: Vec<f32> = (0..rows * columns).map(|index| index as f32).collect();
            let expected: Vec<f32> =
                (0..rows * columns).map(|index| from[index % rows * columns + index / rows]).collect();
            let mut into = vec![f32::NAN; from.len()];
            transpose(&from, shape, &mut into, |x| x);
            assert_eq!(into, expected, "{shape:?}");
            let mut by_halves = vec![f32::NAN; from.len()];
            let halves: Vec<bf16> = from.iter().map(|x| bf16::from_f32(*x)).collect();
            transpose(&halves, shape, &mut by_halves, bf16::to_f32);
            let rounded: Vec<f32> = expected.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            assert_eq!(by_halves, rounded, "{shape:?}");
        }
        let simple: [[f32; TILE]; TILE] =
            std::array::from_fn(|row| std::array::from_fn(|column| (row * TILE + column) as f32));
        #[cfg(target_arch = "x86_64")]
        if let Turn::Avx2(simd) = Turn::new() {
            assert_eq!(avx2(simd, simple), plain(simple));
        }
        assert_eq!(plain(plain(simple)), simple);
    }
}
