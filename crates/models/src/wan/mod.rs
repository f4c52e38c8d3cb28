//! Wan 2.1 (arXiv 2503.20314), from text to video: a transformer over the tokens of all frames that attends to the states
//! of UMT5, and a causal video autoencoder.
//!
//! The folder layout is diffusers'; weight files of the authors, with other names, are read too. Models that start from a
//! picture, and those of two transformers (2.2), are left out.
//!
//! Latents and pixels are stacked along the height (see [`crate::Extent`]). A token stands for a patch of one frame, so that
//! packing needs no number of frames; only the positions and the autoencoder do.

mod config;
mod footprint;
mod prompt;
mod published;
mod transformer;
mod trial;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::SigmaGrid;
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::schedule::{GridRequest, Schedule, SchedulerConfig, ShiftOverride, SigmaRounding};
use fewstep_kernels::HalfType;
use serde_json::Value;

pub use config::TransformerConfig;
pub use transformer::Transformer;

use self::config::Configs;
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER, Defaults, Family, Kind as _, Settings, Sizes};
use crate::footprint::{Evaluation, Workload};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::patches::{PATCH, pack, unpack_by_place};
use crate::parts::t5::{self, T5Encoder, T5Tokenizer};
use crate::parts::video_autoencoder::{self, VideoAutoencoder};
use crate::trial::Trial;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, expected, initialize, load};
use crate::{
    Components, Condition, Encoding, Linear, LoadOptions, Model, ModelError, ModelSource, PromptLength,
    WeightType,
};

const TEXT_ENCODER: &str = "text_encoder";
const DENOISER: &str = "transformer";
const TOKENIZER: &str = "tokenizer";

/// Tokens of the text states where no limit is given, as in both peers. Shorter prompts are continued with zeros, which are
/// attended to: with another limit, videos are others.
const TEXT_TOKENS: usize = 512;

/// Frames per latent frame after the first.
const FRAMES_PER_LATENT: usize = 4;

/// Pixels per latent pixel of the published autoencoder, along one side.
const PUBLISHED_FACTOR: usize = 8;

const ENCODER_NOT_LOADED: ModelError = ModelError::NotLoaded { component: TEXT_ENCODER };

/// The components of one model.
#[derive(Module, Debug)]
pub struct Wan {
    /// UMT5; absent where the denoiser alone was loaded.
    pub text_encoder: Option<T5Encoder>,
    /// The denoiser; absent where the encoders alone were loaded.
    pub transformer: Option<Transformer>,
    /// Pixels to latents and back; absent where the denoiser alone was loaded.
    pub vae: Option<VideoAutoencoder>,
    /// There with the text encoder.
    #[module(skip)]
    tokenizer: Option<T5Tokenizer>,
    #[module(skip)]
    settings: Settings,
}

/// The components with weights.
struct Parts {
    text_encoder: Option<T5Encoder>,
    transformer: Option<Transformer>,
    vae: Option<VideoAutoencoder>,
}

impl Wan {
    fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let parts = Parts {
            text_encoder: options.encoder(|| text_encoder(source, dtype, device))?,
            vae: options.encoder(|| Ok(store_weights(autoencoder(source, device)?, dtype)))?,
            transformer: options.denoiser(|| Transformer::from_pretrained(source, dtype, device))?,
        };
        Self::with_parts(source, parts, options)
    }

    fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?;
        }
        let device = &options.device;
        let parts = Parts {
            text_encoder: options
                .encoder(|| Ok(T5Encoder::unfilled(&config::text_encoder(source)?, device)))?,
            transformer: options
                .denoiser(|| Ok(Transformer::unfilled(&TransformerConfig::read(source)?, device)))?,
            vae: None,
        };
        Self::with_parts(source, parts, options)
    }

    fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(source)?;
        let text_encoder = T5Encoder::unfilled(&configs.text_encoder, device);
        let transformer = Transformer::unfilled(&configs.transformer, device);
        let parts = Parts {
            text_encoder: Some(initialize(text_encoder, &mut generator, &[])),
            transformer: Some(initialize(transformer, &mut generator, transformer::ZERO_AT_START)),
            vae: Some(autoencoder(source, device)?),
        };
        Self::with_parts(source, parts, &LoadOptions::default())
    }

    fn with_parts(source: &ModelSource, parts: Parts, options: &LoadOptions) -> Result<Self, ModelError> {
        config::check_index(source)?;
        let scheduler = ConfigFile::shared(source, SCHEDULER_FILE, published::SCHEDULER)?;
        let read = |encoder: &T5Encoder| -> Result<T5Tokenizer, ModelError> {
            let tokenizer = T5Tokenizer::read(source.tokenizer(TOKENIZER)?)?;
            tokenizer.check_ids(encoder.config().vocab_size)?;
            Ok(tokenizer)
        };
        Ok(Self {
            tokenizer: parts.text_encoder.as_ref().map(read).transpose()?,
            settings: Settings {
                scheduler: SchedulerConfig::from_json(&scheduler.text())?,
                conventions: options.conventions.or_max_prompt_tokens(TEXT_TOKENS),
                dtype: options.dtype,
                components: options.components,
                sizes: sizes(source, &parts)?,
            },
            text_encoder: parts.text_encoder,
            transformer: parts.transformer,
            vae: parts.vae,
        })
    }

    fn tokenizer(&self) -> Result<&T5Tokenizer, ModelError> {
        self.tokenizer.as_ref().ok_or(ENCODER_NOT_LOADED)
    }

    /// S.
    fn text_tokens(&self) -> usize {
        self.settings.conventions.max_prompt_tokens.expect("resolved when it was loaded")
    }

    fn autoencoder(&self) -> &VideoAutoencoder {
        self.vae.as_ref().expect("the autoencoder was loaded")
    }
}

fn text_encoder(source: &ModelSource, dtype: WeightType, device: &Device) -> Result<T5Encoder, ModelError> {
    let empty = T5Encoder::unfilled(&config::text_encoder(source)?, device);
    load(empty, &source.weights(TEXT_ENCODER)?, &t5::KEYS, dtype)
}

fn autoencoder(source: &ModelSource, device: &Device) -> Result<VideoAutoencoder, ModelError> {
    VideoAutoencoder::load(config::autoencoder(source)?, &source.weights(AUTOENCODER)?, device)
}

/// Pixels per latent pixel along one side. Where given files have no autoencoder, it is taken to be the published one.
fn latent_factor(source: &ModelSource) -> Result<usize, ModelError> {
    match config::autoencoder(source) {
        Ok(config) => Ok(config.factor()),
        Err(ModelError::NotBeside { .. }) => Ok(PUBLISHED_FACTOR),
        Err(error) => Err(error),
    }
}

/// Latent frames of so many frames.
fn latent_frames(frames: usize) -> Result<usize, ModelError> {
    Kind.latent_frames(frames)
}

/// From the transformer where there is one, otherwise from the encoders.
fn sizes(source: &ModelSource, parts: &Parts) -> Result<Sizes, ModelError> {
    let latent_factor = latent_factor(source)?;
    let (latent_channels, text_width) = match (&parts.transformer, &parts.text_encoder) {
        (Some(transformer), _) => (transformer.config().in_channels, transformer.config().text_dim),
        (None, Some(encoder)) => (config::autoencoder(source)?.z_dim, encoder.config().d_model),
        (None, None) => unreachable!("every choice of components has one of the two"),
    };
    Ok(Sizes {
        latent_channels,
        latent_factor,
        division_factor: latent_factor * PATCH,
        max_side_px: MAX_SIDE_PX,
        text_width,
        pooled_width: None,
    })
}

impl Family for Wan {
    fn kind(&self) -> &'static dyn family::Kind {
        &Kind
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    fn defaults(&self) -> Defaults {
        Defaults { num_inference_steps: 50, cfg_scale: 5.0, embedded_guidance: None }
    }

    /// States of the cleaned prompts, zeros past their lengths up to the limit.
    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let prompts: Vec<String> = prompts.iter().map(|prompt| prompt::cleaned(prompt)).collect();
        let tokens = self.tokenizer()?.encode(&prompts, self.text_tokens())?;
        let encoder = self.text_encoder.as_ref().ok_or(ENCODER_NOT_LOADED)?;
        let text = encoder.forward(&tokens.ids, Some(&tokens.lengths)) * tokens.inside(&encoder.device());
        Ok(Condition::new(rounded(text, self.settings.dtype), vec![self.text_tokens(); prompts.len()]))
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        let (found, limit) = (self.tokenizer()?.count(&prompt::cleaned(prompt))?, self.text_tokens());
        Ok(PromptLength { found, limit, dropped: 0, states: limit })
    }

    fn encode_images(&self, pixels: Tensor<4>, frames: usize) -> Tensor<4> {
        self.autoencoder().encode(pixels, frames)
    }

    fn decode_latents(&self, latents: Tensor<4>, frames: usize) -> Tensor<4> {
        self.autoencoder().decode(latents, frames)
    }

    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let transformer = self.transformer.as_ref().expect("the denoiser was loaded");
        let frames = condition.frames.expect("a condition of a video says its frames");
        let frames = latent_frames(frames).expect("checked with the size of the latents");
        assert!(height.is_multiple_of(frames * PATCH), "{height} rows of latents in {frames} frames");
        let timestep = rounded(sigma * 1000.0, self.settings.dtype);
        let grid = [frames, height / frames / PATCH, width / PATCH];
        let output = transformer.forward(pack(noisy), timestep, condition.text.clone(), grid);
        rounded(unpack_by_place(output, [channels, height, width]), self.settings.dtype)
    }

    /// DiffSynth-Studio has a schedule of its own, for drawing and for training. The published pipeline leaves an Euler
    /// scheduler to itself.
    fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        let diffsynth = request.rounding == SigmaRounding::Diffsynth
            || request.shift == Some(ShiftOverride::DiffsynthTraining);
        Ok(match (&self.settings.scheduler, diffsynth) {
            (_, true) => Schedule::DIFFSYNTH_WAN.grid(request)?,
            (SchedulerConfig::FlowMatching(config), false) => {
                config.training_range_schedule()?.grid(request)?
            }
            (scheduler, false) => scheduler.grid(request)?,
        })
    }

    fn round_encoder_to(&mut self, component: &str, half: Option<HalfType>) {
        let encoder = self.text_encoder.as_mut().filter(|_| component == TEXT_ENCODER);
        encoder.into_iter().for_each(|encoder| encoder.round_to(half));
    }

    fn recomputes_blocks_mut(&mut self) -> Option<&mut bool> {
        self.transformer.as_mut().map(Transformer::recomputes_blocks_mut)
    }

    fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)> {
        self.transformer.as_mut().map(Transformer::linears).unwrap_or_default()
    }
}

/// The family.
#[derive(Debug)]
pub(crate) struct Kind;

impl family::Kind for Kind {
    fn pipeline_class(&self) -> &'static str {
        "WanPipeline"
    }

    fn components(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, DENOISER, AUTOENCODER]
    }

    /// In diffusers' names, what DiffSynth-Studio's q, k, v, o, ffn.0 and ffn.2 are.
    fn lora_targets(&self) -> &'static [&'static str] {
        &["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    }

    fn diffsynth_key(&self, key: &str) -> Option<String> {
        Some(transformer::KEYS.respelled_back(key))
    }

    fn diffsynth_layer(&self, layer: &str) -> Option<String> {
        let key = layer.starts_with("blocks.").then(|| format!("{layer}."))?;
        Some(transformer::KEYS.respelled_back(&key).trim_end_matches('.').to_owned())
    }

    fn tables(&self) -> &'static [&'static str] {
        &["text_encoder.shared.weight"]
    }

    fn frames_per_latent(&self) -> Option<usize> {
        Some(FRAMES_PER_LATENT)
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            TEXT_ENCODER => Some(&t5::KEYS),
            DENOISER => Some(&transformer::KEYS),
            AUTOENCODER => Some(&video_autoencoder::KEYS),
            _ => None,
        }
    }

    fn component_of(&self, files: &WeightFiles) -> Option<&'static str> {
        published::component_of(files)
    }

    fn published_files(&self) -> &'static [(&'static str, &'static str)] {
        &[("model_index.json", published::MODEL_INDEX), (SCHEDULER_FILE, published::SCHEDULER)]
    }

    fn published_config(&self, component: &str, files: &WeightFiles) -> Option<Value> {
        published::config_of(component, files)
    }

    fn check_configs(&self, source: &ModelSource) -> Result<(), ModelError> {
        Configs::read(source).map(|_| ())
    }

    fn component_tensors(&self, source: &ModelSource, component: &str) -> Result<TensorShapes, ModelError> {
        // Nothing is allocated there.
        let device = Device::flex();
        Ok(match component {
            TEXT_ENCODER => {
                expected(&T5Encoder::unfilled(&config::text_encoder(source)?, &device), &t5::KEYS)
            }
            DENOISER => expected(
                &Transformer::unfilled(&TransformerConfig::read(source)?, &device),
                &transformer::KEYS,
            ),
            AUTOENCODER => video_autoencoder::tensors(&config::autoencoder(source)?, &device),
            _ => TensorShapes::new(),
        })
    }

    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
        footprint::evaluation(source, workload)
    }

    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError> {
        footprint::encoding(source)
    }

    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        Wan::from_pretrained(source, options).map(Model::Wan)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        Wan::outline(source, options).map(Model::Wan)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        Wan::random(source, seed, device).map(Model::Wan)
    }

    fn trial(&self) -> Option<Trial> {
        Some(trial::trial())
    }
}
