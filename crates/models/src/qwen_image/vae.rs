//! Pixels to latents and back.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};

use super::config::{PixelUnshuffleConfig, VaeConfig};

/// The autoencoder a folder's `vae/config.json` names.
#[derive(Module, Debug)]
pub enum Vae {
    /// No compression: see [`PixelUnshuffle`].
    PixelUnshuffle(PixelUnshuffle),
}

/// An exact "autoencoder" without weights: each `factor × factor` square of pixels becomes the channels
/// of one latent pixel, normalised by a mean and a standard deviation per colour.
///
/// It lets small models work on pixels through the same code as models with a real VAE.
#[derive(Module, Debug)]
pub struct PixelUnshuffle {
    #[module(skip)]
    config: PixelUnshuffleConfig,
}

impl Vae {
    pub(super) fn from_config(config: VaeConfig) -> Self {
        match config {
            VaeConfig::PixelUnshuffle(config) => Vae::PixelUnshuffle(PixelUnshuffle { config }),
        }
    }

    /// Pixels per latent pixel along one side.
    pub fn factor(&self) -> usize {
        match self {
            Vae::PixelUnshuffle(vae) => vae.config.factor,
        }
    }

    /// Channels of the latents.
    pub fn channels(&self) -> usize {
        match self {
            Vae::PixelUnshuffle(vae) => 3 * vae.config.factor * vae.config.factor,
        }
    }

    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1]; output `[B, C, H, W]`
    pub fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        match self {
            Vae::PixelUnshuffle(vae) => vae.encode(pixels),
        }
    }

    /// # Shapes
    /// - `latents`: `[B, C, H, W]`; output `[B, 3, height, width]`, mostly in [−1, 1] but not clamped
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        match self {
            Vae::PixelUnshuffle(vae) => vae.decode(latents),
        }
    }
}

impl PixelUnshuffle {
    fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = pixels.dims();
        let factor = self.config.factor;
        let normalized =
            (pixels.clone() - colors(&pixels, self.config.mean)) / colors(&pixels, self.config.std);
        normalized
            .reshape([batch, 3, height / factor, factor, width / factor, factor])
            .permute([0, 1, 3, 5, 2, 4]) // [B, 3, f, f, H, W]
            .reshape([batch, 3 * factor * factor, height / factor, width / factor])
    }

    fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = latents.dims();
        let factor = self.config.factor;
        let pixels = latents
            .reshape([batch, 3, factor, factor, height, width])
            .permute([0, 1, 4, 2, 5, 3]) // [B, 3, H, f, W, f]
            .reshape([batch, 3, height * factor, width * factor]);
        pixels.clone() * colors(&pixels, self.config.std) + colors(&pixels, self.config.mean)
    }
}

/// One number per colour, broadcastable to pixels.
fn colors(like: &Tensor<4>, values: [f32; 3]) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), [1, 3, 1, 1]), &like.device())
}
