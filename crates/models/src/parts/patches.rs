//! Packing of latents into tokens: 2×2 patches, channel-major within a token (C, 2, 2).

use burn::tensor::Tensor;

/// Latent pixels per token along one side.
pub(crate) const PATCH: usize = 2;

/// # Shapes
/// - `latents`: `[B, C, H, W]` with even H and W; output `[B, H/2 · W/2, 4C]`
pub(crate) fn pack(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    let (rows, columns) = (height / PATCH, width / PATCH);
    latents
        .reshape([batch, channels, rows, PATCH, columns, PATCH])
        .permute([0, 2, 4, 1, 3, 5]) // [B, rows, columns, C, 2, 2]
        .reshape([batch, rows * columns, channels * PATCH * PATCH])
}

/// The same with the channels of each pixel together: (2, 2, C) within a token.
pub(crate) fn pack_by_place(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    let (rows, columns) = (height / PATCH, width / PATCH);
    latents
        .reshape([batch, channels, rows, PATCH, columns, PATCH])
        .permute([0, 2, 4, 3, 5, 1]) // [B, rows, columns, 2, 2, C]
        .reshape([batch, rows * columns, channels * PATCH * PATCH])
}

/// Inverse of [`pack_by_place`]; `[channels, height, width]` is the shape of one sample's latents.
pub(crate) fn unpack_by_place(tokens: Tensor<3>, [channels, height, width]: [usize; 3]) -> Tensor<4> {
    let [batch, _, _] = tokens.dims();
    tokens
        .reshape([batch, height / PATCH, width / PATCH, PATCH, PATCH, channels])
        .permute([0, 5, 1, 3, 2, 4]) // [B, C, rows, 2, columns, 2]
        .reshape([batch, channels, height, width])
}

/// Inverse of [`pack`]; `[channels, height, width]` is the shape of one sample's latents.
pub(crate) fn unpack(tokens: Tensor<3>, [channels, height, width]: [usize; 3]) -> Tensor<4> {
    let [batch, _, _] = tokens.dims();
    tokens
        .reshape([batch, height / PATCH, width / PATCH, channels, PATCH, PATCH])
        .permute([0, 3, 1, 4, 2, 5]) // [B, C, rows, 2, columns, 2]
        .reshape([batch, channels, height, width])
}
