//! Tables whose rows are looked up.

use burn::module::{Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};
use fewstep_kernels::HalfType;

use crate::load_options::widened;
use crate::weights::unfilled;

/// A row for each id.
#[derive(Module, Debug)]
pub(crate) struct Embedding {
    /// `[ids, width]`
    weight: Param<Tensor<2>>,
    /// Gives the nearest numbers of this type; gradients pass.
    #[module(skip)]
    pub(crate) rounded_to: Option<HalfType>,
}

impl Embedding {
    pub(crate) fn unfilled(ids: usize, width: usize, device: &Device) -> Self {
        Self { weight: unfilled([ids, width], device), rounded_to: None }
    }

    /// Where the table is.
    pub(crate) fn device(&self) -> Device {
        self.weight.val().device()
    }

    /// `[B, T]` to `[B, T, width]`.
    pub(crate) fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let rows = widened(embedding(self.weight.val(), ids));
        match self.rounded_to {
            Some(half) => half.nearest(rows),
            None => rows,
        }
    }
}

/// Token ids as one batch; shorter rows are continued with zeros.
pub(crate) fn padded_ids(ids: &[Vec<u32>], longest: usize, device: &Device) -> Tensor<2, Int> {
    let pad = |list: &Vec<u32>| {
        let mut row: Vec<i32> = list.iter().map(|id| *id as i32).collect();
        row.resize(longest, 0);
        row
    };
    let values: Vec<i32> = ids.iter().flat_map(pad).collect();
    Tensor::from_data(TensorData::new(values, [ids.len(), longest]), device)
}
