//! `vae/config.json`.

use serde::Deserialize;

use crate::config_file::ConfigFile;
use crate::parts::video_autoencoder::VideoAutoencoderConfig;
use crate::{ModelError, ModelSource, ranges};

/// The most pixels that become one along a side.
const MAX_FACTOR: usize = 256;

/// Class of the published autoencoder.
const PUBLISHED: &str = "AutoencoderKLQwenImage";
/// Class of the pixel autoencoder.
const PIXELS: &str = "PixelUnshuffle";

/// `vae/config.json`, by its `_class_name`.
#[derive(Clone, Debug)]
pub enum VaeConfig {
    /// The published autoencoder.
    AutoencoderKLQwenImage(VideoAutoencoderConfig),
    /// Pixels rearranged, no weights.
    PixelUnshuffle(PixelUnshuffleConfig),
}

/// Config of the pixel autoencoder.
#[derive(Clone, Debug, Deserialize)]
pub struct PixelUnshuffleConfig {
    /// Pixels per latent pixel along one side.
    pub factor: usize,
    /// Mean of each colour in [−1, 1].
    pub mean: [f32; 3],
    /// Standard deviation of each colour.
    pub std: [f32; 3],
}

impl VaeConfig {
    pub(in super::super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, "vae")?;
        file.check_class("vae", file.class_name(), &[PUBLISHED, PIXELS])?;
        if file.class_name() == Some(PUBLISHED) {
            return Ok(Self::AutoencoderKLQwenImage(VideoAutoencoderConfig::of(&file)?));
        }
        let config: PixelUnshuffleConfig = file.parse()?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(Self::PixelUnshuffle(config))
    }

    /// Pixels per latent pixel along one side.
    pub(in super::super) fn factor(&self) -> usize {
        match self {
            Self::AutoencoderKLQwenImage(config) => config.factor(),
            Self::PixelUnshuffle(config) => config.factor,
        }
    }

    /// Channels of the latents.
    pub(in super::super) fn channels(&self) -> usize {
        match self {
            Self::AutoencoderKLQwenImage(config) => config.z_dim,
            Self::PixelUnshuffle(config) => config.channels(),
        }
    }
}

impl PixelUnshuffleConfig {
    fn check(&self) -> Result<(), String> {
        ranges::check(&[("factor", self.factor, 1..=MAX_FACTOR)])?;
        ranges::check_positive(&self.std.map(|std| ("one of std", std)))?;
        ranges::check_finite("mean", &self.mean)
    }

    /// Channels of the latents.
    pub(super) fn channels(&self) -> usize {
        3 * self.factor * self.factor
    }
}
