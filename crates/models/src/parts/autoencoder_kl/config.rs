//! `vae/config.json` of class `AutoencoderKL`.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::parts::cost::encoder_flops_per_pixel;
use crate::{ModelError, ModelSource, ranges};

/// The class that diffusers names.
const CLASS: &str = "AutoencoderKL";
/// The most stages, each of which may halve the picture.
const MAX_STAGES: usize = 8;

/// Config of the autoencoder.
#[derive(Clone, Debug, Deserialize)]
pub struct AutoencoderKlConfig {
    /// Channels of each stage, from full resolution on; each but the last halves the picture.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a stage; decoders have one more.
    pub layers_per_block: usize,
    /// C, latent channels.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Latents are this times their distance from the shift.
    pub scaling_factor: f32,
    /// What is subtracted from latents before they are scaled.
    #[serde(default)]
    pub shift_factor: Option<f32>,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle of encoder and decoder attends.
    pub mid_block_add_attention: bool,
    in_channels: usize,
    out_channels: usize,
    act_fn: String,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    /// Statistics per channel, which no supported model has.
    #[serde(default)]
    latents_mean: Option<Vec<f32>>,
    #[serde(default)]
    latents_std: Option<Vec<f32>>,
}

impl AutoencoderKlConfig {
    /// Reads the config of the component `vae`.
    ///
    /// # Errors
    /// If it is missing, damaged, or of another model.
    pub(crate) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, "vae")?;
        file.check_class("vae", file.class_name(), &[CLASS])?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// Pixels per latent pixel along one side.
    pub(crate) fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Held at full resolution for each pixel: a residual block's input, its norm's centred and scaled values, the
    /// activation, the convolution's input by rows, and its output.
    pub(crate) fn numbers_per_pixel(&self) -> u64 {
        6 * self.block_out_channels[0] as u64
    }

    /// Operations for each pixel that becomes latents.
    pub(crate) fn flops_per_pixel(&self) -> u64 {
        encoder_flops_per_pixel(&self.block_out_channels, self.layers_per_block)
    }

    fn check(&self) -> Result<(), String> {
        let stages = self.block_out_channels.len();
        ranges::check(&[
            ("the number of block_out_channels", stages, 1..=MAX_STAGES),
            ("layers_per_block", self.layers_per_block, ranges::LAYERS),
            ("latent_channels", self.latent_channels, ranges::WIDTH),
            ("norm_num_groups", self.norm_num_groups, ranges::WIDTH),
            ("in_channels", self.in_channels, 3..=3),
            ("out_channels", self.out_channels, 3..=3),
        ])?;
        for channels in &self.block_out_channels {
            ranges::check(&[("one of block_out_channels", *channels, ranges::WIDTH)])?;
            if !channels.is_multiple_of(self.norm_num_groups) {
                return Err(format!(
                    "one of block_out_channels is {channels}, expected a multiple of norm_num_groups, {}",
                    self.norm_num_groups
                ));
            }
        }
        ranges::check_positive(&[("scaling_factor", self.scaling_factor)])?;
        self.check_blocks(stages)?;
        if self.act_fn != "silu" {
            return Err(format!("act_fn is {}, expected silu", self.act_fn));
        }
        if self.shift_factor.is_some_and(|shift| !shift.is_finite()) {
            return Err("shift_factor is no finite number".into());
        }
        if self.latents_mean.is_some() || self.latents_std.is_some() {
            return Err(
                "latents_mean and latents_std: expected null, with scaling_factor in their place".into()
            );
        }
        Ok(())
    }

    fn check_blocks(&self, stages: usize) -> Result<(), String> {
        let lists = [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ];
        for (name, types, expected) in lists {
            if types.len() != stages || types.iter().any(|found| found != expected) {
                return Err(format!("{name} are {types:?}, expected {stages} of {expected}"));
            }
        }
        Ok(())
    }
}

/// Pixels per latent pixel along one side of the autoencoder, published where neither it nor its config was given.
pub(crate) fn latent_factor(source: &ModelSource) -> Result<usize, ModelError> {
    const PUBLISHED: usize = 8;
    match AutoencoderKlConfig::read(source) {
        Ok(config) => Ok(config.factor()),
        Err(ModelError::NotBeside { .. }) => Ok(PUBLISHED),
        Err(error) => Err(error),
    }
}

/// What a file means where it leaves a key out: diffusers' defaults.
fn defaults() -> Value {
    json!({
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "use_quant_conv": true,
        "use_post_quant_conv": true,
        "mid_block_add_attention": true,
    })
}
