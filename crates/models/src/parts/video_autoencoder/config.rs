//! The config of a video autoencoder.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::parts::cost::encoder_flops_per_pixel;
use crate::{ModelError, ranges};

/// The most stages of an autoencoder, each of which may halve the picture.
const MAX_STAGES: usize = 8;

/// Config of classes `AutoencoderKLWan` and `AutoencoderKLQwenImage`; the names are the files'.
#[derive(Clone, Debug, Deserialize)]
pub struct VideoAutoencoderConfig {
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
    #[serde(alias = "in_channels", default = "colours")]
    pub input_channels: usize,
    /// Mean of each latent channel.
    pub latents_mean: Vec<f32>,
    /// Standard deviation of each latent channel.
    pub latents_std: Vec<f32>,
    #[serde(default = "colours")]
    out_channels: usize,
    /// Of a later model; not supported.
    #[serde(default)]
    decoder_base_dim: Option<usize>,
    /// Of a later model; not supported.
    #[serde(default)]
    is_residual: bool,
    /// Of a later model; not supported.
    #[serde(default)]
    patch_size: Option<usize>,
}

fn colours() -> usize {
    3
}

impl VideoAutoencoderConfig {
    /// Reads and checks a `vae/config.json`; keys that it leaves out are the published models'.
    ///
    /// # Errors
    /// If it is damaged or asks for what there is no code for.
    pub(crate) fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        let config: Self = file.parse_over(published())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// Pixels per latent pixel along one side.
    pub(crate) fn factor(&self) -> usize {
        1 << self.temperal_downsample.len()
    }

    /// Frames per latent frame, after the first one, which has a latent frame of its own.
    pub(crate) fn frames_per_latent(&self) -> usize {
        1 << self.temperal_downsample.iter().filter(|over_time| **over_time).count()
    }

    /// At full resolution: a residual block's input, its norm's square and result, the activation, the convolution's
    /// input by rows, and its output.
    pub(crate) fn numbers_per_pixel(&self) -> u64 {
        6 * self.base_dim as u64
    }

    /// Operations for each pixel of a picture that becomes latents. A frame of a video takes up to three times as many, as
    /// its convolutions see two frames before it.
    pub(crate) fn flops_per_pixel(&self) -> u64 {
        let channels: Vec<usize> = self.dim_mult.iter().map(|times| times * self.base_dim).collect();
        encoder_flops_per_pixel(&channels, self.num_res_blocks)
    }

    fn check(&self) -> Result<(), String> {
        for (name, found) in [("input_channels", self.input_channels), ("out_channels", self.out_channels)] {
            if found != colours() {
                return Err(format!("{name} is {found}, expected 3"));
            }
        }
        if self.is_residual
            || self.patch_size.unwrap_or(1) != 1
            || self.decoder_base_dim.unwrap_or(self.base_dim) != self.base_dim
        {
            return Err(format!(
                "is_residual {}, patch_size {:?}, decoder_base_dim {:?}: expected false, null and null, as in Wan 2.1",
                self.is_residual, self.patch_size, self.decoder_base_dim
            ));
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
        ranges::check_finite("latents_mean", &self.latents_mean)
    }
}

/// What a file means where it leaves a key out: diffusers' defaults, which are the published models'.
fn published() -> Value {
    json!({
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [false, true, true],
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    })
}
