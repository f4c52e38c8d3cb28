//! The innermost loops: a tile of the output that stays in registers while its terms are summed.

use pulp::{MemMask, Simd};

use super::{Output, pack};
use crate::simd::{LINE, prefetch_lines};

/// The most rows of a tile, and the most registers side by side in a row.
const ROWS: usize = 8;
const REGISTERS: usize = 3;

/// Rows of a tile and registers in each, by the elements of a register. The sums, a row of the right factor and an element
/// of the left one fill the 32 registers of AVX-512 and NEON, or the 16 of AVX2 but for one, which compilers need.
pub(super) const fn shape(lanes: usize) -> (usize, usize) {
    if lanes == 8 { (6, 2) } else { (ROWS, REGISTERS) }
}

/// Some rows of a left factor.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) first: *const f32,
    /// Elements from one row of a tile to the next.
    pub(super) row_stride: usize,
    /// Elements from one term of a row to the next.
    pub(super) term_stride: usize,
    /// Elements from one tile to the next.
    pub(super) tile_stride: usize,
    pub(super) depth: usize,
    /// Terms of a part.
    pub(super) part: usize,
    pub(super) ahead: Ahead,
}

impl Rows {
    /// Leaves out the rows of the first tile.
    #[inline(always)]
    pub(super) fn skip_tile(&mut self) {
        self.first = self.first.wrapping_add(self.tile_stride);
        self.ahead.first = self.ahead.first.wrapping_add(self.ahead.tile_stride);
    }
}

/// Some terms' factors.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    pub(super) left: Rows,
    /// The right one's first row, and the elements from one row to the next, where it is read as it lies.
    pub(super) right: Option<(*const f32, usize)>,
}

/// What is read after a tile and its neighbours. A tile asks for a piece of it before each part of its terms.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) first: *const f32,
    /// Rows of a piece, and elements from one to the next.
    pub(super) rows: usize,
    pub(super) row_stride: usize,
    /// Cache lines of each of its rows.
    pub(super) lines: usize,
    /// Elements from the piece of one part to that of the next.
    pub(super) part_stride: usize,
    /// Elements from the pieces of one tile to those of its neighbour to the right.
    pub(super) panel_stride: usize,
    /// Elements from the pieces of one tile to those of the one below.
    pub(super) tile_stride: usize,
}

/// One tile of the output.
///
/// While it is computed it asks memory, a few lines at a time, for the output that it will write and for what is read
/// next. All lines at once would hold up the loads of the terms.
pub(super) struct Tile<'a> {
    /// Those of all terms.
    pub(super) factors: &'a [Factors],
    /// The right factors that are packed, one after the other, the tile's columns of each row in whole registers.
    pub(super) packed: *const f32,
    /// The tile's, of the right factors that are not.
    pub(super) first_column: usize,
    /// Its place among the tiles of the same rows.
    pub(super) index: usize,
    pub(super) into: *mut f32,
    /// Elements from one row of the output to the next.
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) start: Output<'a>,
    pub(super) scale: f32,
}

impl Tile<'_> {
    /// # Safety
    /// All rows of left factors are readable as far as they say, right factors for `registers` in as many rows,
    /// `into` may be written in `rows` rows of `columns`, and a row that is added has as many columns.
    #[inline(always)]
    pub(super) unsafe fn multiply<S: Simd>(self, simd: S, registers: usize) {
        // SAFETY: as this function's.
        unsafe {
            match registers {
                1 => self.by_rows::<S, 1>(simd),
                2 => self.by_rows::<S, 2>(simd),
                _ => self.by_rows::<S, REGISTERS>(simd),
            }
        }
    }

    #[inline(always)]
    unsafe fn by_rows<S: Simd, const R: usize>(self, simd: S) {
        // SAFETY: as `multiply`'s; the number of rows is the tile's.
        unsafe {
            match self.rows {
                1 => self.sum::<S, 1, R>(simd),
                2 => self.sum::<S, 2, R>(simd),
                3 => self.sum::<S, 3, R>(simd),
                4 => self.sum::<S, 4, R>(simd),
                5 => self.sum::<S, 5, R>(simd),
                6 => self.sum::<S, 6, R>(simd),
                7 => self.sum::<S, 7, R>(simd),
                _ => self.sum::<S, ROWS, R>(simd),
            }
        }
    }

    /// Loops over `M` and `R` are unrolled: only so do the sums stay in registers.
    #[inline(always)]
    unsafe fn sum<S: Simd, const M: usize, const R: usize>(self, simd: S) {
        let mut sums = [[simd.splat_f32s(0.0); R]; M];
        let mut packed = self.packed;
        for Factors { left, right } in self.factors {
            let (mut panel, panel_stride) = match right {
                Some((first, stride)) => (first.wrapping_add(self.first_column), *stride),
                None => (packed, R * S::F32_LANES),
            };
            let mut terms = left.first;
            let mut ahead = left.ahead.first.wrapping_add(self.index * left.ahead.panel_stride);
            let (mut rest, mut row) = (left.depth, self.into.cast_const());
            while rest > 0 {
                prefetch_lines(row, (R * S::F32_LANES).div_ceil(LINE));
                for row in 0..left.ahead.rows {
                    prefetch_lines(ahead.wrapping_add(row * left.ahead.row_stride), left.ahead.lines);
                }
                (row, ahead) = (row.wrapping_add(self.stride), ahead.wrapping_add(left.ahead.part_stride));
                let part = left.part.min(rest);
                rest -= part;
                for _ in 0..part {
                    let mut right = [simd.splat_f32s(0.0); R];
                    for (register, right) in right.iter_mut().enumerate() {
                        // SAFETY: the panel has `R` registers for each term.
                        *right = unsafe { panel.cast::<S::f32s>().add(register).read_unaligned() };
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: each of the `M` rows has `depth` elements.
                        let left = simd.splat_f32s(unsafe { *terms.add(row * left.row_stride) });
                        for (sum, right) in sums.iter_mut().zip(right) {
                            *sum = simd.mul_add_f32s(left, right, *sum);
                        }
                    }
                    terms = terms.wrapping_add(left.term_stride);
                    panel = panel.wrapping_add(panel_stride);
                }
            }
            if right.is_none() {
                packed = panel;
            }
        }
        // SAFETY: as `multiply`'s.
        unsafe { self.store(simd, sums) };
    }

    #[inline(always)]
    unsafe fn store<S: Simd, const M: usize, const R: usize>(self, simd: S, sums: [[S::f32s; R]; M]) {
        let scale = simd.splat_f32s(self.scale);
        let last = self.columns - (R - 1) * S::F32_LANES;
        let edge = Edge { is_full: last == S::F32_LANES, mask: mask(simd, last) };
        let (added, added_stride) = match self.start {
            Output::Overwrite => (None, 0),
            Output::Accumulate => (Some(self.into.cast_const()), self.stride),
            Output::Row(row) => (Some(row.as_ptr()), 0),
        };
        // Two loops, not one with a branch: each is short enough to be unrolled.
        // SAFETY: lanes past the last column are masked, everything else is inside of what `multiply` was promised.
        unsafe {
            if let Some(added) = added {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (register, sum) in sums.into_iter().enumerate() {
                        let (edge, column) = ((register + 1 == R).then_some(&edge), register * S::F32_LANES);
                        let added = load(simd, edge, added.add(row * added_stride + column));
                        let sum = simd.mul_add_f32s(sum, scale, added);
                        store(simd, edge, self.into.add(row * self.stride + column), sum);
                    }
                }
            } else {
                for (row, sums) in sums.into_iter().enumerate() {
                    for (register, sum) in sums.into_iter().enumerate() {
                        let (edge, column) = ((register + 1 == R).then_some(&edge), register * S::F32_LANES);
                        let sum = simd.mul_f32s(sum, scale);
                        store(simd, edge, self.into.add(row * self.stride + column), sum);
                    }
                }
            }
        }
    }
}

/// A tile whose columns become rows of the output.
pub(super) struct Turned {
    /// [`ROWS`] rows of [`WIDTH`].
    pub(super) sums: [f32; ROWS * WIDTH],
    columns: [f32; ROWS * WIDTH],
}

/// The most columns of a tile.
pub(super) const WIDTH: usize = REGISTERS * 16;

impl Turned {
    pub(super) const fn new() -> Self {
        Self { sums: [0.0; ROWS * WIDTH], columns: [0.0; ROWS * WIDTH] }
    }

    /// Writes some rows and columns of the sums as columns and rows.
    ///
    /// # Safety
    /// `into` may be written in as many rows as there are columns, `stride` elements apart, as far as there are rows.
    #[inline(always)]
    pub(super) unsafe fn write(
        &mut self,
        into: *mut f32,
        stride: usize,
        [rows, columns]: [usize; 2],
        start: Output,
    ) {
        pack::transpose(&self.sums, WIDTH, [rows, columns], &mut self.columns, ROWS);
        for (column, sums) in self.columns.chunks_exact(ROWS).take(columns).enumerate() {
            // SAFETY: as this function's.
            let into = unsafe { std::slice::from_raw_parts_mut(into.wrapping_add(column * stride), rows) };
            match start {
                Output::Overwrite => into.copy_from_slice(&sums[..rows]),
                Output::Accumulate => into.iter_mut().zip(sums).for_each(|(into, sum)| *into += sum),
                Output::Row(row) => {
                    into.iter_mut().zip(sums).zip(row).for_each(|((into, sum), added)| *into = sum + added);
                }
            }
        }
    }
}

/// The last register of a row.
struct Edge<S: Simd> {
    is_full: bool,
    mask: MemMask<S::m32s>,
}

/// The first lanes. Without pulp's shortcuts, which are calls.
#[inline(always)]
fn mask<S: Simd>(simd: S, lanes: usize) -> MemMask<S::m32s> {
    MemMask::new(simd.mask_between_m32s(0, lanes as u32).mask())
}

/// # Safety
/// What the register holds of a row may be read.
#[inline(always)]
unsafe fn load<S: Simd>(simd: S, edge: Option<&Edge<S>>, from: *const f32) -> S::f32s {
    match edge {
        // SAFETY: as this function's.
        Some(edge) if !edge.is_full => unsafe { simd.mask_load_ptr_f32s(edge.mask, from) },
        // SAFETY: as this function's.
        _ => unsafe { from.cast::<S::f32s>().read_unaligned() },
    }
}

/// # Safety
/// What the register holds of a row may be written.
#[inline(always)]
unsafe fn store<S: Simd>(simd: S, edge: Option<&Edge<S>>, into: *mut f32, values: S::f32s) {
    match edge {
        // SAFETY: as this function's.
        Some(edge) if !edge.is_full => unsafe { simd.mask_store_ptr_f32s(edge.mask, into, values) },
        // SAFETY: as this function's.
        _ => unsafe { into.cast::<S::f32s>().write_unaligned(values) },
    }
}
