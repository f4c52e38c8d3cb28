//! The places of image tokens: a table of sines and cosines over a square, of which a picture has the middle.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{Projection, linear};

use super::config::TransformerConfig;
use crate::parts::patches;
use crate::weights::unfilled;

/// Base of the frequencies.
const THETA: f64 = 10_000.0;

/// Patches of latents as tokens that know their places (diffusers' `PatchEmbed`).
#[derive(Module, Debug)]
pub(super) struct PatchEmbed {
    proj: PatchProjection,
    /// `[1, side², D]`, row after row. It is no weight: nothing learns it, but it is in the files, and counts as it is
    /// there.
    pos_embed: Param<Tensor<3>>,
}

/// The convolution that takes each patch to a token.
#[derive(Module, Debug)]
struct PatchProjection {
    /// `[D, C, 2, 2]`
    weight: Param<Tensor<4>>,
    bias: Param<Tensor<1>>,
}

impl PatchEmbed {
    pub(super) fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let (width, side) = (config.heads().width(), config.pos_embed_max_size);
        let weight = [width, config.in_channels, patches::PATCH, patches::PATCH];
        Self {
            proj: PatchProjection { weight: unfilled(weight, device), bias: unfilled([width], device) },
            pos_embed: unfilled([1, side * side, width], device),
        }
    }

    /// `[B, C, H, W]` to `[B, H/2 · W/2, D]`.
    pub(super) fn forward(&self, latents: Tensor<4>) -> Tensor<3> {
        let [_, _, height, width] = latents.dims();
        let grid = [height / patches::PATCH, width / patches::PATCH];
        let tokens = self.proj.forward(patches::pack(latents));
        tokens + self.places(grid)
    }

    /// The middle of the table, `[1, N, D]`.
    fn places(&self, [rows, columns]: [usize; 2]) -> Tensor<3> {
        let table = self.pos_embed.val().detach();
        let [_, places, width] = table.dims();
        let side = places.isqrt();
        assert!(rows <= side && columns <= side, "{rows} rows and {columns} columns of a table of {side}");
        let middle = table.reshape([side, side, width]).narrow(0, (side - rows) / 2, rows);
        middle.narrow(1, (side - columns) / 2, columns).reshape([1, rows * columns, width])
    }

    /// With the table of a model that is trained from scratch.
    pub(super) fn with_fresh_table(self, config: &TransformerConfig) -> Self {
        let (side, width) = (config.pos_embed_max_size, config.heads().width());
        let table = TensorData::new(table(config), [1, side * side, width]);
        let (id, device) = (self.pos_embed.id, self.pos_embed.lazy_device());
        Self { pos_embed: self.pos_embed.transform_for_load(Tensor::from_data(table, &device), id), ..self }
    }
}

impl PatchProjection {
    /// `[B, N, 4C]` to `[B, N, D]`.
    fn forward(&self, packed: Tensor<3>) -> Tensor<3> {
        let [width, channels, height, columns] = self.weight.dims();
        let weight = self.weight.val().reshape([width, channels * height * columns]);
        let bias = Some(self.bias.val());
        linear(packed, Projection { weight, rounded_to: None, bias, low_rank: None })
    }
}

/// Sines and cosines of the column, then of the row, each of a half of the width. Places are counted on the grid of
/// `sample_size`.
fn table(config: &TransformerConfig) -> Vec<f32> {
    let (side, base) = (config.pos_embed_max_size, config.sample_size / patches::PATCH);
    let quarter = config.heads().width() / 4;
    let frequencies: Vec<f64> = (0..quarter).map(|i| THETA.powf(i as f64 / quarter as f64).recip()).collect();
    let scale = (side as f64 / base as f64) as f32;
    let features = |place: usize| {
        let angles = frequencies.iter().map(move |frequency| f64::from(place as f32 / scale) * frequency);
        let (sines, cosines) = (angles.clone().map(f64::sin), angles.map(f64::cos));
        sines.chain(cosines).map(|value| value as f32)
    };
    let places = (0..side).flat_map(|row| (0..side).map(move |column| [column, row]));
    places.flat_map(|[column, row]| features(column).chain(features(row))).collect()
}

#[cfg(test)]
mod tests {
    use fewstep_testkit::{Golden, assert_close, golden, values};

    use super::*;
    use crate::ModelSource;

    #[test]
    fn a_fresh_table_equals_the_peers() {
        let device = Device::flex();
        let config = TransformerConfig::read(&ModelSource::from(&golden("sd3/sd35"))).unwrap();
        let fresh = PatchEmbed::unfilled(&config, &device).with_fresh_table(&config);
        let file = Golden::open(golden("sd3/sd35/transformer/diffusion_pytorch_model.safetensors"));
        // Sines of f64 on both sides.
        assert_close(&values(fresh.pos_embed.val()), &file.f32s("pos_embed.pos_embed"), 1e-7);
    }
}
