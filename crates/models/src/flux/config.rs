//! The config files of a FLUX.1 folder.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::parts::autoencoder_kl::AutoencoderKlConfig;
use crate::parts::clip::ClipTextConfig;
use crate::parts::double_stream::Heads;
use crate::parts::patches::PATCH;
use crate::parts::t5::T5Config;
use crate::{ModelError, ModelSource, ranges};

/// The configs of all components, checked against each other.
pub(super) struct Configs {
    pub(super) text_encoder: ClipTextConfig,
    pub(super) text_encoder_2: T5Config,
    pub(super) transformer: TransformerConfig,
}

impl Configs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, super::DENOISER)?;
        let transformer = TransformerConfig::of(&file)?;
        let text_encoder = ClipTextConfig::read(source, super::TEXT_ENCODER)?;
        let text_encoder_2 = T5Config::read(source, super::TEXT_ENCODER_2)?;
        let channels = AutoencoderKlConfig::read(source)?.latent_channels;
        let pairs = [
            (
                "joint_attention_dim",
                transformer.joint_attention_dim,
                "width of text_encoder_2",
                text_encoder_2.d_model,
            ),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                "pooled width of text_encoder",
                text_encoder.pooled_width(),
            ),
            ("in_channels", transformer.in_channels, "4 × latent channels of the vae", 4 * channels),
        ];
        for (name, found, of, expected) in pairs {
            if found != expected {
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        Ok(Self { text_encoder, text_encoder_2, transformer })
    }
}

/// `transformer/config.json` of class `FluxTransformer2DModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct TransformerConfig {
    /// Width of an image token, `4 ·` latent channels.
    pub in_channels: usize,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Single-stream blocks after them.
    pub num_single_layers: usize,
    /// E.
    pub attention_head_dim: usize,
    /// K.
    pub num_attention_heads: usize,
    /// J, width of the text states.
    pub joint_attention_dim: usize,
    /// P, width of the pooled states.
    pub pooled_projection_dim: usize,
    /// Rotary dims of (a spare axis, row, column); they add up to E.
    pub axes_dims_rope: [usize; 3],
    /// Whether it is told a guidance scale, which it was distilled to follow.
    pub guidance_embeds: bool,
    patch_size: usize,
    #[serde(default)]
    out_channels: Option<usize>,
}

impl TransformerConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        Self::of(&ConfigFile::of_component(source, super::DENOISER)?)
    }

    fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        file.check_class(super::DENOISER, file.class_name(), &["FluxTransformer2DModel"])?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// K and E.
    pub(super) fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, dim: self.attention_head_dim }
    }

    /// C, channels of the latents.
    pub(super) fn latent_channels(&self) -> usize {
        self.in_channels / (PATCH * PATCH)
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("num_layers", self.num_layers, 0..=*ranges::LAYERS.end()),
            ("num_single_layers", self.num_single_layers, 0..=*ranges::LAYERS.end()),
            ("attention_head_dim", self.attention_head_dim, ranges::WIDTH),
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("joint_attention_dim", self.joint_attention_dim, ranges::WIDTH),
            ("pooled_projection_dim", self.pooled_projection_dim, ranges::WIDTH),
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("patch_size", self.patch_size, 1..=1),
        ])?;
        ranges::check(&[("num_attention_heads × attention_head_dim", self.heads().width(), ranges::WIDTH)])?;
        let axes = self.axes_dims_rope;
        let rotary = axes.iter().try_fold(0_usize, |sum, dims| sum.checked_add(*dims));
        if rotary != Some(self.attention_head_dim) || axes.iter().any(|dims| dims % 2 != 0) {
            return Err(format!(
                "axes_dims_rope are {axes:?}, expected even numbers that add up to attention_head_dim {}",
                self.attention_head_dim
            ));
        }
        let (input, output) = (self.in_channels, self.out_channels.unwrap_or(self.in_channels));
        if !input.is_multiple_of(PATCH * PATCH) || output != input {
            return Err(format!(
                "in_channels {input} and out_channels {output}, expected the same multiple of {}",
                PATCH * PATCH
            ));
        }
        Ok(())
    }
}

/// What a file means where it leaves a key out: diffusers' defaults, which are FLUX.1-schnell's.
fn defaults() -> Value {
    json!({
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": false,
        "axes_dims_rope": [16, 56, 56],
    })
}
