//! The config files of a Wan folder.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{AUTOENCODER, DENOISER, FRAMES_PER_LATENT, PUBLISHED_FACTOR, TEXT_ENCODER, published};
use crate::config_file::ConfigFile;
use crate::parts::double_stream::Heads;
use crate::parts::patches::PATCH;
use crate::parts::t5::T5Config;
use crate::parts::video_autoencoder::VideoAutoencoderConfig;
use crate::{ModelError, ModelSource, ranges};

/// The configs of the components that learn, checked against each other and against the autoencoder's.
pub(super) struct Configs {
    pub(super) text_encoder: T5Config,
    pub(super) transformer: TransformerConfig,
}

impl Configs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        check_index(source)?;
        let file = ConfigFile::of_component(source, DENOISER)?;
        let transformer = TransformerConfig::of(&file)?;
        let (text_encoder, vae) = (text_encoder(source)?, autoencoder(source)?);
        let pairs = [
            ("text_dim", transformer.text_dim, "text encoder's width", text_encoder.d_model),
            ("in_channels", transformer.in_channels, "latent channels of the vae", vae.z_dim),
        ];
        for (name, found, of, expected) in pairs {
            if found != expected {
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        Ok(Self { text_encoder, transformer })
    }
}

/// Refuses lists of components of models that draw otherwise than Wan 2.1's.
pub(super) fn check_index(source: &ModelSource) -> Result<(), ModelError> {
    let file = ConfigFile::shared(source, "model_index.json", published::MODEL_INDEX)?;
    let none = [Value::Null, Value::Bool(false), json!([null, null])];
    let asks = |name: &&&str| file.json.get(**name).is_some_and(|found| !none.contains(found));
    match ["transformer_2", "boundary_ratio", "expand_timesteps"].iter().find(asks) {
        None => Ok(()),
        Some(name) => Err(file.error(format!(
            "{name} is {}, expected none: Wan 2.2's models of two transformers, or of a time for each token, are not \
             supported",
            file.json[*name]
        ))),
    }
}

/// The text encoder's config, UMT5's.
pub(super) fn text_encoder(source: &ModelSource) -> Result<T5Config, ModelError> {
    T5Config::read(source, TEXT_ENCODER)
}

/// The autoencoder's.
pub(super) fn autoencoder(source: &ModelSource) -> Result<VideoAutoencoderConfig, ModelError> {
    let file = ConfigFile::of_component(source, AUTOENCODER)?;
    file.check_class(AUTOENCODER, file.class_name(), &["AutoencoderKLWan"])?;
    let config = VideoAutoencoderConfig::of(&file)?;
    let found = config.frames_per_latent();
    if found != FRAMES_PER_LATENT {
        return Err(file.error(format!(
            "temperal_downsample makes one latent frame of {found}, expected {FRAMES_PER_LATENT}"
        )));
    }
    // What the peer's pipeline goes by; with another number it draws latents of another size than the autoencoder's.
    for (name, default, expected) in [
        ("scale_factor_spatial", PUBLISHED_FACTOR, config.factor()),
        ("scale_factor_temporal", FRAMES_PER_LATENT, config.frames_per_latent()),
    ] {
        let found = file.json.get(name).map_or_else(|| json!(default), Value::clone);
        if found != json!(expected) {
            return Err(file.error(format!(
                "{name} is {found}, expected {expected}, which temperal_downsample makes of it"
            )));
        }
    }
    Ok(config)
}

/// `transformer/config.json` of class `WanTransformer3DModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct TransformerConfig {
    /// K.
    pub num_attention_heads: usize,
    /// E.
    pub attention_head_dim: usize,
    /// C, latent channels.
    pub in_channels: usize,
    /// J, width of the text states.
    pub text_dim: usize,
    /// Width of the sinusoidal features of the time.
    pub freq_dim: usize,
    /// Width of the MLPs.
    pub ffn_dim: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Whether the attention to the text reads normalised tokens.
    pub cross_attn_norm: bool,
    /// Epsilon of all norms.
    pub eps: f32,
    /// Positions along each axis.
    pub rope_max_seq_len: usize,
    out_channels: Option<usize>,
    patch_size: Vec<usize>,
    qk_norm: Option<String>,
    /// Of models that start from a picture; not supported.
    #[serde(default)]
    image_dim: Option<usize>,
    /// Of models that start from a picture; not supported.
    #[serde(default)]
    added_kv_proj_dim: Option<usize>,
    /// Of models that start from a picture; not supported.
    #[serde(default)]
    pos_embed_seq_len: Option<usize>,
}

/// The one norm of queries and keys that there is.
const QK_NORM: &str = "rms_norm_across_heads";

impl TransformerConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        Self::of(&ConfigFile::of_component(source, DENOISER)?)
    }

    fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        file.check_class(DENOISER, file.class_name(), &["WanTransformer3DModel"])?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// K and E.
    pub(super) fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, dim: self.attention_head_dim }
    }

    /// Rotary dims of (frame, row, column), which add up to E: a third each, what is left over to the frames.
    pub(super) fn rotary_dims(&self) -> [usize; 3] {
        let side = 2 * (self.attention_head_dim / 6);
        [self.attention_head_dim - 2 * side, side, side]
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("attention_head_dim", self.attention_head_dim, ranges::WIDTH),
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("text_dim", self.text_dim, ranges::WIDTH),
            ("freq_dim", self.freq_dim, ranges::WIDTH),
            ("ffn_dim", self.ffn_dim, ranges::WIDTH),
            ("num_layers", self.num_layers, ranges::LAYERS),
            ("rope_max_seq_len", self.rope_max_seq_len, ranges::WIDTH),
        ])?;
        ranges::check(&[("num_attention_heads × attention_head_dim", self.heads().width(), ranges::WIDTH)])?;
        ranges::check_positive(&[("eps", self.eps)])?;
        for (name, found) in [("attention_head_dim", self.attention_head_dim), ("freq_dim", self.freq_dim)] {
            if !found.is_multiple_of(2) {
                return Err(format!("{name} is {found}, expected an even number"));
            }
        }
        if self.patch_size != [1, PATCH, PATCH] {
            return Err(format!("patch_size is {:?}, expected [1, {PATCH}, {PATCH}]", self.patch_size));
        }
        if self.qk_norm.as_deref() != Some(QK_NORM) {
            return Err(format!("qk_norm is {:?}, expected {QK_NORM}", self.qk_norm));
        }
        let out_channels = self.out_channels.unwrap_or(self.in_channels);
        if out_channels != self.in_channels {
            return Err(format!(
                "in_channels is {} and out_channels {out_channels}, expected the same: models that start from a picture \
                 are not supported",
                self.in_channels
            ));
        }
        match self.image_dim.or(self.added_kv_proj_dim).or(self.pos_embed_seq_len) {
            None => Ok(()),
            Some(_) => Err(format!(
                "image_dim {:?}, added_kv_proj_dim {:?}, pos_embed_seq_len {:?}: expected null; models that start from a \
                 picture are not supported",
                self.image_dim, self.added_kv_proj_dim, self.pos_embed_seq_len
            )),
        }
    }
}

/// What a file means where it leaves a key out: diffusers' defaults, which are those of the published 14B model.
fn defaults() -> Value {
    json!({
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13_824,
        "num_layers": 40,
        "cross_attn_norm": true,
        "qk_norm": QK_NORM,
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    })
}
