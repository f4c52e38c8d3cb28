//! `vae/config.json`.

use serde::Deserialize;

use super::super::config::ConfigFile;
use super::super::published;
use crate::{ModelError, ModelSource};

/// `vae/config.json`, by its `_class_name`.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "_class_name")]
pub enum VaeConfig {
    /// The published autoencoder.
    AutoencoderKLQwenImage(AutoencoderConfig),
    /// Pixels rearranged, no weights.
    PixelUnshuffle(PixelUnshuffleConfig),
}

/// Config of the published autoencoder, class `AutoencoderKLQwenImage`.
#[derive(Clone, Debug, Deserialize)]
pub struct AutoencoderConfig {
    /// Channels at full resolution, before the multipliers.
    pub base_dim: usize,
    /// C, latent channels.
    pub z_dim: usize,
    /// Channels of each stage in units of `base_dim`, from full resolution on.
    pub dim_mult: Vec<usize>,
    /// Residual blocks of each stage; decoders have one more.
    pub num_res_blocks: usize,
    /// Resolutions (1 is full, 0.5 half, ..) at which the encoder attends.
    pub attn_scales: Vec<f64>,
    /// Whether time is halved along with the resolution after each stage but the last.
    pub temperal_downsample: Vec<bool>,
    /// Colours.
    pub input_channels: usize,
    /// Mean of each latent channel.
    pub latents_mean: Vec<f32>,
    /// Standard deviation of each latent channel.
    pub latents_std: Vec<f32>,
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
        file.check_class("vae", file.class_name(), &["AutoencoderKLQwenImage", "PixelUnshuffle"])?;
        let config: Self = file.parse_over(published::vae_defaults())?;
        if let Self::AutoencoderKLQwenImage(config) = &config {
            config.check().map_err(|reason| file.error(reason))?;
        }
        Ok(config)
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

impl AutoencoderConfig {
    /// Pixels per latent pixel along one side.
    pub(super) fn factor(&self) -> usize {
        1 << self.temperal_downsample.len()
    }

    fn check(&self) -> Result<(), String> {
        if self.input_channels != 3 {
            return Err(format!("input_channels is {}, expected 3", self.input_channels));
        }
        let sizes =
            [("base_dim", self.base_dim), ("z_dim", self.z_dim), ("num_res_blocks", self.num_res_blocks)];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(format!("{name} is 0, expected at least 1"));
        }
        if self.dim_mult.is_empty() || self.dim_mult.contains(&0) {
            return Err(format!("dim_mult is {:?}, expected at least one positive factor", self.dim_mult));
        }
        let lengths = [
            ("temperal_downsample", self.temperal_downsample.len(), self.dim_mult.len() - 1),
            ("latents_mean", self.latents_mean.len(), self.z_dim),
            ("latents_std", self.latents_std.len(), self.z_dim),
        ];
        if let Some((name, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
            return Err(format!("{name} has {found} entries, expected {expected}"));
        }
        if let Some(std) = self.latents_std.iter().find(|std| **std <= 0.0) {
            return Err(format!("latents_std holds {std}, expected positive numbers"));
        }
        Ok(())
    }
}

impl PixelUnshuffleConfig {
    /// Channels of the latents.
    pub(super) fn channels(&self) -> usize {
        3 * self.factor * self.factor
    }
}
