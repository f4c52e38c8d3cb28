//! Sums of matrix products on strided views.
//!
//! The output is cut into pieces of rows and columns. A piece packs its columns of the right factors into panels as
//! wide as a tile of registers, and reads the left factors as they lie (the loops of Goto and van de Geijn, "Anatomy of
//! High-Performance Matrix Multiplication", 2008). The `gemm` crate packs a transposed factor on one core before it
//! starts, which is a quarter of the time of a weight that few rows meet; here each piece packs its own part, widens stored
//! weights of two bytes on the way, and adds a low-rank branch before the output is written. Where few rows meet the right
//! factor, packing it would take too long: it is read as it lies, or, if its columns are contiguous, becomes the left
//! factor of the transpose. LOG.md has the comparisons.
//!
//! Every element is summed in the same order however many threads there are.

mod pack;
mod tile;

use std::marker::PhantomData;
use std::ops::Range;

use crate::weight::Numbers;
use crate::{parallel, simd};

/// A read-only strided view.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: Numbers<'a>,
    shape: Strided,
}

/// A writable view with contiguous rows.
pub(crate) struct MatrixMut<'a> {
    /// All elements of the rows are borrowed exclusively, but for those of views that [`MatrixMut::split_columns`] cut off.
    first: *mut f32,
    shape: Strided,
    borrow: PhantomData<&'a mut [f32]>,
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
        Self { values: Numbers::F32(values), shape: Strided { rows, columns, row_stride, column_stride: 1 } }
    }

    /// Row-major numbers without gaps: a right factor, which is read as f32.
    pub(crate) fn of_numbers(values: Numbers<'a>, rows: usize, columns: usize) -> Self {
        Self { values, shape: Strided { rows, columns, row_stride: columns, column_stride: 1 } }
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
        let shape = Strided { rows, columns, row_stride, column_stride: 1 };
        assert!(shape.span() <= values.len(), "{} elements of {rows} rows", values.len());
        Self { first: values.as_mut_ptr(), shape, borrow: PhantomData }
    }

    /// The first columns, and the rest.
    pub(crate) fn split_columns(self, columns: usize) -> (Self, Self) {
        assert!(columns <= self.shape.columns, "{columns} of {} columns", self.shape.columns);
        let rest = Strided { columns: self.shape.columns - columns, ..self.shape };
        let rest = Self { first: self.first.wrapping_add(columns), shape: rest, borrow: PhantomData };
        (Self { shape: Strided { columns, ..self.shape }, ..self }, rest)
    }

    /// The first rows, and the rest.
    pub(crate) fn split_rows(self, rows: usize) -> (Self, Self) {
        assert!(rows <= self.shape.rows, "{rows} of {} rows", self.shape.rows);
        let rest = Strided { rows: self.shape.rows - rows, ..self.shape };
        let first = self.first.wrapping_add(rows * self.shape.row_stride);
        (Self { shape: Strided { rows, ..self.shape }, ..self }, Self { first, shape: rest, ..self })
    }
}

// SAFETY: it stands for an exclusive borrow of elements that no other view has.
unsafe impl Send for MatrixMut<'_> {}

/// What is added to a product.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a> {
    /// Nothing: the output may hold anything before.
    Overwrite,
    /// The values that the output already holds.
    Accumulate,
    /// This row, to every row.
    Row(&'a [f32]),
}

/// `into = start + scale · Σ left · right` over all terms.
pub(crate) struct Product<'a> {
    pub(crate) into: MatrixMut<'a>,
    pub(crate) start: Output<'a>,
    pub(crate) scale: f32,
    /// Left and right factor of each term.
    pub(crate) terms: Vec<(Matrix<'a>, Matrix<'a>)>,
}

impl<'a> Product<'a> {
    /// `left · right`.
    pub(crate) fn new(into: MatrixMut<'a>, left: Matrix<'a>, right: Matrix<'a>) -> Self {
        Self { into, start: Output::Overwrite, scale: 1.0, terms: vec![(left, right)] }
    }

    /// Whether its transpose is computed: where that lets the larger factor be read as it lies.
    fn is_better_turned(&self) -> bool {
        let Strided { rows, columns, .. } = self.into.shape;
        let lies_by_columns = |(left, right): &(Matrix, Matrix)| {
            pack::lies_in_rows(*left)
                && pack::lies_in_rows(right.transposed())
                && matches!(right.values, Numbers::F32(_))
        };
        let only_its_transpose_lies = |term: &(Matrix, Matrix)| {
            !pack::lies_in_rows(term.0) && is_read_in_place([columns, rows], &turned(term))
        };
        rows <= TURNED_ROWS && columns >= TURNED_COLUMNS && self.terms.iter().all(lies_by_columns)
            || columns <= FEW && rows > 2 * FEW && self.terms.iter().all(only_its_transpose_lies)
    }

    fn multiplications(&self) -> usize {
        self.into.shape.rows * self.into.shape.columns * joined_depth(&self.terms)
    }

    fn check(&self) {
        let c = self.into.shape;
        if let Output::Row(row) = self.start {
            assert_eq!(row.len(), c.columns, "the row that is added");
        }
        for (left, right) in &self.terms {
            let (a, b) = (left.shape, right.shape);
            assert_eq!((a.rows, a.columns), (c.rows, b.rows), "left factor's rows and columns");
            assert_eq!(b.columns, c.columns, "right factor's columns");
            assert!(a.span() <= left.values.len() && b.span() <= right.values.len());
        }
    }
}

/// `output = scale · left · right`, or what [`Output`] says, on the calling thread: for the inside of parallel loops.
pub(crate) fn multiply(into: (MatrixMut, Output), scale: f32, left: Matrix, right: Matrix) {
    let (into, start) = into;
    Plan::new(Product { into, start, scale, terms: vec![(left, right)] }, 1).work_alone();
}

/// Products that do not depend on each other, in one parallel loop where they are large enough for one.
pub(crate) fn multiply_all(products: Vec<Product>) {
    if products.iter().map(Product::multiplications).sum::<usize>() >= SHARED_FROM {
        return share_out(products);
    }
    products.into_iter().for_each(|product| Plan::new(product, 1).work_alone());
}

/// The factors of a transposed product.
fn turned<'a>(&(left, right): &(Matrix<'a>, Matrix<'a>)) -> (Matrix<'a>, Matrix<'a>) {
    (right.transposed(), left.transposed())
}

/// Whether the right factor of a term is read as it lies, in a product of so many rows and columns. Next to a left factor
/// that is packed it pays where few rows meet it.
fn is_read_in_place([rows, columns]: [usize; 2], (left, right): &(Matrix, Matrix)) -> bool {
    let has_whole_registers = columns.is_multiple_of(simd::lanes());
    let lies = pack::lies_in_rows(*right) && matches!(right.values, Numbers::F32(_));
    has_whole_registers && lies && (rows <= FEW || pack::lies_in_rows(*left))
}

/// Summands of each element of the output.
fn joined_depth(terms: &[(Matrix, Matrix)]) -> usize {
    terms.iter().map(|(left, _)| left.shape.columns).sum()
}

/// Products piece by piece on all cores.
fn share_out(products: Vec<Product>) {
    let threads = rayon::current_num_threads();
    let plans: Vec<Plan> = products.into_iter().map(|product| Plan::new(product, threads)).collect();
    let pieces: Vec<(&Plan, usize)> =
        plans.iter().flat_map(|plan| (0..plan.pieces()).map(move |piece| (plan, piece))).collect();
    parallel::for_each(pieces, |(plan, piece)| plan.work(piece));
}

/// Multiplications from which on it pays to call other cores: a few microseconds on one.
const SHARED_FROM: usize = 1 << 17;

/// The most rows of a piece: what is packed for it should be used often.
const PIECE_ROWS: usize = 1024;

/// Terms of a sum between two visits of the output.
const DEPTH: usize = 400;

/// Rows of a left factor that are packed at one time: whole tiles, and whole lines of memory.
const LEFT_ROWS: usize = 48;

/// The most rows, and the least columns, of a product whose right factor is a weight that is read as it lies: as the left
/// one of the transpose.
const TURNED_ROWS: usize = 96;
const TURNED_COLUMNS: usize = 256;

/// Rows or columns for which it does not pay to pack what they meet.
const FEW: usize = 64;

/// Panels that a piece packs at one time.
const PIECE_PANELS: usize = 8;

/// Pieces for each thread, where there are as many: the more, the more evenly they end.
const PIECES_PER_THREAD: usize = 4;

/// The same where left factors are packed.
const PACKED_PIECES_PER_THREAD: usize = 2;

/// The same where each piece packs the whole right factor.
const WHOLE_PIECES_PER_THREAD: usize = 1;

/// How one product is cut.
struct Plan<'a> {
    into: Target,
    /// Elements from one row of the output to the next.
    stride: usize,
    start: Output<'a>,
    scale: f32,
    /// The output is written by columns: rows, columns and terms are those of its transpose.
    is_turned: bool,
    terms: Vec<(Matrix<'a>, Matrix<'a>)>,
    rows: usize,
    columns: usize,
    /// Elements of a register.
    lanes: usize,
    panels: usize,
    /// Rows of each piece.
    piece_rows: usize,
    /// Panels of each piece.
    group: usize,
}

/// The output, which the pieces share out among themselves.
struct Target(*mut f32);

// SAFETY: pieces write to disjoint elements (`Plan::work`), and the exclusive borrow lives as long as the plan.
unsafe impl Sync for Target {}

/// Columns of one panel, and the registers they fill, the last perhaps in part.
#[derive(Clone)]
struct Panel {
    columns: Range<usize>,
    registers: usize,
}

/// A part of the terms of all sums, between two visits of the output.
struct Visit {
    /// In the order of the terms.
    segments: Vec<Segment>,
    /// Of all segments.
    depth: usize,
    /// Of those whose right factors are packed.
    packed_depth: usize,
    is_first: bool,
}

/// Some columns of a term's left factor, rows of its right one.
struct Segment {
    term: usize,
    range: Range<usize>,
    /// The right factor is read as it lies.
    is_in_place: bool,
}

impl<'a> Plan<'a> {
    fn new(product: Product<'a>, threads: usize) -> Self {
        product.check();
        let is_turned = product.is_better_turned();
        let Product { into, start, scale, mut terms } = product;
        let Strided { mut rows, mut columns, row_stride, .. } = into.shape;
        if is_turned {
            (rows, columns) = (columns, rows);
            terms.iter_mut().for_each(|term| *term = turned(term));
        }
        let lanes = simd::lanes();
        let (tile_rows, registers) = tile::shape(lanes);
        let panels = columns.div_ceil(lanes).div_ceil(registers);
        // A left factor that has to be packed is so once for each group, and the right one once for each block of rows.
        let is_packed = terms.iter().any(|(left, _)| !pack::lies_in_rows(*left));
        let is_in_place = terms.iter().all(|term| is_read_in_place([rows, columns], term));
        let (per_thread, least) = match (is_packed, is_in_place) {
            (true, true) => (PACKED_PIECES_PER_THREAD, 1),
            (false, true) => (PIECES_PER_THREAD, 1),
            (_, false) if is_turned || panels == 1 => (WHOLE_PIECES_PER_THREAD, PIECE_PANELS),
            (true, false) => (PACKED_PIECES_PER_THREAD, PIECE_PANELS),
            (false, false) => (PIECES_PER_THREAD, 1),
        };
        let least = least.min(panels.max(1));
        let wanted = if threads > 1 { threads * per_thread } else { 1 };
        let piece_rows = (rows * panels.div_ceil(least)).div_ceil(wanted).next_multiple_of(tile_rows);
        let piece_rows = piece_rows.clamp(tile_rows, PIECE_ROWS);
        let group = (panels * rows.div_ceil(piece_rows)).div_ceil(wanted).clamp(least, PIECE_PANELS);
        let into = Target(into.first);
        Self {
            into,
            stride: row_stride,
            start,
            scale,
            is_turned,
            terms,
            rows,
            columns,
            lanes,
            panels,
            piece_rows,
            group,
        }
    }

    fn pieces(&self) -> usize {
        self.rows.div_ceil(self.piece_rows) * self.panels.div_ceil(self.group)
    }

    fn work_alone(&self) {
        (0..self.pieces()).for_each(|piece| self.work(piece));
    }

    fn work(&self, piece: usize) {
        let groups = self.panels.div_ceil(self.group);
        let (block, group) = (piece / groups, piece % groups);
        let rows = block * self.piece_rows..self.rows.min((block + 1) * self.piece_rows);
        let panels = group * self.group..self.panels.min((group + 1) * self.group);
        let panels = panels.map(|panel| self.panel(panel)).collect();
        if self.is_turned {
            simd::dispatch(Piece::<true> { plan: self, rows, panels });
        } else {
            simd::dispatch(Piece::<false> { plan: self, rows, panels });
        }
    }

    /// Registers are shared out evenly: two panels of two are faster than one of three and one of one.
    fn panel(&self, index: usize) -> Panel {
        let registers = self.columns.div_ceil(self.lanes);
        let (first, last) = (index * registers / self.panels, (index + 1) * registers / self.panels);
        Panel { columns: first * self.lanes..self.columns.min(last * self.lanes), registers: last - first }
    }

    /// The part of the terms' joined depth that comes in one visit of the output.
    fn visit(&self, visit: usize, visits: usize) -> Visit {
        let depth = self.depth();
        let (from, to) = (depth * visit / visits, depth * (visit + 1) / visits);
        let mut before = 0;
        let segments = self.terms.iter().enumerate().map(|(term, (left, _))| {
            let depth = left.shape.columns;
            let range =
                from.clamp(before, before + depth) - before..to.clamp(before, before + depth) - before;
            before += depth;
            let is_in_place = is_read_in_place([self.rows, self.columns], &self.terms[term]);
            Segment { term, range, is_in_place }
        });
        let segments: Vec<_> = segments.filter(|segment| !segment.range.is_empty()).collect();
        let packed = segments.iter().filter(|segment| !segment.is_in_place);
        let packed_depth = packed.map(|segment| segment.range.len()).sum();
        Visit { segments, depth: to - from, packed_depth, is_first: visit == 0 }
    }

    fn depth(&self) -> usize {
        joined_depth(&self.terms)
    }
}

/// What one thread computes: some rows of some columns. Compiled twice: a branch in its loops would cost every product.
struct Piece<'a, 'p, const IS_TURNED: bool> {
    plan: &'p Plan<'a>,
    rows: Range<usize>,
    panels: Vec<Panel>,
}

impl<const IS_TURNED: bool> pulp::WithSimd for Piece<'_, '_, IS_TURNED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let visits = self.plan.depth().div_ceil(DEPTH).max(1);
        // Taken out, not borrowed: no closure may stand between here and the tiles, or it would be compiled apart, for
        // the instructions that every machine has.
        let mut scratch = pack::SCRATCH.take();
        for visit in 0..visits {
            self.add(simd, self.plan.visit(visit, visits), &mut scratch);
        }
        pack::SCRATCH.set(scratch);
    }
}

impl<const IS_TURNED: bool> Piece<'_, '_, IS_TURNED> {
    /// Adds the products of one visit.
    #[inline(always)]
    fn add<S: pulp::Simd>(&self, simd: S, visit: Visit, scratch: &mut pack::Scratch) {
        let (plan, depth) = (self.plan, visit.packed_depth);
        let widths = self.panels.iter().map(|panel| panel.registers * S::F32_LANES);
        scratch.reserve(depth * widths.sum::<usize>(), LEFT_ROWS * visit.depth);
        let mut before = 0;
        for Segment { term, range, is_in_place } in &visit.segments {
            if *is_in_place {
                continue;
            }
            let part = pack::Part { right: plan.terms[*term].1, rows: range.clone(), before, depth };
            pack::pack_right(simd, part, &self.panels, scratch);
            before += range.len();
        }
        let mut factors = Vec::with_capacity(visit.segments.len());
        for block in self.rows.clone().step_by(LEFT_ROWS) {
            let block = block..self.rows.end.min(block + LEFT_ROWS);
            self.factors::<S>(&visit.segments, block.clone(), scratch, &mut factors);
            self.tiles(simd, block, &mut factors, &visit, scratch);
        }
    }

    /// Every segment's factors: the left one's rows packed first, then pointed at, and the right one where it is not packed.
    #[inline(always)]
    fn factors<S: pulp::Simd>(
        &self,
        segments: &[Segment],
        rows: Range<usize>,
        scratch: &mut pack::Scratch,
        factors: &mut Vec<tile::Factors>,
    ) {
        let left = |term: usize| self.plan.terms[term].0;
        let mut offset = 0;
        for Segment { term, range, .. } in segments {
            pack::pack_left::<S>(left(*term), rows.clone(), range.clone(), offset, scratch);
            offset += LEFT_ROWS * range.len();
        }
        let panels = self.panels.len();
        let (tile_rows, _) = tile::shape(S::F32_LANES);
        // A weight is read from memory, few rows of values have just been written.
        let rows_ahead = if IS_TURNED { tile_rows.div_ceil(panels) } else { 1 };
        let neighbours = pack::Neighbours { panels, rows_ahead };
        factors.clear();
        offset = 0;
        for Segment { term, range, is_in_place } in segments {
            let (rows, columns) = (rows.clone(), range.clone());
            let rows = pack::left_rows::<S>(left(*term), rows, columns, offset, neighbours, scratch);
            let right = is_in_place.then(|| pack::right_rows(self.plan.terms[*term].1, range.clone()));
            factors.push(tile::Factors { left: rows, right });
            offset += LEFT_ROWS * range.len();
        }
    }

    /// All panels' tiles of some rows, whose factors lie at `factors`.
    #[inline(always)]
    fn tiles<S: pulp::Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        factors: &mut [tile::Factors],
        visit: &Visit,
        scratch: &pack::Scratch,
    ) {
        let plan = self.plan;
        let (tile_rows, _) = tile::shape(S::F32_LANES);
        let mut turned = tile::Turned::new();
        for row in rows.clone().step_by(tile_rows) {
            let tile_rows = tile_rows.min(rows.end - row);
            let mut offset = 0;
            for (index, panel) in self.panels.iter().enumerate() {
                let start = match plan.start {
                    _ if !visit.is_first => Output::Accumulate,
                    Output::Row(added) if IS_TURNED => Output::Row(&added[row..row + tile_rows]),
                    Output::Row(added) => Output::Row(&added[panel.columns.clone()]),
                    other => other,
                };
                let columns = panel.columns.len();
                let (into, stride, tile_start) = if IS_TURNED {
                    (turned.sums.as_mut_ptr(), tile::WIDTH, Output::Overwrite)
                } else {
                    let first = row * plan.stride + panel.columns.start;
                    (plan.into.0.wrapping_add(first), plan.stride, start)
                };
                let width = panel.registers * S::F32_LANES;
                let tile = tile::Tile {
                    factors,
                    packed: scratch.panels(offset),
                    first_column: panel.columns.start,
                    index,
                    into,
                    stride,
                    rows: tile_rows,
                    columns,
                    start: tile_start,
                    scale: plan.scale,
                };
                // SAFETY: `Product::check` found every element of output and factors inside its slice; `left_rows` and
                // `pack_right` laid out as many rows, registers and terms as the tile reads, and what is read in place has
                // whole registers; no other piece has these rows of these columns.
                unsafe { tile.multiply(simd, panel.registers) };
                if IS_TURNED {
                    let into = plan.into.0.wrapping_add(panel.columns.start * plan.stride + row);
                    // SAFETY: as above.
                    unsafe { turned.write(into, plan.stride, [tile_rows, columns], start) };
                }
                offset += visit.packed_depth * width;
            }
            factors.iter_mut().for_each(|factors| factors.left.skip_tile());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::HalfType;
    use fewstep_testkit::{assert_close, random_values};
    use half::{bf16, f16};

    /// `start + scale · left · right` by three loops, all row-major.
    fn three_loops(start: &[f32], scale: f32, left: &[f32], right: &[f32], depth: usize) -> Vec<f32> {
        let columns = right.len() / depth;
        let sum = |row: usize, column: usize| -> f32 {
            (0..depth).map(|k| left[row * depth + k] * right[k * columns + column]).sum()
        };
        let indexed = start.iter().enumerate();
        indexed.map(|(index, start)| start + scale * sum(index / columns, index % columns)).collect()
    }

    fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
        (0..values.len())
            .map(|index| (index % (values.len() / columns), index / (values.len() / columns)))
            .map(|(row, column)| values[row * columns + column])
            .collect()
    }

    /// Sums of up to 1,000 products in another order.
    const TOLERANCE: f32 = 6e-5;

    #[test]
    fn products_of_every_layout_agree_with_three_loops() {
        let shapes = [
            (1, 1, 1),
            (7, 5, 3),
            (9, TURNED_COLUMNS + 5, 4),
            (33, 130, 17),
            (78, 79, 64),
            (5, 8, 300),
            (300, 9, 40),
            (17, 65, 999),
            (11, 3 * FEW, 450),
            (3 * FEW, 11, 450),
            (FEW + 9, FEW, 450),
            (TURNED_ROWS, TURNED_COLUMNS, 450),
        ];
        // Interpreters are slow.
        let count = if cfg!(miri) { 3 } else { shapes.len() };
        for (rows, columns, depth) in shapes.into_iter().take(count) {
            let (left, right) = (random_values(rows * depth, 1), random_values(depth * columns, 2));
            let (turned_left, turned_right) = (transposed(&left, depth), transposed(&right, columns));
            let before = random_values(rows * columns, 3);
            let expected = three_loops(&before, 0.5, &left, &right, depth);
            let lefts =
                [Matrix::new(&left, rows, depth), Matrix::new(&turned_left, depth, rows).transposed()];
            let rights = [
                Matrix::new(&right, depth, columns),
                Matrix::new(&turned_right, columns, depth).transposed(),
            ];
            for (left, right) in lefts.into_iter().flat_map(|left| rights.map(|right| (left, right))) {
                for run in [share_out as fn(Vec<Product>), multiply_all] {
                    let mut found = before.clone();
                    let into = MatrixMut::new(&mut found, rows, columns);
                    let terms = vec![(left, right)];
                    run(vec![Product { into, start: Output::Accumulate, scale: 0.5, terms }]);
                    assert_close(&found, &expected, TOLERANCE);
                }
            }
        }
    }

    #[test]
    fn views_with_gaps_between_their_elements_are_read_and_the_gaps_of_the_output_are_kept() {
        let (rows, columns, depth, gap) = (13, 21, 10, 3);
        let shape =
            |rows, columns| Strided { rows, columns, row_stride: columns * gap + 1, column_stride: gap };
        let spread = |values: &[f32], shape: Strided| {
            let mut spread = vec![f32::NAN; shape.span()];
            for (index, value) in values.iter().enumerate() {
                spread[index / shape.columns * shape.row_stride + index % shape.columns * gap] = *value;
            }
            spread
        };
        let (left, right) = (random_values(rows * depth, 1), random_values(depth * columns, 2));
        let spread_left = spread(&left, shape(rows, depth));
        let spread_right = spread(&right, shape(depth, columns));
        let view = |values, shape| Matrix { values: Numbers::F32(values), shape };
        let mut found = vec![7.0; rows * (columns + 2)];
        let into = MatrixMut::strided(&mut found, rows, columns, columns + 2);
        let (left_view, right_view) =
            (view(&spread_left, shape(rows, depth)), view(&spread_right, shape(depth, columns)));
        share_out(vec![Product::new(into, left_view, right_view)]);
        let expected = three_loops(&vec![0.0; rows * columns], 1.0, &left, &right, depth);
        for (found, expected) in found.chunks(columns + 2).zip(expected.chunks(columns)) {
            assert_close(&found[..columns], expected, TOLERANCE);
            assert_eq!(found[columns..], [7.0, 7.0]);
        }
    }

    #[test]
    fn terms_are_summed_and_a_row_is_added_to_every_row() {
        // More rows than are packed at one time, and a last tile that is not full.
        let rows = LEFT_ROWS + 20;
        // Interpreters are slow.
        let depths = if cfg!(miri) { [3, 1, 2] } else { [500, 8, 450] };
        let lefts = depths.map(|depth| random_values(rows * depth, depth as u64));
        let turned_lefts = [0, 1, 2].map(|term| transposed(&lefts[term], depths[term]));
        for columns in [50, TURNED_COLUMNS + 3] {
            let rights = depths.map(|depth| random_values(depth * columns, 1 + depth as u64));
            let turned_rights = rights.each_ref().map(|right| transposed(right, columns));
            let row = random_values(columns, 9);
            let mut expected = row.repeat(rows);
            for ((left, right), depth) in lefts.iter().zip(&rights).zip(depths) {
                expected = three_loops(&expected, -2.0, left, right, depth);
            }
            for (left_is_turned, right_is_turned) in [
                ([false; 3], [false; 3]),
                ([true; 3], [false; 3]),
                ([true, false, true], [false; 3]),
                ([false; 3], [true; 3]),
                ([false; 3], [false, true, true]),
            ] {
                let mut found = vec![f32::NAN; rows * (columns + 1)];
                let terms = depths.iter().enumerate().map(|(term, depth)| {
                    let left = match left_is_turned[term] {
                        true => Matrix::new(&turned_lefts[term], *depth, rows).transposed(),
                        false => Matrix::new(&lefts[term], rows, *depth),
                    };
                    let right = match right_is_turned[term] {
                        true => Matrix::new(&turned_rights[term], columns, *depth).transposed(),
                        false => Matrix::new(&rights[term], *depth, columns),
                    };
                    (left, right)
                });
                let terms = terms.collect();
                let into = MatrixMut::strided(&mut found, rows, columns, columns + 1);
                share_out(vec![Product { into, start: Output::Row(&row), scale: -2.0, terms }]);
                for (found, expected) in found.chunks(columns + 1).zip(expected.chunks(columns)) {
                    assert_close(&found[..columns], expected, 5.0 * TOLERANCE);
                    assert!(found[columns].is_nan(), "the gap between rows is written");
                }
            }
        }
    }

    #[test]
    fn products_without_depth_are_what_they_start_from() {
        let mut found = vec![f32::NAN; 6];
        let into = MatrixMut::new(&mut found, 2, 3);
        let none = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 3));
        share_out(vec![Product {
            into,
            start: Output::Row(&[1.0, 2.0, 3.0]),
            scale: 1.0,
            terms: vec![none],
        }]);
        assert_eq!(found, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn columns_of_one_output_are_products_of_their_own() {
        let (rows, depth, widths) = (9, 12, [5, 30]);
        let left = random_values(rows * depth, 1);
        let rights = widths.map(|width| random_values(depth * width, width as u64));
        let mut found = vec![f32::NAN; rows * 35];
        let (first, second) = MatrixMut::new(&mut found, rows, 35).split_columns(5);
        let left_view = Matrix::new(&left, rows, depth);
        let products =
            [first, second].into_iter().zip(&rights).zip(widths).map(|((into, right), width)| {
                Product::new(into, left_view, Matrix::new(right, depth, width))
            });
        share_out(products.collect());
        let expected =
            [0, 1].map(|part| three_loops(&vec![0.0; rows * widths[part]], 1.0, &left, &rights[part], depth));
        for (row, found) in found.chunks(35).enumerate() {
            assert_close(&found[..5], &expected[0][row * 5..][..5], TOLERANCE);
            assert_close(&found[5..], &expected[1][row * 30..][..30], TOLERANCE);
        }
    }

    #[test]
    fn right_factors_of_two_bytes_are_their_f32s() {
        let (rows, columns, depth) = (30, 70, 90);
        let (left, right) = (random_values(rows * depth, 1), random_values(depth * columns, 2));
        let left = Matrix::new(&left, rows, depth);
        let bf16s: Vec<bf16> = right.iter().map(|value| bf16::from_f32(*value)).collect();
        let f16s: Vec<f16> = right.iter().map(|value| f16::from_f32(*value)).collect();
        let of_bf16: Vec<f32> = bf16s.iter().map(|value| value.to_f32()).collect();
        let of_f16: Vec<f32> = f16s.iter().map(|value| value.to_f32()).collect();
        let run = |right: Matrix| {
            let mut found = vec![f32::NAN; rows * columns];
            share_out(vec![Product::new(MatrixMut::new(&mut found, rows, columns), left, right)]);
            found
        };
        for (numbers, plain) in [
            (Numbers::Bf16(&bf16s), &of_bf16),
            (Numbers::F16(&f16s), &of_f16),
            (Numbers::Rounded(&right, HalfType::Bf16), &of_bf16),
            (Numbers::Rounded(&right, HalfType::F16), &of_f16),
        ] {
            assert_eq!(
                run(Matrix::of_numbers(numbers, depth, columns)),
                run(Matrix::new(plain, depth, columns))
            );
            let turned = |numbers| Matrix::of_numbers(numbers, columns, depth).transposed();
            assert_eq!(run(turned(numbers)), run(turned(Numbers::F32(plain))));
        }
    }

    #[test]
    fn the_cut_into_pieces_does_not_change_a_bit() {
        let shapes =
            if cfg!(miri) { [(60, 100, 5), (20, 300, 5)] } else { [(300, 200, 120), (50, 400, 120)] };
        shapes.into_iter().for_each(is_the_same_however_cut);
    }

    fn is_the_same_however_cut((rows, columns, depth): (usize, usize, usize)) {
        let (left, right) = (random_values(rows * depth, 1), random_values(columns * depth, 2));
        let run = |threads: usize| {
            let mut found = vec![f32::NAN; rows * columns];
            let into = MatrixMut::new(&mut found, rows, columns);
            let right = Matrix::new(&right, columns, depth).transposed();
            let plan = Plan::new(Product::new(into, Matrix::new(&left, rows, depth), right), threads);
            plan.work_alone();
            (plan.pieces(), found)
        };
        let ((few, by_one), (many, by_sixteen)) = (run(1), run(16));
        assert!(few < many, "{few} pieces for one thread, {many} for sixteen");
        assert_eq!(by_one, by_sixteen);
    }

    #[test]
    #[should_panic(expected = "left factor's rows and columns")]
    fn factors_that_do_not_fit_are_refused() {
        let mut output = [0.0; 4];
        let into = MatrixMut::new(&mut output, 2, 2);
        multiply((into, Output::Overwrite), 1.0, Matrix::new(&[1.0; 6], 2, 3), Matrix::new(&[1.0; 4], 2, 2));
    }
}
