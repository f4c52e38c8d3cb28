//! The autoencoder of latent diffusion (arXiv 2112.10752), with 4 latent channels in Stable Diffusion and 16 in FLUX and
//! Z-Image. Numbers equal diffusers' `AutoencoderKL`. Tiling is left out.

mod config;
mod layers;
mod original;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

pub use config::AutoencoderKlConfig;
pub(crate) use config::latent_factor;

use self::layers::{Decoder, Encoder, Observer};
use crate::parts::conv::Conv2d;
use crate::weights::{KeyMap, Rule, TensorShapes, WeightFiles, expected, load};
use crate::{ModelError, ModelSource, WeightType};

/// Old files have other names for the attention's projections.
pub(crate) const KEYS: KeyMap = KeyMap {
    rules: &[(".to_out.", ".to_out.0.")],
    aliases: &[
        ("encoder.mid_block.attentions.0.query.", "encoder.mid_block.attentions.0.to_q."),
        ("encoder.mid_block.attentions.0.key.", "encoder.mid_block.attentions.0.to_k."),
        ("encoder.mid_block.attentions.0.value.", "encoder.mid_block.attentions.0.to_v."),
        ("encoder.mid_block.attentions.0.proj_attn.", "encoder.mid_block.attentions.0.to_out.0."),
        ("decoder.mid_block.attentions.0.query.", "decoder.mid_block.attentions.0.to_q."),
        ("decoder.mid_block.attentions.0.key.", "decoder.mid_block.attentions.0.to_k."),
        ("decoder.mid_block.attentions.0.value.", "decoder.mid_block.attentions.0.to_v."),
        ("decoder.mid_block.attentions.0.proj_attn.", "decoder.mid_block.attentions.0.to_out.0."),
    ],
    ..KeyMap::PLAIN
};

/// Convolutions to a fraction of the size and back.
#[derive(Module, Debug)]
pub struct AutoencoderKl {
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    #[module(skip)]
    config: AutoencoderKlConfig,
}

/// What the encoder knows of a picture's latents: a normal distribution of each, before [`AutoencoderKl::latents`]
/// scales them.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// `[B, C, H, W]`
    pub mean: Tensor<4>,
    /// `[B, C, H, W]`, logarithm of the variance, between −30 and 20.
    pub logvar: Tensor<4>,
}

impl Posterior {
    /// The sample that standard normal noise stands for.
    ///
    /// # Shapes
    /// - `noise` and output: `[B, C, H, W]`
    pub fn sample(self, noise: Tensor<4>) -> Tensor<4> {
        self.mean + self.logvar.mul_scalar(0.5).exp() * noise
    }
}

impl AutoencoderKl {
    /// Loads the component `vae` of a model on the plain side of `device`.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(source: &ModelSource, device: &Device) -> Result<Self, ModelError> {
        let empty = Self::unfilled(AutoencoderKlConfig::read(source)?, device);
        load(empty, &source.weights("vae")?, &KEYS, WeightType::F32)
    }

    /// The tensors of the component's weight files, from its config alone.
    pub(crate) fn expected(source: &ModelSource) -> Result<TensorShapes, ModelError> {
        let empty = Self::unfilled(AutoencoderKlConfig::read(source)?, &Device::flex());
        Ok(expected(&empty, &KEYS))
    }

    fn unfilled(config: AutoencoderKlConfig, device: &Device) -> Self {
        let channels = config.latent_channels;
        let pointwise =
            |wanted: bool, channels| wanted.then(|| Conv2d::unfilled(channels, channels, 1, device));
        Self {
            encoder: Encoder::unfilled(&config, device),
            quant_conv: pointwise(config.use_quant_conv, 2 * channels),
            post_quant_conv: pointwise(config.use_post_quant_conv, channels),
            decoder: Decoder::unfilled(&config, device),
            config,
        }
    }

    /// Pixels per latent pixel along one side.
    pub fn factor(&self) -> usize {
        self.config.factor()
    }

    /// C, channels of the latents.
    pub fn channels(&self) -> usize {
        self.config.latent_channels
    }

    /// The distribution of the latents of pictures.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1], sides multiples of [`AutoencoderKl::factor`]
    pub fn posterior(&self, pixels: Tensor<4>) -> Posterior {
        self.moments(pixels, &mut |_, _| ())
    }

    /// Normalised latents of what a [`Posterior`] holds.
    ///
    /// # Shapes
    /// `[B, C, H, W]`
    pub fn latents(&self, encoded: Tensor<4>) -> Tensor<4> {
        (encoded - self.shift()) * self.config.scaling_factor
    }

    /// Normalised latents of pictures: the mean of the posterior.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1]; output `[B, C, H, W]`
    pub fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        self.latents(self.posterior(pixels).mean)
    }

    /// Pictures of normalised latents.
    ///
    /// # Shapes
    /// - `latents`: `[B, C, H, W]`; output `[B, 3, height, width]`, mostly in [−1, 1] but not clamped
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        self.pixels(latents / self.config.scaling_factor + self.shift(), &mut |_, _| ())
    }

    /// The states that [`AutoencoderKl::posterior`] passes through, by name: where two implementations part.
    ///
    /// Names are `enc.<layer>` in order of evaluation: `conv_in`, `down<i>`, `mid.attn`, `mid`.
    pub fn encode_states(&self, pixels: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.moments(pixels, &mut |name, state| states.push((format!("enc.{name}"), state.clone())));
        states
    }

    /// The states that pictures of latents before their normalisation pass through, by name: `dec.<layer>`, `conv_in`,
    /// `mid.attn`, `mid`, `up<i>`.
    pub fn decode_states(&self, encoded: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.pixels(encoded, &mut |name, state| states.push((format!("dec.{name}"), state.clone())));
        states
    }

    fn shift(&self) -> f32 {
        self.config.shift_factor.unwrap_or(0.0)
    }

    fn moments(&self, pixels: Tensor<4>, observe: &mut Observer) -> Posterior {
        let encoded = through(&self.quant_conv, self.encoder.forward(pixels, observe));
        let channels = self.config.latent_channels;
        Posterior {
            mean: encoded.clone().narrow(1, 0, channels),
            logvar: encoded.narrow(1, channels, channels).clamp(-30.0, 20.0),
        }
    }

    fn pixels(&self, encoded: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        self.decoder.forward(through(&self.post_quant_conv, encoded), observe)
    }
}

/// How to read weight files in the layout of latent diffusion's own code; `None` for others.
pub(crate) fn original_layout(files: &WeightFiles) -> Option<&'static [Rule]> {
    original::is_original(files).then_some(original::LAYOUT)
}

/// Whether weight files are an autoencoder's that has no convolutions between its halves, as those of 16 channels.
pub(crate) fn is_without_quantiser(files: &WeightFiles) -> bool {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    all(&["encoder.conv_in.weight", "decoder.conv_norm_out.weight"]) && !files.contains("quant_conv.weight")
}

fn through(conv: &Option<Conv2d>, x: Tensor<4>) -> Tensor<4> {
    match conv {
        Some(conv) => conv.forward(x),
        None => x,
    }
}
