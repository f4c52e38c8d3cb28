//! The config files of a Stable Diffusion 3 folder.

use serde::Deserialize;
use serde_json::{Value, json};

use super::published;
use crate::config_file::ConfigFile;
use crate::parts::autoencoder_kl::AutoencoderKlConfig;
use crate::parts::clip::ClipTextConfig;
use crate::parts::double_stream::{Heads, ImageAttention, Layout, QkNorm, TextStream};
use crate::parts::patches::PATCH;
use crate::parts::t5::T5Config;
use crate::{ModelError, ModelSource, ranges};

/// The norm of queries and keys that 3.5 has.
const RMS_NORM: &str = "rms_norm";

/// The configs of all components, checked against each other.
pub(super) struct Configs {
    pub(super) text: TextConfigs,
    pub(super) transformer: TransformerConfig,
}

/// The configs of the text encoders.
pub(super) struct TextConfigs {
    pub(super) clips: [ClipTextConfig; 2],
    /// `None` in a model that does without.
    pub(super) t5: Option<T5Config>,
}

impl TextConfigs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let has_t5 = published::has_t5(source)?;
        Ok(Self {
            clips: [
                ClipTextConfig::read(source, super::TEXT_ENCODER)?,
                ClipTextConfig::read(source, super::TEXT_ENCODER_2)?,
            ],
            t5: has_t5.then(|| T5Config::read(source, super::TEXT_ENCODER_3)).transpose()?,
        })
    }

    /// P, the pooled states of both CLIPs side by side.
    pub(super) fn pooled_width(&self) -> usize {
        self.clips.iter().map(ClipTextConfig::pooled_width).sum()
    }

    /// The states of both CLIPs side by side.
    fn clip_width(&self) -> usize {
        self.clips.iter().map(|clip| clip.hidden_size).sum()
    }
}

impl Configs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let text = TextConfigs::read(source)?; // which looks at the list of components first
        let file = ConfigFile::of_component(source, super::DENOISER)?;
        let transformer = TransformerConfig::of(&file)?;
        let channels = AutoencoderKlConfig::read(source)?.latent_channels;
        let joint = transformer.joint_attention_dim;
        let pairs = [
            (
                "joint_attention_dim",
                joint,
                "width of text_encoder_3",
                text.t5.as_ref().map_or(joint, |t5| t5.d_model),
            ),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                "pooled width of text_encoder and text_encoder_2",
                text.pooled_width(),
            ),
            ("in_channels", transformer.in_channels, "latent channels of the vae", channels),
        ];
        for (name, found, of, expected) in pairs {
            if found != expected {
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        let clips = text.clip_width();
        if clips > joint {
            return Err(file.error(format!(
                "joint_attention_dim is {joint}, expected at least the width of text_encoder and text_encoder_2, {clips}"
            )));
        }
        Ok(Self { text, transformer })
    }
}

/// `transformer/config.json` of class `SD3Transformer2DModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct TransformerConfig {
    /// Side of the latents that the places of the table were made for.
    pub sample_size: usize,
    /// C, channels of the latents.
    pub in_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// E.
    pub attention_head_dim: usize,
    /// K.
    pub num_attention_heads: usize,
    /// J, width of the text states.
    pub joint_attention_dim: usize,
    /// P, width of the pooled states.
    pub pooled_projection_dim: usize,
    /// Side of the table of places, in tokens: the longest side of a picture.
    pub pos_embed_max_size: usize,
    /// Blocks whose image attends to itself once more.
    pub dual_attention_layers: Vec<usize>,
    qk_norm: Option<String>,
    caption_projection_dim: usize,
    patch_size: usize,
    out_channels: Option<usize>,
}

impl TransformerConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        Self::of(&ConfigFile::of_component(source, super::DENOISER)?)
    }

    fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        file.check_class(super::DENOISER, file.class_name(), &["SD3Transformer2DModel"])?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// K and E.
    pub(super) fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, dim: self.attention_head_dim }
    }

    /// What a block has.
    pub(super) fn layout(&self, block: usize) -> Layout {
        let is_last = block + 1 == self.num_layers;
        let is_dual = self.dual_attention_layers.contains(&block);
        Layout {
            heads: self.heads(),
            qk_norm: if self.qk_norm.is_some() { QkNorm::Rms } else { QkNorm::Absent },
            text: if is_last { TextStream::Ends } else { TextStream::GoesOn },
            image: if is_dual { ImageAttention::JointAndOwn } else { ImageAttention::Joint },
        }
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("sample_size", self.sample_size, PATCH..=*ranges::WIDTH.end()),
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("num_layers", self.num_layers, ranges::LAYERS),
            ("attention_head_dim", self.attention_head_dim, ranges::WIDTH),
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("joint_attention_dim", self.joint_attention_dim, ranges::WIDTH),
            ("pooled_projection_dim", self.pooled_projection_dim, ranges::WIDTH),
            ("pos_embed_max_size", self.pos_embed_max_size, 1..=MAX_TABLE_SIDE),
            ("patch_size", self.patch_size, PATCH..=PATCH),
        ])?;
        let width = self.heads().width();
        ranges::check(&[("num_attention_heads × attention_head_dim", width, ranges::WIDTH)])?;
        if !self.attention_head_dim.is_multiple_of(2) || !width.is_multiple_of(4) {
            return Err(format!(
                "attention_head_dim is {} and num_attention_heads {}, expected an even number and a multiple of 4 with \
                 it",
                self.attention_head_dim, self.num_attention_heads
            ));
        }
        if self.caption_projection_dim != width {
            return Err(format!(
                "caption_projection_dim is {}, expected num_attention_heads × attention_head_dim, {width}",
                self.caption_projection_dim
            ));
        }
        if let Some(output) = self.out_channels
            && output != self.in_channels
        {
            return Err(format!("out_channels is {output}, expected in_channels, {}", self.in_channels));
        }
        match self.qk_norm.as_deref() {
            None | Some(RMS_NORM) => Ok(()),
            Some(other) => Err(format!("qk_norm is {other}, expected null or {RMS_NORM}")),
        }
    }
}

/// The longest side of a table of places, of which the square is allocated.
const MAX_TABLE_SIDE: usize = 1 << 12;

/// What a file means where it leaves a key out: diffusers' defaults.
fn defaults() -> Value {
    json!({
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 18,
        "attention_head_dim": 64,
        "num_attention_heads": 18,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 96,
        "dual_attention_layers": [],
        "qk_norm": null,
    })
}
