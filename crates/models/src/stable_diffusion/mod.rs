//! Stable Diffusion 1 and 2 (arXiv 2112.10752) and SDXL (arXiv 2307.01952): a UNet over latents, conditioned on the
//! states of CLIP's text encoders. It was trained on variance-preserving noise, which [`fewstep_flow::diffusion`] shows
//! as flow matching.
//!
//! The folder layout is the published one (`model_index.json`, `unet/`, `text_encoder/`, `tokenizer/`, `vae/`,
//! `scheduler/`; SDXL has `text_encoder_2/` and `tokenizer_2/` too).

mod config;
mod footprint;
mod kind;
mod published;
mod spatial_transformer;
mod stages;
mod text;
mod trial;
mod unet;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::diffusion::{DiffusionConfig, NoiseTable, preserving};
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::schedule::SchedulerConfig;
use fewstep_kernels::HalfType;

pub use config::UnetConfig;
pub(crate) use kind::{BASE, Kind, XL};
pub use unet::{AddedCondition, Unet, UnetCondition};

use self::kind::Configs;
use self::text::TextEncoders;
use crate::config_file::ConfigFile;
use crate::family::{self, Defaults, Family, Settings, Sizes};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::weights::initialize;
use crate::{Components, Condition, Linear, LoadOptions, ModelError, ModelSource, PromptLength};

/// Pixels per latent pixel along one side, of every published autoencoder.
const PUBLISHED_FACTOR: usize = 8;

/// The components of one model.
#[derive(Module, Debug)]
pub struct StableDiffusion {
    #[module(skip)]
    kind: &'static Kind,
    /// Absent where the denoiser alone was loaded.
    text_encoder: Option<crate::ClipTextEncoder>,
    /// SDXL's second; absent as the first.
    text_encoder_2: Option<crate::ClipTextEncoder>,
    /// The denoiser; absent where the encoders alone were loaded.
    unet: Option<Unet>,
    /// Pixels to latents and back; absent where the denoiser alone was loaded.
    vae: Option<AutoencoderKl>,
    /// What goes with the text encoders.
    #[module(skip)]
    text: TextEncoders,
    /// σ of the timesteps that the UNet is told.
    #[module(skip)]
    table: NoiseTable,
    #[module(skip)]
    settings: Settings,
}

/// The components with weights.
struct Parts {
    text_encoders: [Option<crate::ClipTextEncoder>; 2],
    unet: Option<Unet>,
    vae: Option<AutoencoderKl>,
}

impl StableDiffusion {
    /// Loads the components that the options name.
    fn from_pretrained(
        kind: &'static Kind,
        source: &ModelSource,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(kind, source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let encoder = |name| crate::ClipTextEncoder::from_pretrained(source, name, dtype, device);
        let parts = Parts {
            text_encoders: kind.encoders(|name| options.encoder(|| encoder(name)))?,
            unet: options.denoiser(|| Unet::from_pretrained(source, dtype, device))?,
            vae: options
                .encoder(|| Ok(store_weights(AutoencoderKl::from_pretrained(source, device)?, dtype)))?,
        };
        Self::with_parts(kind, source, parts, options)
    }

    /// The same with sizes and names but without weights.
    fn outline(kind: &'static Kind, source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(kind, source)?;
        }
        let device = &options.device;
        let encoder = |name| kind::unfilled_encoder(source, name, device);
        let parts = Parts {
            text_encoders: kind.encoders(|name| options.encoder(|| encoder(name)))?,
            unet: options.denoiser(|| Ok(Unet::unfilled(UnetConfig::read(source)?, device)))?,
            vae: None,
        };
        Self::with_parts(kind, source, parts, options)
    }

    /// The configs with fresh weights; the autoencoder is loaded.
    fn random(
        kind: &'static Kind,
        source: &ModelSource,
        seed: u64,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(kind, source)?;
        let text_encoders = kind.encoders(|name| {
            Ok(Some(initialize(kind::unfilled_encoder(source, name, device)?, &mut generator, &[])))
        })?;
        let unet = Unet::unfilled(configs.unet, device);
        let parts = Parts {
            text_encoders,
            unet: Some(initialize(unet, &mut generator, unet::ZERO_AT_START)),
            vae: Some(AutoencoderKl::from_pretrained(source, device)?),
        };
        Self::with_parts(kind, source, parts, &LoadOptions::default())
    }

    fn with_parts(
        kind: &'static Kind,
        source: &ModelSource,
        parts: Parts,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        let scheduler = scheduler(kind, source)?;
        let table = scheduler.diffusion()?.table();
        let text = TextEncoders::read(kind, source, &parts.text_encoders, &options.conventions)?;
        let conventions =
            options.conventions.or_max_prompt_tokens(text.limit().unwrap_or(text::PUBLISHED_LIMIT));
        let sizes = sizes(source, &parts, kind)?;
        let [text_encoder, text_encoder_2] = parts.text_encoders;
        Ok(Self {
            kind,
            text_encoder,
            text_encoder_2,
            unet: parts.unet,
            vae: parts.vae,
            text,
            table,
            settings: Settings {
                scheduler,
                conventions,
                dtype: options.dtype,
                components: options.components,
                sizes,
            },
        })
    }

    fn encoders(&self) -> impl Iterator<Item = &crate::ClipTextEncoder> {
        self.text_encoder.iter().chain(&self.text_encoder_2)
    }

    fn vae(&self) -> &AutoencoderKl {
        self.vae.as_ref().expect("the autoencoder was loaded")
    }

    fn diffusion(&self) -> &DiffusionConfig {
        self.settings.scheduler.diffusion().expect("checked when it was loaded")
    }

    /// What SDXL is told of pictures that are drawn whole, at their size.
    fn added(&self, latents: [usize; 4], condition: &Condition) -> Option<AddedCondition> {
        let pooled = condition.pooled.clone()?;
        let [batch, _, height, width] = latents;
        let [height, width] = [height, width].map(|side| (side * self.settings.sizes.latent_factor) as f32);
        let sizes = [height, width, 0.0, 0.0, height, width];
        let sizes = TensorData::new(sizes.repeat(batch), [batch, config::SIZES]);
        Some(AddedCondition { sizes: Tensor::from_data(sizes, &pooled.device()), pooled })
    }
}

/// The schedule, with what diffusers' pipeline of Stable Diffusion 1 and 2 takes in the place of values that old files have.
fn scheduler(kind: &Kind, source: &ModelSource) -> Result<SchedulerConfig, ModelError> {
    let mut file = ConfigFile::shared(source, SCHEDULER_FILE, kind.scheduler)?;
    if !kind.xl && file.json.is_object() {
        file.json["steps_offset"] = 1.into();
        file.json["clip_sample"] = false.into();
    }
    Ok(SchedulerConfig::from_json(&file.text())?)
}

/// From the UNet where there is one, otherwise from the encoders. The UNet takes latents of any size.
fn sizes(source: &ModelSource, parts: &Parts, kind: &Kind) -> Result<Sizes, ModelError> {
    let (text_width, pooled_width) = match (&parts.unet, &parts.text_encoders) {
        (Some(unet), _) => (unet.config().cross_attention_dim, unet.config().pooled_width()),
        (None, [_, second]) => {
            (kind.text_width(source)?, second.as_ref().map(|encoder| encoder.config().pooled_width()))
        }
    };
    let (latent_channels, latent_factor) = match (AutoencoderKlConfig::read(source), &parts.unet) {
        (Ok(vae), _) => (vae.latent_channels, vae.factor()),
        // Given files of the denoiser alone.
        (Err(ModelError::NotBeside { .. }), Some(unet)) => (unet.config().in_channels, PUBLISHED_FACTOR),
        (Err(error), _) => return Err(error),
    };
    Ok(Sizes {
        latent_channels,
        latent_factor,
        division_factor: latent_factor,
        max_side_px: MAX_SIDE_PX,
        text_width,
        pooled_width,
    })
}

impl Family for StableDiffusion {
    fn kind(&self) -> &'static dyn family::Kind {
        self.kind
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    fn defaults(&self) -> Defaults {
        Defaults { num_inference_steps: 50, cfg_scale: self.kind.cfg_scale, embedded_guidance: None }
    }

    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        self.text.encode(self.encoders(), prompts, self.settings.dtype)
    }

    fn encode_negatives(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let encoded = self.encode_prompts(prompts)?;
        Ok(self.text.emptied(encoded, prompts, self.settings.conventions.peer))
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        self.text.length(prompt)
    }

    fn encode_images(&self, pixels: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.vae().encode(pixels)
    }

    fn decode_latents(&self, latents: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.vae().decode(latents)
    }

    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let unet = self.unet.as_ref().expect("the denoiser was loaded");
        let dtype = self.settings.dtype;
        let told = UnetCondition { text: condition.text.clone(), added: self.added(noisy.dims(), condition) };
        let shown = rounded(preserving(noisy.clone(), sigma.clone()), dtype);
        let timestep = rounded(self.table.timestep(sigma.clone()), dtype);
        let predicted = rounded(unet.forward(shown, timestep, told), dtype);
        self.diffusion().prediction_type.velocity(predicted, noisy, sigma)
    }

    fn start(&self, noise: Tensor<4>, sigma: f32) -> Tensor<4> {
        noise * self.diffusion().start_scale(sigma)
    }

    fn finish(&self, state: Tensor<4>, sigma: f32) -> Tensor<4> {
        state / self.diffusion().end_scale(sigma)
    }

    fn recomputes_blocks_mut(&mut self) -> Option<&mut bool> {
        self.unet.as_mut().map(Unet::recomputes_blocks_mut)
    }

    fn round_encoder_to(&mut self, component: &str, half: Option<HalfType>) {
        match component {
            "text_encoder" => self.text_encoder.iter_mut().for_each(|encoder| encoder.round_to(half)),
            "text_encoder_2" => self.text_encoder_2.iter_mut().for_each(|encoder| encoder.round_to(half)),
            _ => {}
        }
    }

    fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)> {
        self.unet.as_mut().map(Unet::linears).unwrap_or_default()
    }
}
