//! Z-Image (Tongyi Lab): a single-stream transformer over packed latents, conditioned on the states of a Qwen3 language
//! model before its last layer.
//!
//! Its time runs the other way: it is told 1 − σ and predicts clean − noise.

mod config;
mod footprint;
mod transformer;
mod trial;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::schedule::SchedulerConfig;
use fewstep_kernels::HalfType;

pub use config::TransformerConfig;
pub use transformer::Transformer;

use self::config::Configs;
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER, Defaults, Family, Settings, Sizes};
use crate::footprint::{Evaluation, Workload};
use crate::load_options::{rounded, store_weights};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::autoencoder_kl::{self, AutoencoderKl, AutoencoderKlConfig};
use crate::parts::patches::{PATCH, pack_by_place, unpack_by_place};
use crate::qwen_image::{PromptTemplate, PromptTokenizer, TEXT_KEYS, TextEncoder, TextEncoderConfig};
use crate::trial::Trial;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, expected, initialize, load};
use crate::{
    Components, Condition, Encoding, Linear, LoadOptions, Model, ModelError, ModelSource, PromptLength,
};

const TEXT_ENCODER: &str = "text_encoder";
const DENOISER: &str = "transformer";

/// Tokens of a prompt in its template where no limit is given, as in the peers.
const TEXT_TOKENS: usize = 512;

/// The published scheduler.
const SCHEDULER: &str = r#"{
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "num_train_timesteps": 1000,
  "shift": 3.0,
  "use_dynamic_shifting": false
}
"#;

/// The published list of components.
const MODEL_INDEX: &str = r#"{
  "_class_name": "ZImagePipeline",
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  "text_encoder": ["transformers", "Qwen3Model"],
  "tokenizer": ["transformers", "Qwen2Tokenizer"],
  "transformer": ["diffusers", "ZImageTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderKL"]
}
"#;

const ENCODER_NOT_LOADED: ModelError = ModelError::NotLoaded { component: TEXT_ENCODER };

/// The components of one model.
#[derive(Module, Debug)]
pub struct ZImage {
    /// The language model; absent where the denoiser alone was loaded.
    pub text_encoder: Option<TextEncoder>,
    /// The denoiser; absent where the encoders alone were loaded.
    pub transformer: Option<Transformer>,
    /// Pixels to latents and back; absent where the denoiser alone was loaded.
    pub vae: Option<AutoencoderKl>,
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
    vae: Option<AutoencoderKl>,
}

impl ZImage {
    fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let text_encoder = || {
            let empty = TextEncoder::unfilled(&config::text_encoder(source)?, device);
            load(empty, &source.weights(TEXT_ENCODER)?, &TEXT_KEYS, dtype)
        };
        let parts = Parts {
            text_encoder: options.encoder(text_encoder)?,
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
            text_encoder: options
                .encoder(|| Ok(TextEncoder::unfilled(&config::text_encoder(source)?, device)))?,
            transformer: options
                .denoiser(|| Ok(Transformer::unfilled(&TransformerConfig::read(source)?, device)))?,
            vae: None,
        };
        Self::with_parts(source, parts, options)
    }

    fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let configs = Configs::read(source)?;
        let text_encoder = TextEncoder::unfilled(&configs.text_encoder, device);
        let transformer = Transformer::unfilled(&configs.transformer, device);
        let parts = Parts {
            text_encoder: Some(initialize(text_encoder, &mut generator, &[])),
            transformer: Some(initialize(transformer, &mut generator, transformer::ZERO_AT_START)),
            vae: Some(AutoencoderKl::from_pretrained(source, device)?),
        };
        Self::with_parts(source, parts, &LoadOptions::default())
    }

    fn with_parts(source: &ModelSource, parts: Parts, options: &LoadOptions) -> Result<Self, ModelError> {
        let conventions = options.conventions.or_max_prompt_tokens(TEXT_TOKENS);
        let scheduler = ConfigFile::shared(source, SCHEDULER_FILE, SCHEDULER)?;
        let read = |encoder: &TextEncoder| -> Result<PromptTokenizer, ModelError> {
            let limit = conventions.max_prompt_tokens.expect("resolved above");
            let tokenizer = PromptTokenizer::with_template(source, template(), limit)?;
            tokenizer.check_ids(encoder.vocabulary())?;
            Ok(tokenizer)
        };
        Ok(Self {
            tokenizer: parts.text_encoder.as_ref().map(read).transpose()?,
            settings: Settings {
                scheduler: SchedulerConfig::from_json(&scheduler.text())?,
                conventions,
                dtype: options.dtype,
                components: options.components,
                sizes: sizes(source, &parts)?,
            },
            text_encoder: parts.text_encoder,
            transformer: parts.transformer,
            vae: parts.vae,
        })
    }

    fn tokenizer(&self) -> Result<&PromptTokenizer, ModelError> {
        self.tokenizer.as_ref().ok_or(ENCODER_NOT_LOADED)
    }

    fn autoencoder(&self) -> &AutoencoderKl {
        self.vae.as_ref().expect("the autoencoder was loaded")
    }

    /// What the transformer is told of a sigma: the peers hand on 1000 − 1000·sigma in the model's type, and then its
    /// thousandth.
    fn time(&self, sigma: Tensor<1>) -> Tensor<1> {
        let dtype = self.settings.dtype;
        let timestep = rounded(sigma * 1000.0, dtype);
        rounded(rounded(timestep.neg() + 1000.0, dtype) / 1000.0, dtype)
    }

    /// The velocity of samples whose texts are continued to the same number of tokens.
    fn velocity_of_alike(&self, noisy: Tensor<4>, time: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let transformer = self.transformer.as_ref().expect("the denoiser was loaded");
        let grid = [height / PATCH, width / PATCH];
        let output = transformer.forward(pack_by_place(noisy), time, condition, grid);
        unpack_by_place(output.neg(), [channels, height, width])
    }
}

/// The chat template of the language model with one message of the user, and room for it to think.
fn template() -> PromptTemplate {
    PromptTemplate {
        text: "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".into(),
        drop_tokens: 0,
        max_tokens: None,
    }
}

/// From the transformer where there is one, otherwise from the encoders.
fn sizes(source: &ModelSource, parts: &Parts) -> Result<Sizes, ModelError> {
    let latent_factor = autoencoder_kl::latent_factor(source)?;
    let (latent_channels, text_width) = match (&parts.transformer, &parts.text_encoder) {
        (Some(transformer), _) => (transformer.config().in_channels, transformer.config().cap_feat_dim),
        (None, Some(encoder)) => (AutoencoderKlConfig::read(source)?.latent_channels, encoder.width()),
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

impl Family for ZImage {
    fn kind(&self) -> &'static dyn family::Kind {
        &Kind
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// Of the published model, which was made for few steps without guidance.
    fn defaults(&self) -> Defaults {
        Defaults { num_inference_steps: 8, cfg_scale: 1.0, embedded_guidance: None }
    }

    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let tokens = self.tokenizer()?.encode(prompts)?;
        let condition = self.text_encoder.as_ref().ok_or(ENCODER_NOT_LOADED)?.penultimate(&tokens);
        Ok(Condition { text: rounded(condition.text, self.settings.dtype), ..condition })
    }

    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        self.tokenizer()?.length(prompt)
    }

    fn encode_images(&self, pixels: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().encode(pixels)
    }

    fn decode_latents(&self, latents: Tensor<4>, _frames: usize) -> Tensor<4> {
        self.autoencoder().decode(latents)
    }

    /// A picture's positions follow its text's length, so that samples of other lengths are evaluated one by one.
    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let time = self.time(sigma);
        let mut lengths = condition.lengths.iter().map(|length| transformer::continued(*length));
        let first = lengths.next();
        let velocity = if lengths.all(|length| Some(length) == first) {
            self.velocity_of_alike(noisy, time, condition)
        } else {
            let sample = |row: usize| {
                let (noisy, time) = (noisy.clone().narrow(0, row, 1), time.clone().narrow(0, row, 1));
                self.velocity_of_alike(noisy, time, &condition.row(row))
            };
            Tensor::cat((0..condition.lengths.len()).map(sample).collect(), 0)
        };
        rounded(velocity, self.settings.dtype)
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
        "ZImagePipeline"
    }

    fn components(&self) -> &'static [&'static str] {
        &[TEXT_ENCODER, DENOISER, AUTOENCODER]
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        &["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
    }

    fn tables(&self) -> &'static [&'static str] {
        &["text_encoder.embed_tokens.weight", "transformer.x_pad_token", "transformer.cap_pad_token"]
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            TEXT_ENCODER => Some(&TEXT_KEYS),
            DENOISER => Some(&transformer::KEYS),
            AUTOENCODER => Some(&autoencoder_kl::KEYS),
            _ => None,
        }
    }

    fn component_of(&self, files: &WeightFiles) -> Option<&'static str> {
        let all = |keys: &[&str]| keys.iter().all(|key| files.contains(key));
        let any = |end: &str| files.keys().any(|key| key.ends_with(end));
        if all(&["cap_pad_token", "x_pad_token", "cap_embedder.0.weight"]) {
            return Some(DENOISER);
        }
        // Norms of the queries tell Qwen3 from Qwen2.
        if any("embed_tokens.weight") && any("layers.0.self_attn.q_norm.weight") {
            return Some(TEXT_ENCODER);
        }
        autoencoder_kl::is_without_quantiser(files).then_some(AUTOENCODER)
    }

    fn published_files(&self) -> &'static [(&'static str, &'static str)] {
        &[("model_index.json", MODEL_INDEX), (SCHEDULER_FILE, SCHEDULER)]
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
                let config: TextEncoderConfig = config::text_encoder(source)?;
                expected(&TextEncoder::unfilled(&config, &device), &TEXT_KEYS)
            }
            DENOISER => expected(
                &Transformer::unfilled(&TransformerConfig::read(source)?, &device),
                &transformer::KEYS,
            ),
            AUTOENCODER => AutoencoderKl::expected(source)?,
            _ => TensorShapes::new(),
        })
    }

    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
        footprint::evaluation(source, workload)
    }

    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError> {
        let vae = AutoencoderKlConfig::read(source)?;
        let (per_pixel, flops_per_pixel) = (vae.numbers_per_pixel(), vae.flops_per_pixel());
        Ok(Encoding { per_pixel, flops_per_pixel, ..config::text_encoder(source)?.encoding() })
    }

    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        ZImage::from_pretrained(source, options).map(Model::ZImage)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        ZImage::outline(source, options).map(Model::ZImage)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        ZImage::random(source, seed, device).map(Model::ZImage)
    }
}
