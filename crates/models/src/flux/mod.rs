//! FLUX.1 (Black Forest Labs): a transformer of double- and single-stream blocks over packed latents, conditioned on the
//! states of a T5 encoder and the pooled state of CLIP. Some of its models were distilled to follow a guidance scale that
//! they are told, and others to draw in few steps.
//!
//! The folder layout is diffusers' (`text_encoder` is CLIP, `text_encoder_2` T5). Transformer and autoencoder are read in
//! their authors' layout as well.

mod config;
mod footprint;
mod original;
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
pub use transformer::{Told, Transformer};

use self::config::Configs;
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER, Defaults, Family, Settings, Sizes};
use crate::footprint::{Evaluation, Workload};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::autoencoder_kl::{self, AutoencoderKl, AutoencoderKlConfig};
use crate::parts::clip::{self, ClipTextConfig, ClipTextEncoder, ClipTokenizer};
use crate::parts::double_stream;
use crate::parts::patches;
use crate::parts::t5::{self, T5Config, T5Encoder, T5Tokenizer};
use crate::trial::Trial;
use crate::weights::{KeyMap, Rule, TensorShapes, WeightFiles, expected, initialize};
use crate::{
    Components, Condition, Encoding, Linear, LoadOptions, Model, ModelError, ModelSource, PromptLength,
};

const TEXT_ENCODER: &str = "text_encoder";
const TEXT_ENCODER_2: &str = "text_encoder_2";
const DENOISER: &str = "transformer";
const TOKENIZERS: [&str; 2] = ["tokenizer", "tokenizer_2"];

/// Tokens of T5's states where no limit is given, as in both peers. Shorter prompts are padded to it, and the padding is
/// attended to: with another limit, pictures are others.
const TEXT_TOKENS: usize = 512;

/// The guidance scale that the model is told where nobody says otherwise, as in both peers.
const EMBEDDED_GUIDANCE: f32 = 3.5;

/// The components of one model.
#[derive(Module, Debug)]
pub struct Flux {
    /// CLIP, whose pooled state modulates the transformer; absent where the denoiser alone was loaded.
    pub text_encoder: Option<ClipTextEncoder>,
    /// T5, whose states the transformer attends to; there with CLIP.
    pub text_encoder_2: Option<T5Encoder>,
    /// The denoiser; absent where the encoders alone were loaded.
    pub transformer: Option<Transformer>,
    /// Pixels to latents and back; absent where the denoiser alone was loaded.
    pub vae: Option<AutoencoderKl>,
    /// There with the text encoders.
    #[module(skip)]
    tokenizers: Option<Tokenizers>,
    #[module(skip)]
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Tokenizers {
    clip: ClipTokenizer,
    t5: T5Tokenizer,
}

/// The components with weights.
struct Parts {
    text_encoder: Option<ClipTextEncoder>,
    text_encoder_2: Option<T5Encoder>,
    transformer: Option<Transformer>,
    vae: Option<AutoencoderKl>,
}

impl Flux {
    fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let clip = || ClipTextEncoder::from_pretrained(source, TEXT_ENCODER, dtype, device);
        let t5 = || T5Encoder::from_pretrained(source, TEXT_ENCODER_2, dtype, device);
        let parts = Parts {
            text_encoder: options.encoder(clip)?,
            text_encoder_2: options.encoder(t5)?,
            vae: options
                .encoder(|| Ok(store_weights(AutoencoderKl::from_pretrained(source, device)?, dtype)))?,
            transformer: options.denoiser(|| Transformer::from_pretrained(source, dtype, device))?,
        };
        Self::with_parts(source, parts, options)
    }

    fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?;
        }
        let device = &options.device;
        let clip = || Ok(ClipTextEncoder::unfilled(&ClipTextConfig::read(source, TEXT_ENCODER)?, device));
        let t5 = || Ok(T5Encoder::unfilled(&T5Config::read(source, TEXT_ENCODER_2)?, device));
        let parts = Parts {
            text_encoder: options.encoder(clip)?,
            text_encoder_2: options.encoder(t5)?,
            transformer: options
                .denoiser(|| Ok(Transformer::unfilled(&TransformerConfig::read(source)?, device)))?,
            vae: None,
        };
        Self::with_parts(source, parts, options)
    }

    fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(source)?;
        let clip = ClipTextEncoder::unfilled(&configs.text_encoder, device);
        let t5 = T5Encoder::unfilled(&configs.text_encoder_2, device);
        let transformer = Transformer::unfilled(&configs.transformer, device);
        let parts = Parts {
            text_encoder: Some(initialize(clip, &mut generator, &[])),
            text_encoder_2: Some(initialize(t5, &mut generator, &[])),
            transformer: Some(initialize(transformer, &mut generator, transformer::ZERO_AT_START)),
            vae: Some(AutoencoderKl::from_pretrained(source, device)?),
        };
        Self::with_parts(source, parts, &LoadOptions::default())
    }

    fn with_parts(source: &ModelSource, parts: Parts, options: &LoadOptions) -> Result<Self, ModelError> {
        let scheduler = ConfigFile::shared(source, SCHEDULER_FILE, published::SCHEDULER)?;
        let tokenizers = match (&parts.text_encoder, &parts.text_encoder_2) {
            (Some(clip), Some(t5)) => Some(Tokenizers::read(source, clip, t5)?),
            _ => None,
        };
        Ok(Self {
            tokenizers,
            settings: Settings {
                scheduler: SchedulerConfig::from_json(&scheduler.text())?,
                conventions: options.conventions.or_max_prompt_tokens(TEXT_TOKENS),
                dtype: options.dtype,
                components: options.components,
                sizes: sizes(source, &parts)?,
            },
            text_encoder: parts.text_encoder,
            text_encoder_2: parts.text_encoder_2,
            transformer: parts.transformer,
            vae: parts.vae,
        })
    }

    fn tokenizers(&self) -> Result<&Tokenizers, ModelError> {
        self.tokenizers.as_ref().ok_or(ModelError::NotLoaded { component: TEXT_ENCODER })
    }

    /// S.
    fn text_tokens(&self) -> usize {
        self.settings.conventions.max_prompt_tokens.expect("resolved when it was loaded")
    }

    /// What the transformer is told of a sigma: the peers hand on the timestep, 1000·sigma, in the model's type, and then
    /// its thousandth.
    fn time(&self, sigma: Tensor<1>) -> Tensor<1> {
        let dtype = self.settings.dtype;
        rounded(rounded(sigma * 1000.0, dtype) / 1000.0, dtype)
    }

    fn autoencoder(&self) -> &AutoencoderKl {
        self.vae.as_ref().expect("the autoencoder was loaded")
    }
}

impl Tokenizers {
    fn read(source: &ModelSource, clip: &ClipTextEncoder, t5: &T5Encoder) -> Result<Self, ModelError> {
        let tokenizers = Self {
            clip: ClipTokenizer::read(source.tokenizer(TOKENIZERS[0])?)?,
            t5: T5Tokenizer::read(source.tokenizer(TOKENIZERS[1])?)?,
        };
        let config = clip.config();
        tokenizers.clip.check_fits(config.vocab_size, config.max_position_embeddings)?;
        tokenizers.t5.check_ids(t5.config().vocab_size)?;
        Ok(tokenizers)
    }
}

/// From the transformer where there is one, otherwise from the encoders and the autoencoder.
fn sizes(source: &ModelSource, parts: &Parts) -> Result<Sizes, ModelError> {
    let latent_factor = autoencoder_kl::latent_factor(source)?;
    let (latent_channels, text_width, pooled_width) = match parts {
        Parts { transformer: Some(transformer), .. } => {
            let config = transformer.config();
            (config.latent_channels(), config.joint_attention_dim, config.pooled_projection_dim)
        }
        Parts { text_encoder: Some(clip), text_encoder_2: Some(t5), .. } => {
            let latent_channels = AutoencoderKlConfig::read(source)?.latent_channels;
            (latent_channels, t5.config().d_model, clip.config().pooled_width())
        }
        _ => unreachable!("every choice of components has the denoiser or the encoders"),
    };
    Ok(Sizes {
        latent_channels,
        latent_factor,
        division_factor: latent_factor * patches::PATCH,
        max_side_px: MAX_SIDE_PX,
        text_width,
        pooled_width: Some(pooled_width),
    })
}

impl Family for Flux {
    fn kind(&self) -> &'static dyn family::Kind {
        &Kind
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// As the published pipelines: 28 steps of the models that are told a guidance scale, 4 of those made for few.
    fn defaults(&self) -> Defaults {
        let is_told = |transformer: &Transformer| transformer.config().guidance_embeds;
        let embedded_guidance = self.transformer.as_ref().is_some_and(is_told).then_some(EMBEDDED_GUIDANCE);
        let num_inference_steps = if embedded_guidance.is_some() { 28 } else { 4 };
        Defaults { num_inference_steps, cfg_scale: 1.0, embedded_guidance }
    }

    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let (tokenizers, tokens) = (self.tokenizers()?, self.text_tokens());
        let (Some(clip), Some(t5)) = (&self.text_encoder, &self.text_encoder_2) else {
            return Err(ModelError::NotLoaded { component: TEXT_ENCODER });
        };
        let pooled = clip.forward(&tokenizers.clip.encode(prompts)?).pooled;
        let text = t5.forward(&tokenizers.t5.encode(prompts, tokens)?.ids, None);
        let dtype = self.settings.dtype;
        let condition = Condition::new(rounded(text, dtype), vec![tokens; prompts.len()]);
        Ok(condition.with_pooled(rounded(pooled, dtype)))
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        let limit = self.text_tokens();
        Ok(PromptLength { found: self.tokenizers()?.t5.count(prompt)?, limit, dropped: 0, states: limit })
    }

    fn encode_images(&self, pixels: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().encode(pixels)
    }

    fn decode_latents(&self, latents: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().decode(latents)
    }

    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let transformer = self.transformer.as_ref().expect("the denoiser was loaded");
        let guidance = condition.embedded_guidance.unwrap_or(EMBEDDED_GUIDANCE);
        let told = Told { time: self.time(sigma), guidance };
        let grid = [height / patches::PATCH, width / patches::PATCH];
        let output = transformer.forward(patches::pack(noisy), told, condition, grid);
        rounded(patches::unpack(output, [channels, height, width]), self.settings.dtype)
    }

    /// DiffSynth-Studio has a schedule of its own, for drawing and for training.
    fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        let diffsynth = request.rounding == SigmaRounding::Diffsynth
            || request.shift == Some(ShiftOverride::DiffsynthTraining);
        Ok(match diffsynth {
            true => Schedule::DIFFSYNTH_FLUX_1.grid(request)?,
            false => self.settings.scheduler.grid(request)?,
        })
    }

    fn round_encoder_to(&mut self, component: &str, half: Option<HalfType>) {
        match component {
            TEXT_ENCODER => self.text_encoder.iter_mut().for_each(|encoder| encoder.round_to(half)),
            TEXT_ENCODER_2 => self.text_encoder_2.iter_mut().for_each(|encoder| encoder.round_to(half)),
            _ => {}
        }
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
        "FluxPipeline"
    }

    fn components(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, TEXT_ENCODER_2, DENOISER, AUTOENCODER]
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, TEXT_ENCODER_2]
    }

    fn tokenizers(&self) -> &'static [&'static str] {
        &TOKENIZERS
    }

    /// In diffusers' names, what DiffSynth-Studio's own names mean.
    fn lora_targets(&self) -> &'static [&'static str] {
        &["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    }

    fn tables(&self) -> &'static [&'static str] {
        &[
            "text_encoder.text_model.embeddings.token_embedding.weight",
            "text_encoder.text_model.embeddings.position_embedding.weight",
            "text_encoder_2.shared.weight",
        ]
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            TEXT_ENCODER => Some(&clip::KEYS),
            TEXT_ENCODER_2 => Some(&t5::KEYS),
            DENOISER => Some(&double_stream::KEYS),
            AUTOENCODER => Some(&autoencoder_kl::KEYS),
            _ => None,
        }
    }

    fn component_of(&self, files: &WeightFiles) -> Option<&'static str> {
        published::component_of(files)
    }

    fn original_layout(&self, files: &WeightFiles) -> Option<&'static [Rule]> {
        match original::is_original(files) {
            true => Some(original::LAYOUT),
            false => autoencoder_kl::original_layout(files),
        }
    }

    fn published_config(&self, component: &str, files: &WeightFiles) -> Option<Value> {
        published::config_of(component, files)
    }

    fn published_files(&self) -> &'static [(&'static str, &'static str)] {
        &[("model_index.json", published::MODEL_INDEX), (SCHEDULER_FILE, published::SCHEDULER)]
    }

    fn trial(&self) -> Option<Trial> {
        Some(trial::trial())
    }

    fn check_configs(&self, source: &ModelSource) -> Result<(), ModelError> {
        Configs::read(source).map(|_| ())
    }

    fn component_tensors(&self, source: &ModelSource, component: &str) -> Result<TensorShapes, ModelError> {
        // Nothing is allocated there.
        let device = Device::flex();
        Ok(match component {
            TEXT_ENCODER => {
                let config = ClipTextConfig::read(source, TEXT_ENCODER)?;
                expected(&ClipTextEncoder::unfilled(&config, &device), &clip::KEYS)
            }
            TEXT_ENCODER_2 => {
                let config = T5Config::read(source, TEXT_ENCODER_2)?;
                expected(&T5Encoder::unfilled(&config, &device), &t5::KEYS)
            }
            DENOISER => expected(
                &Transformer::unfilled(&TransformerConfig::read(source)?, &device),
                &double_stream::KEYS,
            ),
            AUTOENCODER => AutoencoderKl::expected(source)?,
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
        Flux::from_pretrained(source, options).map(Model::Flux)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        Flux::outline(source, options).map(Model::Flux)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        Flux::random(source, seed, device).map(Model::Flux)
    }
}
