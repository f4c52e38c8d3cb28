//! Pixels to latents and back.

mod config;
mod pixel_unshuffle;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::parts::video_autoencoder::{self, VideoAutoencoder};
use crate::weights::TensorShapes;
use crate::{ModelError, ModelSource};

pub use config::{PixelUnshuffleConfig, VaeConfig};
pub use pixel_unshuffle::PixelUnshuffle;

/// Pixels per latent pixel of the published autoencoder, along one side.
const PUBLISHED_FACTOR: usize = 8;

/// The autoencoder a model's `vae/config.json` names.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has one")]
pub enum Vae {
    /// The published model's, a video VAE on single frames: see [`VideoAutoencoder`].
    Autoencoder(VideoAutoencoder),
    /// No compression: see [`PixelUnshuffle`].
    PixelUnshuffle(PixelUnshuffle),
    /// Left out when the model was loaded; only its sizes are known.
    Absent(Absent),
}

/// The sizes of an autoencoder that was not loaded.
#[derive(Module, Debug)]
pub struct Absent {
    #[module(skip)]
    factor: usize,
    #[module(skip)]
    channels: usize,
}

impl Vae {
    /// Loads the component `vae` of a model on the plain side of `device`.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(source: &ModelSource, device: &Device) -> Result<Self, ModelError> {
        Ok(match VaeConfig::read(source)? {
            VaeConfig::AutoencoderKLQwenImage(config) => {
                let loaded = VideoAutoencoder::load(config, &source.weights("vae")?, device)?;
                Vae::Autoencoder(loaded.for_pictures())
            }
            VaeConfig::PixelUnshuffle(config) => Vae::PixelUnshuffle(PixelUnshuffle::new(config)),
        })
    }

    /// An autoencoder that cannot encode or decode.
    ///
    /// `channels` are the latents'. Where neither the autoencoder nor its config is among given files, it is taken to
    /// be the published one.
    pub(super) fn absent(source: &ModelSource, channels: usize) -> Result<Self, ModelError> {
        let factor = match VaeConfig::read(source) {
            Ok(config) => config.factor(),
            Err(ModelError::NotBeside { .. }) => PUBLISHED_FACTOR,
            Err(error) => return Err(error),
        };
        Ok(Vae::Absent(Absent { factor, channels }))
    }

    /// The tensors that the weight files of a config hold.
    pub(super) fn expected(config: &VaeConfig, device: &Device) -> TensorShapes {
        match config {
            VaeConfig::AutoencoderKLQwenImage(config) => video_autoencoder::tensors(config, device),
            VaeConfig::PixelUnshuffle(_) => TensorShapes::new(),
        }
    }

    /// Pixels per latent pixel along one side.
    pub fn factor(&self) -> usize {
        match self {
            Vae::Autoencoder(vae) => vae.factor(),
            Vae::PixelUnshuffle(vae) => vae.factor(),
            Vae::Absent(vae) => vae.factor,
        }
    }

    /// Channels of the latents.
    pub fn channels(&self) -> usize {
        match self {
            Vae::Autoencoder(vae) => vae.channels(),
            Vae::PixelUnshuffle(vae) => vae.channels(),
            Vae::Absent(vae) => vae.channels,
        }
    }

    /// Normalised latents of pictures.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1]; output `[B, C, H, W]`
    ///
    /// # Panics
    /// If it was not loaded.
    pub fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        match self {
            Vae::Autoencoder(vae) => vae.encode(pixels, 1),
            Vae::PixelUnshuffle(vae) => vae.encode(pixels),
            Vae::Absent(_) => panic!("the autoencoder was not loaded"),
        }
    }

    /// Pictures of normalised latents.
    ///
    /// # Shapes
    /// - `latents`: `[B, C, H, W]`; output `[B, 3, height, width]`, mostly in [−1, 1] but not clamped
    ///
    /// # Panics
    /// If it was not loaded.
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        match self {
            Vae::Autoencoder(vae) => vae.decode(latents, 1),
            Vae::PixelUnshuffle(vae) => vae.decode(latents),
            Vae::Absent(_) => panic!("the autoencoder was not loaded"),
        }
    }
}
