//! What a chunk of frames needs of those before it.

use std::collections::VecDeque;

use burn::tensor::Tensor;

/// What the layers that look back keep from chunk to chunk: an entry for each, in the order of their evaluation.
///
/// Frames are the outer half of the first axis: `[T · B, C, H, W]`, the B samples of a frame side by side.
pub(super) struct Past {
    /// B.
    pub(super) batch: usize,
    is_first: bool,
    is_last: bool,
    kept: VecDeque<Option<Tensor<4>>>,
}

impl Past {
    /// Before the first chunk of a batch.
    pub(super) fn new(batch: usize) -> Self {
        Self { batch, is_first: true, is_last: false, kept: VecDeque::new() }
    }

    /// Says which chunk comes. After the last one nothing is kept.
    pub(super) fn enter(&mut self, chunk: usize, chunks: usize) {
        (self.is_first, self.is_last) = (chunk == 0, chunk + 1 == chunks);
    }

    /// Whether there is nothing before this chunk.
    pub(super) fn is_first(&self) -> bool {
        self.is_first
    }

    /// What the layer kept of the chunk before; each asks once in a chunk, before it keeps something.
    pub(super) fn recall(&mut self) -> Option<Tensor<4>> {
        if self.is_first {
            return None;
        }
        self.kept.pop_front().expect("each layer keeps one entry in each chunk but the last")
    }

    /// Keeps the last `frames` frames for the next chunk; fewer where there are not so many.
    pub(super) fn keep(&mut self, x: &Tensor<4>, frames: usize) {
        let (rows, wanted) = (x.dims()[0], frames * self.batch);
        let first = rows.saturating_sub(wanted);
        self.put(|| Some(x.clone().narrow(0, first, rows - first)));
    }

    /// Keeps nothing for the next chunk, which begins anew.
    pub(super) fn keep_nothing(&mut self) {
        self.put(|| None);
    }

    fn put(&mut self, entry: impl FnOnce() -> Option<Tensor<4>>) {
        if !self.is_last {
            self.kept.push_back(entry());
        }
    }
}
