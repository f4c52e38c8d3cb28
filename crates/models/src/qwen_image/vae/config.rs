//! `vae/config.json`.

use serde::Deserialize;

use super::super::config::component_file;
use super::super::published;
use crate::{ModelError, ModelSource, ranges};

/// The most stages of an autoencoder, each of which may halve the picture.
const MAX_STAGES: usize = 8;
/// The most pixels that become one along a side: what [`MAX_STAGES`] make of them.
const MAX_FACTOR: usize = 1 << MAX_STAGES;

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
        let file = component_file(source, "vae")?;
        file.check_class("vae", file.class_name(), &["AutoencoderKLQwenImage", "PixelUnshuffle"])?;
        let config: Self = file.parse_over(published::vae_defaults())?;
        let checked = match &config {
            Self::AutoencoderKLQwenImage(config) => config.check(),
            Self::PixelUnshuffle(config) => config.check(),
        };
        checked.map(|()| config).map_err(|reason| file.error(reason))
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
        ranges::check(&[
            ("base_dim", self.base_dim, ranges::WIDTH),
            ("z_dim", self.z_dim, ranges::WIDTH),
            ("num_res_blocks", self.num_res_blocks, ranges::LAYERS),
            ("the number of dim_mult", self.dim_mult.len(), 1..=MAX_STAGES),
        ])?;
        for factor in &self.dim_mult {
            let width = self.base_dim.saturating_mul(*factor);
            ranges::check(&[("base_dim × one of dim_mult", width, ranges::WIDTH)])?;
        }
        let lengths = [
            ("temperal_downsample", self.temperal_downsample.len(), self.dim_mult.len() - 1),
            ("latents_mean", self.latents_mean.len(), self.z_dim),
            ("latents_std", self.latents_std.len(), self.z_dim),
        ];
        if let Some((name, found, expected)) = lengths.iter().find(|(_, found, expected)| found != expected) {
            return Err(format!("{name} has {found} entries, expected {expected}"));
        }
        let spread: Vec<(&str, f32)> =
            self.latents_std.iter().map(|std| ("one of latents_std", *std)).collect();
        ranges::check_positive(&spread)?;
        finite("latents_mean", &self.latents_mean)
    }
}

/// Checks numbers that may have either sign.
fn finite(name: &str, values: &[f32]) -> Result<(), String> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(found) => Err(format!("one of {name} is {found}, expected a finite number")),
        None => Ok(()),
    }
}

impl PixelUnshuffleConfig {
    fn check(&self) -> Result<(), String> {
        ranges::check(&[("factor", self.factor, 1..=MAX_FACTOR)])?;
        ranges::check_positive(&self.std.map(|std| ("one of std", std)))?;
        finite("mean", &self.mean)
    }

    /// Channels of the latents.
    pub(super) fn channels(&self) -> usize {
        3 * self.factor * self.factor
    }
}
