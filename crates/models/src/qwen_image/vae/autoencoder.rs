//! The published autoencoder, a video VAE (Wan, arXiv 2503.20314) on single frames. Numbers equal
//! diffusers' `AutoencoderKLQwenImage`. Tiling is left out.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::After;

use super::layers::{
    AttentionBlock, CausalConv, MidBlock, Norm, Observer, Resampler, ResidualBlock, last_frame,
};
use super::{AutoencoderConfig, per_channel};
use crate::weights::{KeyMap, WeightFiles, load};
use crate::{ModelError, NamedMapper, WeightType, map_named};

pub(in super::super) const KEYS: KeyMap = KeyMap {
    rules: &[
        (".upsampler.resample.", ".upsamplers.0.resample.1."),
        (".upsampler.", ".upsamplers.0."),
        (".resample.", ".resample.1."),
    ],
    ..KeyMap::PLAIN
};

/// Convolutions to an eighth of the size (in the published config) and back.
///
/// Its latents are the mean of the posterior, normalised by the config's mean and deviation per channel.
#[derive(Module, Debug)]
pub struct Autoencoder {
    encoder: Encoder,
    quant_conv: CausalConv,
    post_quant_conv: CausalConv,
    decoder: Decoder,
    #[module(skip)]
    config: AutoencoderConfig,
}

#[derive(Module, Debug)]
struct Encoder {
    conv_in: CausalConv,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    norm_out: Norm,
    conv_out: CausalConv,
}

/// Files number the encoder's layers through, whatever they are.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a dozen of them beside their tensors")]
enum DownBlock {
    Residual(ResidualBlock),
    Attention(AttentionBlock),
    Halve(Resampler),
}

#[derive(Module, Debug)]
struct Decoder {
    conv_in: CausalConv,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    norm_out: Norm,
    conv_out: CausalConv,
}

#[derive(Module, Debug)]
struct UpBlock {
    resnets: Vec<ResidualBlock>,
    upsampler: Option<Resampler>,
}

impl Autoencoder {
    /// Loads the weights in a component's folder, then frees those that a single frame never meets: two
    /// thirds of most convolutions.
    pub(super) fn load(
        config: AutoencoderConfig,
        files: &WeightFiles,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut loaded = load(Self::unfilled(config, device), files, &KEYS, WeightType::F32)?;
        loaded.resamplers().for_each(Resampler::drop_time);
        Ok(map_named(loaded, &mut KeepLastFrame))
    }

    pub(super) fn unfilled(config: AutoencoderConfig, device: &Device) -> Self {
        let latents = config.z_dim;
        Self {
            encoder: Encoder::unfilled(&config, device),
            quant_conv: CausalConv::unfilled(2 * latents, 2 * latents, 1, device),
            post_quant_conv: CausalConv::unfilled(latents, latents, 1, device),
            decoder: Decoder::unfilled(&config, device),
            config,
        }
    }

    fn resamplers(&mut self) -> impl Iterator<Item = &mut Resampler> {
        let down = self.encoder.down_blocks.iter_mut().filter_map(|block| match block {
            DownBlock::Halve(resampler) => Some(resampler),
            DownBlock::Residual(_) | DownBlock::Attention(_) => None,
        });
        down.chain(self.decoder.up_blocks.iter_mut().filter_map(|block| block.upsampler.as_mut()))
    }

    pub(super) fn factor(&self) -> usize {
        self.config.factor()
    }

    pub(super) fn channels(&self) -> usize {
        self.config.z_dim
    }

    /// See [`super::Vae::encode`].
    pub fn encode(&self, pixels: Tensor<4>) -> Tensor<4> {
        let moments = self.moments(pixels, &mut |_, _| ());
        let device = moments.device();
        let mean = moments.slice_dim(1, 0..self.config.z_dim);
        (mean - per_channel(&self.config.latents_mean, &device))
            / per_channel(&self.config.latents_std, &device)
    }

    /// See [`super::Vae::decode`].
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        self.pixels(latents, &mut |_, _| ())
    }

    /// The states that [`Autoencoder::encode`] passes through, by name: where two implementations part.
    ///
    /// Names are `enc.<layer>` in order of evaluation (`conv_in`, `down<i>`, `mid.attn`, `mid`, `norm_out`,
    /// `conv_out`), then `quant_conv`: mean and logarithm of the variance of the posterior, `[B, 2C, H, W]`.
    pub fn encode_states(&self, pixels: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.moments(pixels, &mut |name, state| states.push((name.to_owned(), state.clone())));
        states
    }

    /// The states that [`Autoencoder::decode`] passes through, by name.
    ///
    /// Names are `post_quant_conv`, then `dec.<layer>` in order of evaluation (`conv_in`, `mid.attn`, `mid`,
    /// `up<i>`, `norm_out`, `conv_out`).
    pub fn decode_states(&self, latents: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.pixels(latents, &mut |name, state| states.push((name.to_owned(), state.clone())));
        states
    }

    /// `[B, 3, height, width]` to `[B, 2C, H, W]`.
    fn moments(&self, pixels: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let encoded = self.encoder.forward(pixels, &mut |name, state| observe(&format!("enc.{name}"), state));
        let moments = self.quant_conv.forward(encoded);
        observe("quant_conv", &moments);
        moments
    }

    /// `[B, C, H, W]` to `[B, 3, height, width]`.
    fn pixels(&self, latents: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let device = latents.device();
        let latents = latents * per_channel(&self.config.latents_std, &device)
            + per_channel(&self.config.latents_mean, &device);
        let hidden = self.post_quant_conv.forward(latents);
        observe("post_quant_conv", &hidden);
        self.decoder.forward(hidden, &mut |name, state| observe(&format!("dec.{name}"), state))
    }
}

/// Drops all but the last frame of causal convolutions: the only tensors of rank five.
struct KeepLastFrame;

impl NamedMapper for KeepLastFrame {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if D != 5 {
            return parameter;
        }
        parameter.map(|weight| {
            let device = weight.device();
            // Through the host, because a slice may share the storage of the whole.
            Tensor::from_data(last_frame(weight).into_data(), &device)
        })
    }
}

impl Encoder {
    fn unfilled(config: &AutoencoderConfig, device: &Device) -> Self {
        let mut down_blocks = Vec::new();
        let (mut channels, mut scale) = (config.base_dim, 1.0);
        for (stage, factor) in config.dim_mult.iter().enumerate() {
            let output = config.base_dim * factor;
            for _ in 0..config.num_res_blocks {
                down_blocks.push(DownBlock::Residual(ResidualBlock::unfilled(channels, output, device)));
                if config.attn_scales.contains(&scale) {
                    down_blocks.push(DownBlock::Attention(AttentionBlock::unfilled(output, device)));
                }
                channels = output;
            }
            if let Some(over_time) = config.temperal_downsample.get(stage) {
                down_blocks.push(DownBlock::Halve(Resampler::unfilled_down(channels, *over_time, device)));
                scale /= 2.0;
            }
        }
        Self {
            conv_in: CausalConv::unfilled(config.input_channels, config.base_dim, 3, device),
            down_blocks,
            mid_block: MidBlock::unfilled(channels, device),
            norm_out: Norm::unfilled(channels, device),
            conv_out: CausalConv::unfilled(channels, 2 * config.z_dim, 3, device),
        }
    }

    fn forward(&self, pixels: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.conv_in.forward(pixels);
        observe("conv_in", &x);
        for (index, block) in self.down_blocks.iter().enumerate() {
            x = match block {
                DownBlock::Residual(block) => block.forward(x),
                DownBlock::Attention(block) => block.forward(x),
                DownBlock::Halve(resampler) => resampler.halve(x),
            };
            observe(&format!("down{index}"), &x);
        }
        let x = self.mid_block.forward(x, observe);
        head(&self.norm_out, &self.conv_out, x, observe)
    }
}

impl Decoder {
    fn unfilled(config: &AutoencoderConfig, device: &Device) -> Self {
        let widths = config.dim_mult.iter().rev().map(|factor| config.base_dim * factor);
        let over_time = config.temperal_downsample.iter().rev();
        let top = config.base_dim * config.dim_mult[config.dim_mult.len() - 1];
        let (mut channels, mut output, mut up_blocks) = (top, top, Vec::new());
        for (stage, width) in widths.enumerate() {
            output = width;
            let mut resnets = vec![ResidualBlock::unfilled(channels, output, device)];
            resnets
                .extend((0..config.num_res_blocks).map(|_| ResidualBlock::unfilled(output, output, device)));
            let upsampler = over_time
                .clone()
                .nth(stage)
                .map(|over_time| Resampler::unfilled_up(output, *over_time, device));
            up_blocks.push(UpBlock { resnets, upsampler });
            channels = output / 2;
        }
        Self {
            conv_in: CausalConv::unfilled(config.z_dim, top, 3, device),
            mid_block: MidBlock::unfilled(top, device),
            up_blocks,
            norm_out: Norm::unfilled(output, device),
            conv_out: CausalConv::unfilled(output, config.input_channels, 3, device),
        }
    }

    fn forward(&self, latents: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
        let x = self.conv_in.forward(latents);
        observe("conv_in", &x);
        let mut x = self.mid_block.forward(x, observe);
        for (index, block) in self.up_blocks.iter().enumerate() {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x));
            x = block.upsampler.iter().fold(x, |x, upsampler| upsampler.double(x));
            observe(&format!("up{index}"), &x);
        }
        head(&self.norm_out, &self.conv_out, x, observe)
    }
}

/// What encoder and decoder end with.
fn head(norm: &Norm, conv: &CausalConv, x: Tensor<4>, observe: &mut Observer) -> Tensor<4> {
    let x = norm.forward(x, After::Nothing);
    observe("norm_out", &x);
    let x = conv.forward(silu(x));
    observe("conv_out", &x);
    x
}
