//! The causal video autoencoder of Wan (arXiv 2503.20314), which Qwen-Image uses on single frames. Numbers equal diffusers'
//! `AutoencoderKLWan` and `AutoencoderKLQwenImage`. Tiling is left out.
//!
//! The first frame has a latent frame of its own, and each further latent frame stands for as many frames as time is
//! reduced by. No state sees a later frame, so that a video goes through in chunks of one latent frame, as in the peer:
//! the memory does not grow with its length.
//!
//! Videos are stacked along the height, `[B, 3, F · height, width]` and `[B, C, F' · H, W]`, which is in memory what
//! `[B, 3, F, height, width]` is.

mod config;
mod layers;
mod past;

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::After;

pub use config::VideoAutoencoderConfig;

use self::layers::{
    AttentionBlock, CausalConv, MidBlock, Norm, Observer, Resampler, ResidualBlock, last_frame,
};
use self::past::Past;
use crate::parts::norm::per_channel;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, expected, load};
use crate::{ModelError, NamedMapper, WeightType, map_named};

/// Files of Wan's authors have other names.
pub(crate) const KEYS: KeyMap = KeyMap {
    rules: &[
        (".upsampler.resample.", ".upsamplers.0.resample.1."),
        (".upsampler.", ".upsamplers.0."),
        (".resample.", ".resample.1."),
    ],
    aliases: &[
        ("conv1.", "quant_conv."),
        ("conv2.", "post_quant_conv."),
        ("encoder.conv1.", "encoder.conv_in."),
        ("encoder.downsamples.", "encoder.down_blocks."),
        ("encoder.middle.0.", "encoder.mid_block.resnets.0."),
        ("encoder.middle.1.", "encoder.mid_block.attentions.0."),
        ("encoder.middle.2.", "encoder.mid_block.resnets.1."),
        ("encoder.head.0.", "encoder.norm_out."),
        ("encoder.head.2.", "encoder.conv_out."),
        ("decoder.conv1.", "decoder.conv_in."),
        ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
        ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
        ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
        ("decoder.upsamples.0.", "decoder.up_blocks.0.resnets.0."),
        ("decoder.upsamples.1.", "decoder.up_blocks.0.resnets.1."),
        ("decoder.upsamples.2.", "decoder.up_blocks.0.resnets.2."),
        ("decoder.upsamples.3.", "decoder.up_blocks.0.upsamplers.0."),
        ("decoder.upsamples.4.", "decoder.up_blocks.1.resnets.0."),
        ("decoder.upsamples.5.", "decoder.up_blocks.1.resnets.1."),
        ("decoder.upsamples.6.", "decoder.up_blocks.1.resnets.2."),
        ("decoder.upsamples.7.", "decoder.up_blocks.1.upsamplers.0."),
        ("decoder.upsamples.8.", "decoder.up_blocks.2.resnets.0."),
        ("decoder.upsamples.9.", "decoder.up_blocks.2.resnets.1."),
        ("decoder.upsamples.10.", "decoder.up_blocks.2.resnets.2."),
        ("decoder.upsamples.11.", "decoder.up_blocks.2.upsamplers.0."),
        ("decoder.upsamples.12.", "decoder.up_blocks.3.resnets.0."),
        ("decoder.upsamples.13.", "decoder.up_blocks.3.resnets.1."),
        ("decoder.upsamples.14.", "decoder.up_blocks.3.resnets.2."),
        ("decoder.head.0.", "decoder.norm_out."),
        ("decoder.head.2.", "decoder.conv_out."),
    ],
    respelled: &[
        (".residual.0.", ".norm1."),
        (".residual.2.", ".conv1."),
        (".residual.3.", ".norm2."),
        (".residual.6.", ".conv2."),
        (".shortcut.", ".conv_shortcut."),
    ],
    ..KeyMap::PLAIN
};

/// Convolutions to an eighth of the size and a fourth of the frames (in the published config) and back.
///
/// Its latents are the mean of the posterior, normalised by the config's mean and deviation per channel.
#[derive(Module, Debug)]
pub struct VideoAutoencoder {
    encoder: Encoder,
    quant_conv: CausalConv,
    post_quant_conv: CausalConv,
    decoder: Decoder,
    #[module(skip)]
    config: VideoAutoencoderConfig,
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

impl VideoAutoencoder {
    /// Loads the weights of a component.
    pub(crate) fn load(
        config: VideoAutoencoderConfig,
        files: &WeightFiles,
        device: &Device,
    ) -> Result<Self, ModelError> {
        load(Self::unfilled(config, device), files, &KEYS, WeightType::F32)
    }

    /// The same without the weights that a single frame never meets, two thirds of most convolutions: it is an error then
    /// to give it more.
    pub(crate) fn for_pictures(mut self) -> Self {
        self.resamplers().for_each(Resampler::drop_time);
        map_named(self, &mut KeepLastFrame)
    }

    fn unfilled(config: VideoAutoencoderConfig, device: &Device) -> Self {
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

    pub(crate) fn factor(&self) -> usize {
        self.config.factor()
    }

    pub(crate) fn channels(&self) -> usize {
        self.config.z_dim
    }

    /// Normalised latents of pictures or videos.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, frames · height, width]` in [−1, 1]; output `[B, C, latent frames · H, W]`
    ///
    /// # Panics
    /// If the frames after the first do not make whole latent frames.
    pub fn encode(&self, pixels: Tensor<4>, frames: usize) -> Tensor<4> {
        let moments = self.moments(pixels, frames, &mut |_, _| ());
        let device = moments.device();
        let mean = moments.slice_dim(1, 0..self.config.z_dim);
        (mean - per_channel(&self.config.latents_mean, &device))
            / per_channel(&self.config.latents_std, &device)
    }

    /// Pictures or videos of normalised latents.
    ///
    /// # Shapes
    /// - `latents`: `[B, C, latent frames · H, W]`; output `[B, 3, frames · height, width]`, mostly in [−1, 1] but not
    ///   clamped
    ///
    /// # Panics
    /// As [`VideoAutoencoder::encode`].
    pub fn decode(&self, latents: Tensor<4>, frames: usize) -> Tensor<4> {
        self.pixels(latents, frames, &mut |_, _| ())
    }

    /// The states that [`VideoAutoencoder::encode`] passes through for pictures, by name: where two implementations part.
    ///
    /// Names are `enc.<layer>` in order of evaluation (`conv_in`, `down<i>`, `mid.attn`, `mid`, `norm_out`,
    /// `conv_out`), then `quant_conv`: mean and logarithm of the variance of the posterior, `[B, 2C, H, W]`.
    pub fn encode_states(&self, pixels: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.moments(pixels, 1, &mut |name, state| states.push((name.to_owned(), state.clone())));
        states
    }

    /// The states that [`VideoAutoencoder::decode`] passes through for pictures, by name.
    ///
    /// Names are `post_quant_conv`, then `dec.<layer>` in order of evaluation (`conv_in`, `mid.attn`, `mid`,
    /// `up<i>`, `norm_out`, `conv_out`).
    pub fn decode_states(&self, latents: Tensor<4>) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.pixels(latents, 1, &mut |name, state| states.push((name.to_owned(), state.clone())));
        states
    }

    /// `[B, 3, frames · height, width]` to `[B, 2C, latent frames · H, W]`.
    fn moments(&self, pixels: Tensor<4>, frames: usize, observe: &mut Observer) -> Tensor<4> {
        let (batch, latent_frames) = (pixels.dims()[0], self.latent_frames(frames));
        let (pixels, step) = (apart(pixels, frames), self.config.frames_per_latent());
        let mut past = Past::new(batch);
        let encoded = (0..latent_frames).map(|chunk| {
            past.enter(chunk, latent_frames);
            let (start, length) = if chunk == 0 { (0, 1) } else { (1 + step * (chunk - 1), step) };
            let frames = pixels.clone().narrow(0, start * batch, length * batch);
            self.encoder.forward(frames, &mut past, &mut |name, state| observe(&format!("enc.{name}"), state))
        });
        let moments = self.quant_conv.forward(Tensor::cat(encoded.collect(), 0), &mut past);
        observe("quant_conv", &moments);
        stacked(moments, batch)
    }

    /// `[B, C, latent frames · H, W]` to `[B, 3, frames · height, width]`.
    fn pixels(&self, latents: Tensor<4>, frames: usize, observe: &mut Observer) -> Tensor<4> {
        let (device, batch) = (latents.device(), latents.dims()[0]);
        let latents = latents * per_channel(&self.config.latents_std, &device)
            + per_channel(&self.config.latents_mean, &device);
        let (latent_frames, mut past) = (self.latent_frames(frames), Past::new(batch));
        let hidden = self.post_quant_conv.forward(apart(latents, latent_frames), &mut past);
        observe("post_quant_conv", &hidden);
        let decoded = (0..latent_frames).map(|chunk| {
            past.enter(chunk, latent_frames);
            let frame = hidden.clone().narrow(0, chunk * batch, batch);
            self.decoder.forward(frame, &mut past, &mut |name, state| observe(&format!("dec.{name}"), state))
        });
        stacked(Tensor::cat(decoded.collect(), 0), batch)
    }

    fn latent_frames(&self, frames: usize) -> usize {
        let step = self.config.frames_per_latent();
        assert!(frames % step == 1 % step, "{frames} frames, expected one more than a multiple of {step}");
        (frames - 1) / step + 1
    }
}

/// The tensors that the weight files of a config hold.
pub(crate) fn tensors(config: &VideoAutoencoderConfig, device: &Device) -> TensorShapes {
    expected(&VideoAutoencoder::unfilled(config.clone(), device), &KEYS)
}

/// Whether weight files are of such an autoencoder.
pub(crate) fn is_of(files: &WeightFiles) -> bool {
    let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
    all(&["quant_conv.weight", "decoder.conv_in.weight", "decoder.norm_out.gamma"])
        || all(&["conv1.weight", "decoder.conv1.weight", "decoder.head.0.gamma"])
}

/// `[B, C, F · H, W]` to `[F · B, C, H, W]`.
fn apart(x: Tensor<4>, frames: usize) -> Tensor<4> {
    if frames == 1 {
        return x;
    }
    let [batch, channels, rows, width] = x.dims();
    assert!(rows.is_multiple_of(frames), "{rows} rows of {frames} frames");
    let height = rows / frames;
    x.reshape([batch, channels, frames, height, width])
        .permute([2, 0, 1, 3, 4]) // [F, B, C, H, W]
        .reshape([frames * batch, channels, height, width])
}

/// Inverse of [`apart`].
fn stacked(x: Tensor<4>, batch: usize) -> Tensor<4> {
    let [rows, channels, height, width] = x.dims();
    let frames = rows / batch;
    if frames == 1 {
        return x;
    }
    x.reshape([frames, batch, channels, height, width])
        .permute([1, 2, 0, 3, 4]) // [B, C, F, H, W]
        .reshape([batch, channels, frames * height, width])
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
    fn unfilled(config: &VideoAutoencoderConfig, device: &Device) -> Self {
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

    fn forward(&self, pixels: Tensor<4>, past: &mut Past, observe: &mut Observer) -> Tensor<4> {
        let mut x = self.conv_in.forward(pixels, past);
        observe("conv_in", &x);
        for (index, block) in self.down_blocks.iter().enumerate() {
            x = match block {
                DownBlock::Residual(block) => block.forward(x, past),
                DownBlock::Attention(block) => block.forward(x),
                DownBlock::Halve(resampler) => resampler.halve(x, past),
            };
            observe(&format!("down{index}"), &x);
        }
        let x = self.mid_block.forward(x, past, observe);
        head((&self.norm_out, &self.conv_out), x, past, observe)
    }
}

impl Decoder {
    fn unfilled(config: &VideoAutoencoderConfig, device: &Device) -> Self {
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

    fn forward(&self, latents: Tensor<4>, past: &mut Past, observe: &mut Observer) -> Tensor<4> {
        let x = self.conv_in.forward(latents, past);
        observe("conv_in", &x);
        let mut x = self.mid_block.forward(x, past, observe);
        for (index, block) in self.up_blocks.iter().enumerate() {
            x = block.resnets.iter().fold(x, |x, resnet| resnet.forward(x, past));
            x = block.upsampler.iter().fold(x, |x, upsampler| upsampler.double(x, past));
            observe(&format!("up{index}"), &x);
        }
        head((&self.norm_out, &self.conv_out), x, past, observe)
    }
}

/// What encoder and decoder end with.
fn head(
    (norm, conv): (&Norm, &CausalConv),
    x: Tensor<4>,
    past: &mut Past,
    observe: &mut Observer,
) -> Tensor<4> {
    let x = norm.forward(x, After::Nothing);
    observe("norm_out", &x);
    let x = conv.forward(silu(x), past);
    observe("conv_out", &x);
    x
}
