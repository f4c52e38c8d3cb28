//! The config files of a Z-Image folder.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::parts::autoencoder_kl::AutoencoderKlConfig;
use crate::parts::double_stream::Heads;
use crate::parts::patches::PATCH;
use crate::qwen_image::TextEncoderConfig;
use crate::{ModelError, ModelSource, ranges};

/// The configs of the components that learn, checked against each other and against the autoencoder's.
pub(super) struct Configs {
    pub(super) text_encoder: TextEncoderConfig,
    pub(super) transformer: TransformerConfig,
}

impl Configs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, super::DENOISER)?;
        let transformer = TransformerConfig::of(&file)?;
        let text_encoder = text_encoder(source)?;
        let channels = AutoencoderKlConfig::read(source)?.latent_channels;
        let pairs = [
            ("cap_feat_dim", transformer.cap_feat_dim, "text encoder's width", text_encoder.hidden_size),
            ("in_channels", transformer.in_channels, "latent channels of the vae", channels),
        ];
        for (name, found, of, expected) in pairs {
            if found != expected {
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        Ok(Self { text_encoder, transformer })
    }
}

/// The text encoder's config, a Qwen3 model's.
pub(super) fn text_encoder(source: &ModelSource) -> Result<TextEncoderConfig, ModelError> {
    TextEncoderConfig::of_qwen3(ConfigFile::of_component(source, super::TEXT_ENCODER)?)
}

/// `transformer/config.json` of class `ZImageTransformer2DModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct TransformerConfig {
    /// C, latent channels.
    pub in_channels: usize,
    /// D.
    pub dim: usize,
    /// Blocks over all tokens.
    pub n_layers: usize,
    /// Blocks over the text alone, and as many over the picture alone, before them.
    pub n_refiner_layers: usize,
    /// K.
    pub n_heads: usize,
    /// J, width of the text states.
    pub cap_feat_dim: usize,
    /// Rotary dims of (frame, row, column); they add up to E.
    pub axes_dims: [usize; 3],
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Epsilon of the blocks' norms.
    pub norm_eps: f32,
    /// What the time in [0, 1] is multiplied by.
    pub t_scale: f32,
    n_kv_heads: usize,
    qk_norm: bool,
    all_patch_size: Vec<usize>,
    all_f_patch_size: Vec<usize>,
    /// A picture encoder of a later model; not supported.
    #[serde(default)]
    siglip_feat_dim: Option<usize>,
}

impl TransformerConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        Self::of(&ConfigFile::of_component(source, super::DENOISER)?)
    }

    fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        file.check_class(super::DENOISER, file.class_name(), &["ZImageTransformer2DModel"])?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// K and E.
    pub(super) fn heads(&self) -> Heads {
        Heads { count: self.n_heads, dim: self.dim / self.n_heads }
    }

    /// Width of the MLPs.
    pub(super) fn hidden(&self) -> usize {
        (self.dim as f64 / 3.0 * 8.0) as usize
    }

    /// Width of the time embedding.
    pub(super) fn time_width(&self) -> usize {
        const LARGEST: usize = 256;
        self.dim.min(LARGEST)
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("dim", self.dim, ranges::WIDTH),
            ("n_layers", self.n_layers, ranges::LAYERS),
            ("n_refiner_layers", self.n_refiner_layers, 0..=*ranges::LAYERS.end()),
            ("n_heads", self.n_heads, ranges::WIDTH),
            ("cap_feat_dim", self.cap_feat_dim, ranges::WIDTH),
        ])?;
        ranges::check_positive(&[
            ("norm_eps", self.norm_eps),
            ("t_scale", self.t_scale),
            ("rope_theta", self.rope_theta as f32),
        ])?;
        let (axes, dim) = (self.axes_dims, self.dim / self.n_heads);
        let rotary = axes.iter().try_fold(0_usize, |sum, dims| sum.checked_add(*dims));
        if !self.dim.is_multiple_of(self.n_heads)
            || rotary != Some(dim)
            || axes.iter().any(|dims| dims % 2 != 0)
        {
            return Err(format!(
                "dim {}, n_heads {} and axes_dims {axes:?}, expected heads of one even size that axes_dims add up to",
                self.dim, self.n_heads
            ));
        }
        if self.all_patch_size != [PATCH] || self.all_f_patch_size != [1] {
            return Err(format!(
                "all_patch_size {:?} and all_f_patch_size {:?}, expected [{PATCH}] and [1]",
                self.all_patch_size, self.all_f_patch_size
            ));
        }
        if self.n_kv_heads != self.n_heads || !self.qk_norm || self.siglip_feat_dim.is_some() {
            return Err(format!(
                "n_kv_heads {}, qk_norm {}, siglip_feat_dim {:?}: expected n_heads, true and null",
                self.n_kv_heads, self.qk_norm, self.siglip_feat_dim
            ));
        }
        Ok(())
    }
}

/// What a file means where it leaves a key out: diffusers' defaults, which are the published model's.
fn defaults() -> Value {
    json!({
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": true,
        "cap_feat_dim": 2560,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "all_patch_size": [2],
        "all_f_patch_size": [1],
    })
}
