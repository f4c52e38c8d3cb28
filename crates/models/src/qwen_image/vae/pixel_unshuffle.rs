//! The autoencoder of small models that work on pixels.

use burn::module::Module;
use burn::tensor::Tensor;

use super::PixelUnshuffleConfig;
use crate::parts::norm::per_channel;

/// An exact "autoencoder" without weights: each `factor × factor` square of pixels becomes the channels
/// of one latent pixel, normalised by a mean and a standard deviation per colour.
///
/// It lets small models work on pixels through the same code as models with a real VAE.
#[derive(Module, Debug)]
pub struct PixelUnshuffle {
    #[module(skip)]
    config: PixelUnshuffleConfig,
}

impl PixelUnshuffle {
    pub(super) fn new(config: PixelUnshuffleConfig) -> Self {
        Self { config }
    }

    pub(super) fn factor(&self) -> usize {
        self.config.factor
    }

    pub(super) fn channels(&self) -> usize {
        self.config.channels()
    }

    pub(super) fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = pixels.dims();
        let factor = self.config.factor;
        let device = pixels.device();
        let normalized =
            (pixels - per_channel(&self.config.mean, &device)) / per_channel(&self.config.std, &device);
        normalized
            .reshape([batch, 3, height / factor, factor, width / factor, factor])
            .permute([0, 1, 3, 5, 2, 4]) // [B, 3, f, f, H, W]
            .reshape([batch, 3 * factor * factor, height / factor, width / factor])
    }

    pub(super) fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = latents.dims();
        let factor = self.config.factor;
        let device = latents.device();
        let pixels = latents
            .reshape([batch, 3, factor, factor, height, width])
            .permute([0, 1, 4, 2, 5, 3]) // [B, 3, H, f, W, f]
            .reshape([batch, 3, height * factor, width * factor]);
        pixels * per_channel(&self.config.std, &device) + per_channel(&self.config.mean, &device)
    }
}
