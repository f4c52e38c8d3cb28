//! Factors laid out as the tiles read them: the right one in panels of whole registers, the left one in tiles of rows.

use std::cell::Cell;
use std::ops::Range;

use pulp::Simd;

use super::tile::{self, Ahead, Rows};
use super::{LEFT_ROWS, Matrix, Panel, Strided};
use crate::simd::{self, LINE};
use crate::weight::Numbers;

thread_local! {
    /// Used again for every piece that the thread works on.
    pub(super) static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::empty()) };
}

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    panels: Lines,
    left: Lines,
    /// Numbers of a right factor as f32, before they are transposed.
    widened: Vec<f32>,
}

impl Scratch {
    const fn empty() -> Self {
        Self { panels: Lines(Vec::new()), left: Lines(Vec::new()), widened: Vec::new() }
    }

    /// Makes room for so many elements of panels and of left factors.
    pub(super) fn reserve(&mut self, panels: usize, left: usize) {
        self.panels.reserve(panels);
        self.left.reserve(left);
    }

    /// The panels from an element on.
    pub(super) fn panels(&self, offset: usize) -> *const f32 {
        self.panels.elements()[offset..].as_ptr()
    }
}

/// Elements that start at a cache line, so that no register of a panel lies across two.
#[derive(Default)]
struct Lines(Vec<f32>);

impl Lines {
    const LINE_BYTES: usize = 64;

    fn reserve(&mut self, elements: usize) {
        let len = elements + Self::LINE_BYTES / size_of::<f32>();
        if self.0.len() < len {
            self.0.resize(len, 0.0);
        }
    }

    fn elements(&self) -> &[f32] {
        &self.0[self.0.as_ptr().align_offset(Self::LINE_BYTES)..]
    }

    fn elements_mut(&mut self) -> &mut [f32] {
        let skipped = self.0.as_ptr().align_offset(Self::LINE_BYTES);
        &mut self.0[skipped..]
    }
}

/// Rows and columns that a block is transposed in.
const BLOCK: usize = 8;

/// A right factor's part in the panels of a piece.
pub(super) struct Part<'a> {
    pub(super) right: Matrix<'a>,
    pub(super) rows: Range<usize>,
    /// Rows of earlier terms above it in each panel.
    pub(super) before: usize,
    /// Rows of each panel.
    pub(super) depth: usize,
}

/// Lays the panels' columns of some of the factor's rows down as whole registers, row by row; zeros fill the last one.
#[inline(always)]
pub(super) fn pack_right<S: Simd>(simd: S, part: Part, panels: &[Panel], scratch: &mut Scratch) {
    if part.right.shape.column_stride == 1 {
        pack_rows(simd, part, panels, scratch);
    } else {
        pack_columns::<S>(part, panels, scratch);
    }
}

/// Rows, or columns, from the one that is copied to the one that memory is asked for.
const LINES_AHEAD: usize = 16;

/// Of contiguous rows. Row by row through all panels, as memory is read best.
#[inline(always)]
fn pack_rows<S: Simd>(simd: S, part: Part, panels: &[Panel], scratch: &mut Scratch) {
    let Part { right, rows, before, depth } = part;
    let all = scratch.panels.elements_mut();
    for (row, index) in (before..).zip(rows) {
        let mut offset = 0;
        for Panel { columns, registers } in panels {
            let width = registers * S::F32_LANES;
            let (target, rest) = all[offset + row * width..][..width].split_at_mut(columns.len());
            let start = index * right.shape.row_stride + columns.start;
            match right.values {
                Numbers::F32(values) => {
                    let ahead = values.as_ptr().wrapping_add(start + LINES_AHEAD * right.shape.row_stride);
                    simd::prefetch_lines(ahead, columns.len().div_ceil(LINE));
                    copy(simd, &values[start..][..columns.len()], target);
                }
                numbers => numbers.widen(start..start + columns.len(), target),
            }
            rest.fill(0.0);
            offset += depth * width;
        }
    }
}

/// Of contiguous columns, or of elements that lie apart.
#[inline(always)]
fn pack_columns<S: Simd>(part: Part, panels: &[Panel], scratch: &mut Scratch) {
    let Part { right, rows, before, depth } = part;
    let Strided { row_stride, column_stride, .. } = right.shape;
    let Scratch { panels: all, widened, .. } = scratch;
    let mut offset = 0;
    for Panel { columns, registers } in panels {
        let width = registers * S::F32_LANES;
        let target = &mut all.elements_mut()[offset + before * width..][..rows.len() * width];
        for column in columns.clone().step_by(BLOCK) {
            let block = [BLOCK.min(columns.end - column), rows.len()];
            let start = column * column_stride + rows.start * row_stride;
            let into = &mut target[column - columns.start..];
            match right.values {
                Numbers::F32(values) if row_stride == 1 => {
                    transpose(&values[start..], column_stride, block, into, width);
                }
                numbers => {
                    widened.resize(BLOCK * rows.len(), 0.0);
                    for (index, widened) in widened.chunks_exact_mut(rows.len()).enumerate().take(block[0]) {
                        widen(numbers, start + index * column_stride, row_stride, widened);
                    }
                    transpose(widened, rows.len(), block, into, width);
                }
            }
        }
        for row in target.chunks_exact_mut(width) {
            row[columns.len()..].fill(0.0);
        }
        offset += depth * width;
    }
}

/// Numbers that lie `stride` apart as f32.
#[inline(always)]
fn widen(numbers: Numbers, start: usize, stride: usize, target: &mut [f32]) {
    if stride == 1 {
        return numbers.widen(start..start + target.len(), target);
    }
    for (index, target) in target.iter_mut().enumerate() {
        let at = start + index * stride;
        numbers.widen(at..at + 1, std::slice::from_mut(target));
    }
}

/// `copy_from_slice` for a few registers, without the call.
#[inline(always)]
fn copy<S: Simd>(_: S, source: &[f32], target: &mut [f32]) {
    let ((source, source_rest), (target, target_rest)) =
        (S::as_simd_f32s(source), S::as_mut_simd_f32s(target));
    for (target, source) in target.iter_mut().zip(source) {
        *target = *source;
    }
    for (target, source) in target_rest.iter_mut().zip(source_rest) {
        *target = *source;
    }
}

/// Whether a left factor's rows are read as they lie.
#[inline(always)]
pub(super) fn lies_in_rows(left: Matrix) -> bool {
    left.shape.column_stride == 1
}

/// Lays some columns of some rows down, at `offset`, where rows are not contiguous: tile by tile, in each tile column by
/// column, as the tile reads them. The last tile has room for as many rows as the others.
#[inline(always)]
pub(super) fn pack_left<S: Simd>(
    left: Matrix,
    rows: Range<usize>,
    columns: Range<usize>,
    offset: usize,
    scratch: &mut Scratch,
) {
    if lies_in_rows(left) {
        return;
    }
    let (tile_rows, _) = tile::shape(S::F32_LANES);
    let (depth, count) = (columns.len(), rows.len());
    let Strided { row_stride, column_stride, .. } = left.shape;
    let source = &left.values.f32s()[rows.start * row_stride + columns.start * column_stride..];
    let target = &mut scratch.left.elements_mut()[offset..][..count.next_multiple_of(tile_rows) * depth];
    // Whole tiles of contiguous columns are copied, without a call: the number of rows is known when this is compiled.
    let copied = if row_stride == 1 { count / tile_rows * tile_rows } else { 0 };
    for column in 0..depth {
        let source = &source[column * column_stride..];
        if row_stride == 1 {
            let ahead = source.as_ptr().wrapping_add(LINES_AHEAD * column_stride);
            simd::prefetch_lines(ahead, count.div_ceil(LINE));
        }
        for (tile, source) in source[..copied].chunks_exact(tile_rows).enumerate() {
            target[(tile * depth + column) * tile_rows..][..tile_rows].copy_from_slice(source);
        }
        for row in copied..count {
            let tile = row / tile_rows;
            target[(tile * depth + column) * tile_rows + row % tile_rows] = source[row * row_stride];
        }
    }
}

/// The tiles that read the same rows of a left factor.
#[derive(Clone, Copy)]
pub(super) struct Neighbours {
    /// How many there are.
    pub(super) panels: usize,
    /// Of the next rows, where they are read as they lie, so many are asked for by each.
    pub(super) rows_ahead: usize,
}

/// Some columns of some rows: where they lie, or where [`pack_left`] laid them.
#[inline(always)]
pub(super) fn left_rows<S: Simd>(
    left: Matrix,
    rows: Range<usize>,
    columns: Range<usize>,
    offset: usize,
    neighbours: Neighbours,
    scratch: &Scratch,
) -> Rows {
    let (tile_rows, _) = tile::shape(S::F32_LANES);
    let depth = columns.len();
    let Strided { row_stride, column_stride, .. } = left.shape;
    let source = left.values.f32s()[rows.start * row_stride + columns.start * column_stride..].as_ptr();
    let part = depth.div_ceil(tile_rows).max(LINE);
    if lies_in_rows(left) {
        let (rows, tile_stride) = (neighbours.rows_ahead, tile_rows * row_stride);
        let ahead = Ahead {
            first: source.wrapping_add(tile_stride),
            rows,
            row_stride,
            lines: part.div_ceil(LINE),
            part_stride: part,
            panel_stride: rows * row_stride,
            tile_stride,
        };
        return Rows { first: source, row_stride, term_stride: 1, tile_stride, depth, part, ahead };
    }
    // Each tile asks for some of the columns that are packed next.
    let panel_stride = tile_rows * column_stride;
    let ahead = Ahead {
        first: source.wrapping_add(LEFT_ROWS * row_stride),
        rows: 1,
        row_stride,
        lines: LEFT_ROWS / LINE,
        part_stride: column_stride,
        panel_stride,
        tile_stride: neighbours.panels * panel_stride,
    };
    let first = scratch.left.elements()[offset..].as_ptr();
    Rows { first, row_stride: 1, term_stride: tile_rows, tile_stride: tile_rows * depth, depth, part, ahead }
}

/// Where some rows of a right factor lie, and the elements from one to the next.
pub(super) fn right_rows(right: Matrix, rows: Range<usize>) -> (*const f32, usize) {
    let stride = right.shape.row_stride;
    (right.values.f32s()[rows.start * stride..].as_ptr(), stride)
}

/// Writes `source`, `rows` rows of `columns`, as columns: `target[column · target_stride + row]`.
#[inline(always)]
pub(super) fn transpose(
    source: &[f32],
    source_stride: usize,
    [rows, columns]: [usize; 2],
    target: &mut [f32],
    target_stride: usize,
) {
    let in_blocks =
        if blocks::available() { [rows / BLOCK * BLOCK, columns / BLOCK * BLOCK] } else { [0, 0] };
    let [block_rows, block_columns] = in_blocks;
    if block_rows > 0 && block_columns > 0 {
        assert!((block_rows - 1) * source_stride + block_columns <= source.len());
        assert!((block_columns - 1) * target_stride + block_rows <= target.len());
        // SAFETY: AVX is there, and the assertions cover the last element that is read and that is written.
        unsafe {
            blocks::transpose(source.as_ptr(), source_stride, in_blocks, target.as_mut_ptr(), target_stride)
        };
    }
    for row in 0..rows {
        let done = if row < block_rows { block_columns } else { 0 };
        for column in done..columns {
            target[column * target_stride + row] = source[row * source_stride + column];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod blocks {
    //! Transposing blocks of 8 × 8 in registers: several times as fast as element by element.

    use std::arch::x86_64::{
        __m256, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::BLOCK;
    use crate::simd;

    pub(super) fn available() -> bool {
        std::arch::is_x86_feature_detected!("avx")
    }

    /// # Safety
    /// The processor has AVX, `rows` and `columns` are multiples of [`BLOCK`], `source` may be read in so many rows and
    /// columns, and `target` written in as many columns and rows.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn transpose(
        source: *const f32,
        source_stride: usize,
        [rows, columns]: [usize; 2],
        target: *mut f32,
        target_stride: usize,
    ) {
        for row in (0..rows).step_by(BLOCK) {
            for column in (0..columns).step_by(BLOCK) {
                // SAFETY: the block lies inside of both.
                unsafe {
                    let source = source.add(row * source_stride + column);
                    if column.is_multiple_of(simd::LINE) {
                        // What the next call, or the next rows of this one, will read.
                        for row in BLOCK..2 * BLOCK {
                            simd::prefetch(source.wrapping_add(row * source_stride));
                        }
                    }
                    let block: [__m256; BLOCK] =
                        std::array::from_fn(|row| _mm256_loadu_ps(source.add(row * source_stride)));
                    let target = target.add(column * target_stride + row);
                    for (column, values) in transposed(block).into_iter().enumerate() {
                        _mm256_storeu_ps(target.add(column * target_stride), values);
                    }
                }
            }
        }
    }

    /// Pairs of rows, then pairs of pairs, then halves of registers are interleaved.
    #[inline]
    #[target_feature(enable = "avx")]
    fn transposed(rows: [__m256; BLOCK]) -> [__m256; BLOCK] {
        let [a, b, c, d] = pair_up([rows[0], rows[1], rows[2], rows[3]]);
        let [e, f, g, h] = pair_up([rows[4], rows[5], rows[6], rows[7]]);
        [
            _mm256_permute2f128_ps::<0x20>(a, e),
            _mm256_permute2f128_ps::<0x20>(b, f),
            _mm256_permute2f128_ps::<0x20>(c, g),
            _mm256_permute2f128_ps::<0x20>(d, h),
            _mm256_permute2f128_ps::<0x31>(a, e),
            _mm256_permute2f128_ps::<0x31>(b, f),
            _mm256_permute2f128_ps::<0x31>(c, g),
            _mm256_permute2f128_ps::<0x31>(d, h),
        ]
    }

    /// Columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 of four rows.
    #[inline]
    #[target_feature(enable = "avx")]
    fn pair_up(rows: [__m256; 4]) -> [__m256; 4] {
        let (low, high) = (_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1]));
        let (next_low, next_high) =
            (_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3]));
        [
            _mm256_shuffle_ps::<0x44>(low, next_low),
            _mm256_shuffle_ps::<0xee>(low, next_low),
            _mm256_shuffle_ps::<0x44>(high, next_high),
            _mm256_shuffle_ps::<0xee>(high, next_high),
        ]
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod blocks {
    //! Other machines transpose element by element.

    pub(super) fn available() -> bool {
        false
    }

    pub(super) unsafe fn transpose(_: *const f32, _: usize, _: [usize; 2], _: *mut f32, _: usize) {
        unreachable!("no block is transposed where none is available")
    }
}
