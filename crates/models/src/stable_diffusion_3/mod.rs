//! Stable Diffusion 3 and 3.5 (Stability AI, arXiv 2403.03206): a transformer of double-stream blocks over patches of
//! latents, conditioned on the states of two CLIPs and T5, and on the pooled states of the CLIPs.
//!
//! The folder layout is diffusers' (`text_encoder` is CLIP-L, `text_encoder_2` CLIP-G, `text_encoder_3` T5). T5 may be left
//! out, as `model_index.json` says. Image prompts, and guidance by skipped layers, are not here.

mod config;
mod footprint;
mod positions;
mod published;
mod text;
mod transformer;
mod trial;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::SigmaGrid;
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::schedule::{GridRequest, SchedulerConfig};
use fewstep_kernels::HalfType;

pub use config::TransformerConfig;
pub use transformer::Transformer;

use self::config::{Configs, TextConfigs};
use self::text::{Encoders, Tokenizers};
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER, Defaults, Family, Settings, Sizes};
use crate::footprint::{Evaluation, Workload};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::autoencoder_kl::{self, AutoencoderKl, AutoencoderKlConfig};
use crate::parts::clip::{self, ClipTextConfig, ClipTextEncoder};
use crate::parts::double_stream;
use crate::parts::patches::PATCH;
use crate::parts::t5::{self, T5Encoder};
use crate::trial::Trial;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, expected, initialize};
use crate::{
    Components, Condition, Encoding, Linear, LoadOptions, Model, ModelError, ModelSource, PromptLength,
};

const TEXT_ENCODER: &str = "text_encoder";
const TEXT_ENCODER_2: &str = "text_encoder_2";
const TEXT_ENCODER_3: &str = "text_encoder_3";
const DENOISER: &str = "transformer";
const TOKENIZERS: [&str; 3] = ["tokenizer", "tokenizer_2", "tokenizer_3"];

/// Tokens of T5's states where no limit is given, as in diffusers. Shorter prompts are padded to it, and the padding is
/// attended to: with another limit, pictures are others.
const TEXT_TOKENS: usize = 256;

/// The components of one model.
#[derive(Module, Debug)]
pub struct StableDiffusion3 {
    /// CLIP-L; absent where the denoiser alone was loaded.
    pub text_encoder: Option<ClipTextEncoder>,
    /// CLIP-G; there with CLIP-L.
    pub text_encoder_2: Option<ClipTextEncoder>,
    /// T5; there with the CLIPs, unless the model does without.
    pub text_encoder_3: Option<T5Encoder>,
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

/// The components with weights.
struct Parts {
    encoders: Option<Encoders>,
    transformer: Option<Transformer>,
    vae: Option<AutoencoderKl>,
}

impl StableDiffusion3 {
    fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let parts = Parts {
            encoders: options.encoder(|| Encoders::from_pretrained(source, options))?,
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
        let parts = Parts {
            encoders: options.encoder(|| Ok(Encoders::unfilled(&TextConfigs::read(source)?, device)))?,
            transformer: options
                .denoiser(|| Ok(Transformer::unfilled(&TransformerConfig::read(source)?, device)))?,
            vae: None,
        };
        Self::with_parts(source, parts, options)
    }

    fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(source)?;
        let encoders = Encoders::unfilled(&configs.text, device).filled(&mut generator);
        let transformer = Transformer::unfilled(&configs.transformer, device);
        let transformer = initialize(transformer, &mut generator, transformer::ZERO_AT_START);
        let parts = Parts {
            encoders: Some(encoders),
            transformer: Some(transformer.with_fresh_places()),
            vae: Some(AutoencoderKl::from_pretrained(source, device)?),
        };
        Self::with_parts(source, parts, &LoadOptions::default())
    }

    fn with_parts(source: &ModelSource, parts: Parts, options: &LoadOptions) -> Result<Self, ModelError> {
        let scheduler = ConfigFile::shared(source, SCHEDULER_FILE, published::SCHEDULER)?;
        let tokenizers = parts.encoders.as_ref().map(|encoders| Tokenizers::read(source, encoders));
        let tokenizers = tokenizers.transpose()?;
        let sizes = sizes(source, &parts)?;
        let (clips, text_encoder_3) = match parts.encoders {
            Some(Encoders { clips: [first, second], t5 }) => ([Some(first), Some(second)], t5),
            None => ([None, None], None),
        };
        let [text_encoder, text_encoder_2] = clips;
        Ok(Self {
            tokenizers,
            settings: Settings {
                scheduler: SchedulerConfig::from_json(&scheduler.text())?,
                conventions: options.conventions.or_max_prompt_tokens(TEXT_TOKENS),
                dtype: options.dtype,
                components: options.components,
                sizes,
            },
            text_encoder,
            text_encoder_2,
            text_encoder_3,
            transformer: parts.transformer,
            vae: parts.vae,
        })
    }

    /// Rows of T5's states, or of the zeros in their place.
    fn t5_tokens(&self) -> usize {
        self.settings.conventions.max_prompt_tokens.expect("resolved when it was loaded")
    }

    fn autoencoder(&self) -> &AutoencoderKl {
        self.vae.as_ref().expect("the autoencoder was loaded")
    }
}

/// From the transformer's config where there is one, otherwise from those of the encoders.
fn sizes(source: &ModelSource, parts: &Parts) -> Result<Sizes, ModelError> {
    let latent_factor = autoencoder_kl::latent_factor(source)?;
    let division_factor = latent_factor * PATCH;
    let config = match &parts.transformer {
        Some(transformer) => Ok(transformer.config().clone()),
        None => TransformerConfig::read(source),
    };
    let t5 = parts.encoders.as_ref().and_then(|encoders| encoders.t5.as_ref());
    match (config, t5) {
        (Ok(config), _) => Ok(Sizes {
            latent_channels: config.in_channels,
            latent_factor,
            division_factor,
            max_side_px: max_side_px(&config, division_factor),
            text_width: config.joint_attention_dim,
            pooled_width: Some(config.pooled_projection_dim),
        }),
        // Given files of the encoders alone.
        (Err(ModelError::NotBeside { .. }), Some(t5)) => Ok(Sizes {
            latent_channels: AutoencoderKlConfig::read(source)?.latent_channels,
            latent_factor,
            division_factor,
            max_side_px: MAX_SIDE_PX,
            text_width: t5.config().d_model,
            pooled_width: Some(TextConfigs::read(source)?.pooled_width()),
        }),
        (Err(error), _) => Err(error),
    }
}

/// The longest side of a picture whose tokens, squares of so many pixels, have places.
fn max_side_px(config: &TransformerConfig, factor: usize) -> usize {
    MAX_SIDE_PX.min(config.pos_embed_max_size * factor)
}

impl Family for StableDiffusion3 {
    fn kind(&self) -> &'static dyn family::Kind {
        &Kind
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Of the published pipeline.
    fn defaults(&self) -> Defaults {
        Defaults { num_inference_steps: 28, cfg_scale: 7.0, embedded_guidance: None }
    }

    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        self.encode(prompts)
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        let tokenizers = self.tokenizers.as_ref();
        let not_loaded = ModelError::NotLoaded { component: TEXT_ENCODER };
        tokenizers.ok_or(not_loaded)?.length(prompt, self.t5_tokens())
    }

    fn encode_images(&self, pixels: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().encode(pixels)
    }

    fn decode_latents(&self, latents: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().decode(latents)
    }

    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let transformer = self.transformer.as_ref().expect("the denoiser was loaded");
        let dtype = self.settings.dtype;
        let timestep = rounded(sigma * 1000.0, dtype);
        rounded(transformer.forward(noisy, timestep, condition), dtype)
    }

    /// The pipeline leaves its levels to the scheduler.
    fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        Ok(match &self.settings.scheduler {
            SchedulerConfig::FlowMatching(config) => config.training_range_schedule()?.grid(request)?,
            scheduler => scheduler.grid(request)?,
        })
    }

    fn recomputes_blocks_mut(&mut self) -> Option<&mut bool> {
        self.transformer.as_mut().map(Transformer::recomputes_blocks_mut)
    }

    fn round_encoder_to(&mut self, component: &str, half: Option<HalfType>) {
        self.round_encoder(component, half);
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
        "StableDiffusion3Pipeline"
    }

    fn components(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, DENOISER, AUTOENCODER]
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3]
    }

    fn tokenizers(&self) -> &'static [&'static str] {
        &TOKENIZERS
    }

    /// Those of diffusers' training scripts: the joint attention of both streams.
    fn lora_targets(&self) -> &'static [&'static str] {
        &[
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ]
    }

    fn tables(&self) -> &'static [&'static str] {
        &[
            "text_encoder.text_model.embeddings.token_embedding.weight",
            "text_encoder.text_model.embeddings.position_embedding.weight",
            "text_encoder_2.text_model.embeddings.token_embedding.weight",
            "text_encoder_2.text_model.embeddings.position_embedding.weight",
            "text_encoder_3.shared.weight",
        ]
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            TEXT_ENCODER | TEXT_ENCODER_2 => Some(&clip::KEYS),
            TEXT_ENCODER_3 => Some(&t5::KEYS),
            DENOISER => Some(&double_stream::KEYS),
            AUTOENCODER => Some(&autoencoder_kl::KEYS),
            _ => None,
        }
    }

    fn component_of(&self, files: &WeightFiles) -> Option<&'static str> {
        published::component_of(files)
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
        let clip = |name| -> Result<TensorShapes, ModelError> {
            let config = ClipTextConfig::read(source, name)?;
            Ok(expected(&ClipTextEncoder::unfilled(&config, &device), &clip::KEYS))
        };
        match component {
            TEXT_ENCODER => clip(TEXT_ENCODER),
            TEXT_ENCODER_2 => clip(TEXT_ENCODER_2),
            TEXT_ENCODER_3 => {
                let t5 = TextConfigs::read(source)?.t5;
                let tensors = |config| expected(&T5Encoder::unfilled(config, &device), &t5::KEYS);
                Ok(t5.as_ref().map(tensors).unwrap_or_default())
            }
            DENOISER => {
                let transformer = Transformer::unfilled(&TransformerConfig::read(source)?, &device);
                Ok(expected(&transformer, &double_stream::KEYS))
            }
            AUTOENCODER => AutoencoderKl::expected(source),
            _ => Ok(TensorShapes::new()),
        }
    }

    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
        footprint::evaluation(source, workload)
    }

    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError> {
        footprint::encoding(source)
    }

    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        StableDiffusion3::from_pretrained(source, options).map(Model::StableDiffusion3)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        StableDiffusion3::outline(source, options).map(Model::StableDiffusion3)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        StableDiffusion3::random(source, seed, device).map(Model::StableDiffusion3)
    }
}
