//! Qwen-Image (arXiv 2508.02324): a double-stream transformer over packed latents, conditioned on the
//! hidden states of a Qwen2.5-VL language model.
//!
//! Conventions that REFERENCE-grade numbers depend on are stated where they are computed; the folder
//! layout is the published one (`model_index.json`, `transformer/`, `text_encoder/`, `tokenizer/`,
//! `vae/`, `scheduler/`).

mod config;
mod footprint;
mod published;
mod rotary;
mod text_encoder;
mod tokenizer;
mod transformer;
mod trial;
mod vae;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::guidance::{guided, rescaled};
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::path::velocity_of_clean;
use fewstep_flow::schedule::SchedulerConfig;
use fewstep_kernels::HalfType;
use serde_json::Value;

pub use config::{PredictionType, PromptTemplate, Rope, TextEncoderConfig, TransformerConfig};
pub(crate) use text_encoder::KEYS as TEXT_KEYS;
pub use text_encoder::TextEncoder;
pub use tokenizer::{PromptTokenizer, PromptTokens};
pub use transformer::Transformer;
pub use vae::{PixelUnshuffle, PixelUnshuffleConfig, Vae, VaeConfig};

use self::config::Configs;
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER, Defaults, Family, Settings, Sizes};
use crate::footprint::{Evaluation, Workload};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::{patches, video_autoencoder};
use crate::trial::Trial;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, WeightType, expected, initialize};
use crate::{
    Components, Condition, Conventions, Encoding, GuidanceRule, Linear, LoadOptions, Model, ModelError,
    ModelSource, Peer, PromptLength,
};

const TEXT_ENCODER: &str = "text_encoder";
const DENOISER: &str = "transformer";

/// Layers that the peers' recipes give adapters: the attention's projections, the modulations, and the second
/// projection of each MLP.
const LORA_TARGETS: &[&str] = &[
    "to_q",
    "to_k",
    "to_v",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_out.0",
    "to_add_out",
    "img_mlp.net.2",
    "img_mod.1",
    "txt_mlp.net.2",
    "txt_mod.1",
];

const ENCODER_NOT_LOADED: ModelError = ModelError::NotLoaded { component: TEXT_ENCODER };

/// The components of one Qwen-Image model.
#[derive(Module, Debug)]
pub struct QwenImage {
    /// The language model whose hidden states condition the transformer; absent where the denoiser alone was loaded.
    pub text_encoder: Option<TextEncoder>,
    /// The denoiser; absent where the encoders alone were loaded.
    pub transformer: Option<Transformer>,
    /// Pixels to latents and back.
    pub vae: Vae,
    /// There with the text encoder.
    #[module(skip)]
    tokenizer: Option<PromptTokenizer>,
    #[module(skip)]
    settings: Settings,
}

/// The components with weights.
struct Parts {
    text_encoder: Option<TextEncoder>,
    transformer: Option<Transformer>,
    vae: Vae,
}

impl QwenImage {
    /// Loads the components that the options name.
    ///
    /// # Errors
    /// If a file is missing or damaged, or weights and configs do not fit.
    fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let vae = || Ok(store_weights(Vae::from_pretrained(source, device)?, dtype));
        let parts = Parts {
            text_encoder: options.encoder(|| TextEncoder::from_pretrained_in(source, dtype, device))?,
            transformer: options.denoiser(|| Transformer::from_pretrained_in(source, dtype, device))?,
            vae: match options.encoder(vae)? {
                Some(vae) => vae,
                None => Vae::absent(source, TransformerConfig::read(source)?.out_channels)?,
            },
        };
        Self::with_parts(source, parts, options)
    }

    /// The components that the options name, with sizes and names but without weights.
    fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?;
        }
        let device = &options.device;
        let text_encoder =
            options.encoder(|| Ok(TextEncoder::unfilled(&TextEncoderConfig::read(source)?, device)))?;
        let transformer = options.denoiser(|| TransformerConfig::read(source))?;
        let channels = match &transformer {
            Some(config) => config.out_channels,
            None => VaeConfig::read(source)?.channels(),
        };
        let transformer = transformer.map(|config| Transformer::unfilled(&config, device));
        let parts = Parts { text_encoder, transformer, vae: Vae::absent(source, channels)? };
        Self::with_parts(source, parts, options)
    }

    /// Builds the model's configs with fresh weights; the same seed gives the same weights. The VAE is loaded.
    ///
    /// # Errors
    /// If a config, the tokenizer or the VAE is missing or damaged.
    fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(source)?;
        let text_encoder = TextEncoder::unfilled(&configs.text_encoder, device);
        let transformer = Transformer::unfilled(&configs.transformer, device);
        let parts = Parts {
            text_encoder: Some(initialize(text_encoder, &mut generator, &[])),
            transformer: Some(initialize(transformer, &mut generator, transformer::ZERO_AT_START)),
            vae: Vae::from_pretrained(source, device)?,
        };
        Self::with_parts(source, parts, &LoadOptions::default())
    }

    fn with_parts(source: &ModelSource, parts: Parts, options: &LoadOptions) -> Result<Self, ModelError> {
        let conventions = resolved(options.conventions);
        let scheduler = ConfigFile::shared(source, SCHEDULER_FILE, published::SCHEDULER)?;
        let limit = conventions.max_prompt_tokens.expect("resolved above");
        let read = |encoder: &TextEncoder| -> Result<PromptTokenizer, ModelError> {
            let tokenizer = PromptTokenizer::read(source, limit)?;
            tokenizer.check_ids(encoder.vocabulary())?;
            Ok(tokenizer)
        };
        let tokenizer = parts.text_encoder.as_ref().map(read).transpose()?;
        let sizes = sizes(&parts);
        Ok(Self {
            text_encoder: parts.text_encoder,
            transformer: parts.transformer.map(|transformer| transformer.with_gelu(conventions.gelu)),
            vae: parts.vae,
            tokenizer,
            settings: Settings {
                scheduler: SchedulerConfig::from_json(&scheduler.text())?,
                conventions,
                dtype: options.dtype,
                components: options.components,
                sizes,
            },
        })
    }

    fn tokenizer(&self) -> Result<&PromptTokenizer, ModelError> {
        self.tokenizer.as_ref().ok_or(ENCODER_NOT_LOADED)
    }

    /// The transformer.
    ///
    /// # Panics
    /// If it was not loaded.
    fn denoiser(&self) -> &Transformer {
        self.transformer.as_ref().expect("the denoiser was loaded")
    }

    /// What the transformer is told of a sigma: the peers round the timestep, 1000·sigma, and then its thousandth
    /// (in bf16 777.6 becomes 776), while the solver's sigmas stay f32.
    fn time(&self, sigma: Tensor<1>) -> Tensor<1> {
        match self.settings.dtype {
            WeightType::F32 => sigma,
            dtype => rounded(rounded(sigma * 1000.0, dtype) / 1000.0, dtype),
        }
    }
}

/// Conventions with the limit of a prompt, as each peer has it.
fn resolved(conventions: Conventions) -> Conventions {
    conventions.or_max_prompt_tokens(match conventions.peer {
        None => 1024,
        Some(Peer::Diffsynth) => 4096,
        Some(Peer::Diffusers) => 512,
    })
}

/// Of the text states from the transformer where there is one, otherwise from the encoder.
fn sizes(parts: &Parts) -> Sizes {
    let text_width = match (&parts.transformer, &parts.text_encoder) {
        (Some(transformer), _) => transformer.text_width(),
        (None, Some(encoder)) => encoder.width(),
        (None, None) => unreachable!("every choice of components has one of the two"),
    };
    let latent_factor = parts.vae.factor();
    Sizes {
        latent_channels: parts.vae.channels(),
        latent_factor,
        division_factor: latent_factor * patches::PATCH,
        max_side_px: MAX_SIDE_PX,
        text_width,
        pooled_width: None,
    }
}

impl Family for QwenImage {
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
        Defaults { num_inference_steps: 50, cfg_scale: 4.0, embedded_guidance: None }
    }

    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let tokens = self.tokenizer()?.encode(prompts)?;
        let encoder = self.text_encoder.as_ref().ok_or(ENCODER_NOT_LOADED)?;
        let condition = encoder.forward(&tokens);
        Ok(Condition { text: rounded(condition.text, self.settings.dtype), ..condition })
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        self.tokenizer()?.length(prompt)
    }

    fn encode_images(&self, pixels: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.vae.encode(pixels)
    }

    fn decode_latents(&self, latents: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.vae.decode(latents)
    }

    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let packed = patches::pack(noisy.clone());
        let time = self.time(sigma.clone());
        let output = self.denoiser().forward(packed, time, condition, [height / 2, width / 2]);
        let output = patches::unpack(output, [channels, height, width]);
        let velocity = match self.denoiser().prediction_type() {
            PredictionType::Velocity => output,
            PredictionType::Clean => velocity_of_clean(noisy, output, sigma),
        };
        rounded(velocity, self.settings.dtype)
    }

    /// Norms are taken over a token, as diffusers takes them.
    fn guide(&self, conditional: Tensor<4>, unconditional: Tensor<4>, cfg_scale: f32) -> Tensor<4> {
        let combined = guided(conditional.clone(), unconditional, cfg_scale);
        if self.settings.conventions.guidance == GuidanceRule::Plain {
            return rounded(combined, self.settings.dtype);
        }
        let [_, channels, height, width] = conditional.dims();
        let rescaled = rescaled(patches::pack(combined), patches::pack(conditional));
        rounded(patches::unpack(rescaled, [channels, height, width]), self.settings.dtype)
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
        "QwenImagePipeline"
    }

    fn components(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, DENOISER, AUTOENCODER]
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        LORA_TARGETS
    }

    fn tables(&self) -> &'static [&'static str] {
        &["text_encoder.embed_tokens.weight"]
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            DENOISER => Some(&transformer::KEYS),
            TEXT_ENCODER => Some(&text_encoder::KEYS),
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
            TEXT_ENCODER => expected(
                &TextEncoder::unfilled(&TextEncoderConfig::read(source)?, &device),
                &text_encoder::KEYS,
            ),
            DENOISER => expected(
                &Transformer::unfilled(&TransformerConfig::read(source)?, &device),
                &transformer::KEYS,
            ),
            AUTOENCODER => Vae::expected(&VaeConfig::read(source)?, &device),
            _ => TensorShapes::new(),
        })
    }

    fn held(&self, key: &str, shape: &[usize]) -> u64 {
        footprint::held(key, shape)
    }

    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
        footprint::evaluation(source, workload)
    }

    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError> {
        footprint::encoding(source)
    }

    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        QwenImage::from_pretrained(source, options).map(Model::QwenImage)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        QwenImage::outline(source, options).map(Model::QwenImage)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        QwenImage::random(source, seed, device).map(Model::QwenImage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_cuts_prompts_elsewhere_and_a_given_limit_wins() {
        let limit = |peer| resolved(Conventions::of(peer)).max_prompt_tokens;
        let limits = [None, Some(Peer::Diffsynth), Some(Peer::Diffusers)].map(limit);
        assert_eq!(limits, [Some(1024), Some(4096), Some(512)]);
        let given = Conventions { max_prompt_tokens: Some(7), ..Conventions::default() };
        assert_eq!(resolved(given).max_prompt_tokens, Some(7));
    }
}
