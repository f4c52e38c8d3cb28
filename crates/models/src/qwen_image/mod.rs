//! Qwen-Image (arXiv 2508.02324): a double-stream transformer over packed latents, conditioned on the
//! hidden states of a Qwen2.5-VL language model.
//!
//! Conventions that REFERENCE-grade numbers depend on are stated where they are computed; the folder
//! layout is the published one (`model_index.json`, `transformer/`, `text_encoder/`, `tokenizer/`,
//! `vae/`, `scheduler/`).

mod config;
mod footprint;
mod latents;
mod published;
mod ranges;
mod rotary;
mod text_encoder;
mod tokenizer;
mod transformer;
mod vae;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_flow::guidance::{guided, rescaled};
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::path::velocity_of_clean;
use fewstep_flow::schedule::SchedulerConfig;
use fewstep_kernels::HalfType;

pub use config::{PredictionType, PromptTemplate, Rope, TextEncoderConfig, TransformerConfig};
pub(crate) use footprint::{counted, encoding, footprint, held};
pub(crate) use published::{component_of, write_configs};
pub use text_encoder::TextEncoder;
pub use tokenizer::{PromptLength, PromptTokenizer};
pub use transformer::Transformer;
pub use vae::{Autoencoder, AutoencoderConfig, PixelUnshuffle, PixelUnshuffleConfig, Vae, VaeConfig};

use self::config::{ConfigFile, Configs};
use crate::load_options::{rounded, store_weights};
use crate::weights::{KeyMap, TensorShapes, WeightType, carry_ignored, collect, expected, initialize, write};
use crate::{Components, Condition, Conventions, GuidanceRule, Linear, LoadOptions, ModelError, ModelSource};

/// The class `model_index.json` names.
pub(crate) const PIPELINE_CLASS: &str = "QwenImagePipeline";

/// Components with weights, in the order of the folders.
pub(crate) const COMPONENTS: &[&str] = &["text_encoder", "transformer", "vae"];

/// Components no method trains: a saved model has the files it was loaded from.
pub(crate) const UNCHANGED: &[&str] = &["vae"];

/// Components that turn prompts into text states.
pub(crate) const TEXT_ENCODERS: &[&str] = &["text_encoder"];

/// Layers that the peers' recipes give adapters: the attention's projections, the modulations, and the second
/// projection of each MLP.
pub(crate) const LORA_TARGETS: &[&str] = &[
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

/// Parameters whose rows are looked up.
pub(crate) const TABLES: &[&str] = &["text_encoder.embed_tokens.weight"];

/// The component that denoises.
pub(crate) const DENOISER: &str = "transformer";

const ENCODER_NOT_LOADED: ModelError = ModelError::NotLoaded { component: "text_encoder" };

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
    scheduler: SchedulerConfig,
    #[module(skip)]
    conventions: Conventions,
    #[module(skip)]
    dtype: WeightType,
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
    pub(crate) fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?; // checked against each other before anything large is read
        }
        let (device, dtype) = (&options.device, options.dtype);
        let transformer = || Transformer::from_pretrained_in(source, dtype, device);
        let text_encoder = || TextEncoder::from_pretrained_in(source, dtype, device);
        let vae = || Ok::<_, ModelError>(store_weights(Vae::from_pretrained(source, device)?, dtype));
        let parts = match options.components {
            Components::All => {
                Parts { text_encoder: Some(text_encoder()?), transformer: Some(transformer()?), vae: vae()? }
            }
            Components::Denoiser => Parts {
                text_encoder: None,
                transformer: Some(transformer()?),
                vae: Vae::absent(source, TransformerConfig::read(source)?.out_channels)?,
            },
            Components::Encoders => {
                Parts { text_encoder: Some(text_encoder()?), transformer: None, vae: vae()? }
            }
        };
        Self::with_parts(source, parts, options)
    }

    /// The components that the options name, with sizes and names but without weights.
    pub(crate) fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        if options.components == Components::All {
            Configs::read(source)?;
        }
        let device = &options.device;
        let text_encoder = match options.components {
            Components::Denoiser => None,
            _ => Some(TextEncoder::unfilled(&TextEncoderConfig::read(source)?, device)),
        };
        let transformer = match options.components {
            Components::Encoders => None,
            _ => Some(TransformerConfig::read(source)?),
        };
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
    pub(crate) fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
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
        let conventions = options.conventions;
        let scheduler = ConfigFile::shared(source, published::SCHEDULER_FILE, published::SCHEDULER)?;
        let read = |encoder: &TextEncoder| -> Result<PromptTokenizer, ModelError> {
            let tokenizer = PromptTokenizer::read(source, conventions.max_prompt_tokens)?;
            tokenizer.check_ids(encoder.vocabulary())?;
            Ok(tokenizer)
        };
        let tokenizer = parts.text_encoder.as_ref().map(read).transpose()?;
        Ok(Self {
            text_encoder: parts.text_encoder,
            transformer: parts.transformer.map(|transformer| transformer.with_gelu(conventions.gelu)),
            vae: parts.vae,
            tokenizer,
            scheduler: SchedulerConfig::from_json(&scheduler.text())?,
            conventions,
            dtype: options.dtype,
        })
    }

    /// Writes the weights of the components that can learn. What the text encoder's files in `source` hold
    /// beside the language model is written along, so that the peers can load the folder.
    pub(crate) fn save_weights(
        &self,
        source: &ModelSource,
        folder: &Path,
        dtype: WeightType,
        info: &BTreeMap<String, String>,
    ) -> Result<(), ModelError> {
        let save = |file: &str, tensors| write(&folder.join(file), &tensors, info);
        if let Some(encoder) = &self.text_encoder {
            let mut text_encoder = collect(encoder, &text_encoder::KEYS, dtype);
            match source.weights("text_encoder") {
                Ok(files) => carry_ignored(&mut text_encoder, &files, &text_encoder::KEYS, dtype)?,
                // A model that began with fresh weights.
                Err(ModelError::NoModelFolder { .. } | ModelError::MissingComponent { .. }) => {}
                Err(error) => return Err(error),
            }
            save("text_encoder/model.safetensors", text_encoder)?;
        }
        match &self.transformer {
            Some(transformer) => save(
                "transformer/diffusion_pytorch_model.safetensors",
                collect(transformer, &transformer::KEYS, dtype),
            ),
            None => Ok(()),
        }
    }

    /// Text states of prompts, differentiable in the text encoder.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    pub(crate) fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let tokens = self.tokenizer()?.encode(prompts)?;
        let encoder = self.text_encoder.as_ref().ok_or(ENCODER_NOT_LOADED)?;
        let Condition { text, lengths } = encoder.forward(&tokens);
        Ok(Condition { text: rounded(text, self.dtype), lengths })
    }

    /// The tokens of a prompt and how many of them are read.
    pub(crate) fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        self.tokenizer()?.length(prompt)
    }

    fn tokenizer(&self) -> Result<&PromptTokenizer, ModelError> {
        self.tokenizer.as_ref().ok_or(ENCODER_NOT_LOADED)
    }

    /// The denoiser's projections by name.
    pub(crate) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        self.transformer.as_mut().map(Transformer::linears).unwrap_or_default()
    }

    /// See [`crate::Model::rounding`].
    pub(crate) fn round_to(&mut self, component: &str, half: Option<HalfType>) {
        match component {
            DENOISER => self.linears().into_iter().for_each(|(_, linear)| linear.rounded_to = half),
            _ => {
                let encoder = self.text_encoder.as_mut().filter(|_| component == "text_encoder");
                encoder.into_iter().for_each(|encoder| encoder.round_to(half));
            }
        }
    }

    /// See [`crate::Model::recomputing_blocks`].
    pub(crate) fn recomputing_blocks(self, recomputes_blocks: bool) -> Self {
        let transformer =
            self.transformer.map(|transformer| transformer.recomputing_blocks(recomputes_blocks));
        Self { transformer, ..self }
    }

    /// The transformer.
    ///
    /// # Panics
    /// If it was not loaded.
    pub(crate) fn denoiser(&self) -> &Transformer {
        self.transformer.as_ref().expect("the denoiser was loaded")
    }

    /// J, the width of the text states.
    pub(crate) fn text_width(&self) -> usize {
        match (&self.transformer, &self.text_encoder) {
            (Some(transformer), _) => transformer.text_width(),
            (None, Some(encoder)) => encoder.width(),
            (None, None) => unreachable!("every choice of components has one of the two"),
        }
    }

    /// The velocity of [`crate::Denoiser`].
    pub(crate) fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let packed = latents::pack(noisy.clone());
        let time = self.time(sigma.clone());
        let output = self.denoiser().forward(packed, time, condition, [height / 2, width / 2]);
        let output = latents::unpack(output, [channels, height, width]);
        let velocity = match self.denoiser().prediction_type() {
            PredictionType::Velocity => output,
            PredictionType::Clean => velocity_of_clean(noisy, output, sigma),
        };
        rounded(velocity, self.dtype)
    }

    /// What the transformer is told of a sigma: the peers round the timestep, 1000·sigma, and then its thousandth
    /// (in bf16 777.6 becomes 776), while the solver's sigmas stay f32.
    fn time(&self, sigma: Tensor<1>) -> Tensor<1> {
        match self.dtype {
            WeightType::F32 => sigma,
            dtype => rounded(rounded(sigma * 1000.0, dtype) / 1000.0, dtype),
        }
    }

    /// The guided velocity of [`crate::Denoiser`]; norms are taken over a token, as diffusers takes them.
    pub(crate) fn guide(
        &self,
        conditional: Tensor<4>,
        unconditional: Tensor<4>,
        cfg_scale: f32,
    ) -> Tensor<4> {
        let combined = guided(conditional.clone(), unconditional, cfg_scale);
        if self.conventions.guidance == GuidanceRule::Plain {
            return rounded(combined, self.dtype);
        }
        let [_, channels, height, width] = conditional.dims();
        let rescaled = rescaled(latents::pack(combined), latents::pack(conditional));
        rounded(latents::unpack(rescaled, [channels, height, width]), self.dtype)
    }

    /// With another number type for what its parts hand on.
    pub(crate) fn with_dtype(self, dtype: WeightType) -> Self {
        Self { dtype, ..self }
    }

    /// What the model was loaded with.
    pub(crate) fn conventions(&self) -> &Conventions {
        &self.conventions
    }

    /// The number type the model was loaded with.
    pub(crate) fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Components whose files a saved model has from where it was loaded.
    pub(crate) fn unchanged(&self) -> Vec<&'static str> {
        let encoder = self.text_encoder.is_none().then_some("text_encoder");
        let denoiser = self.transformer.is_none().then_some(DENOISER);
        UNCHANGED.iter().copied().chain(encoder).chain(denoiser).collect()
    }

    /// Pixels per transformer token along one side.
    pub(crate) fn division_factor(&self) -> usize {
        self.vae.factor() * latents::PATCH
    }

    /// Transformer tokens of a picture size.
    pub(crate) fn image_tokens(&self, height: usize, width: usize) -> usize {
        (height / self.division_factor()).saturating_mul(width / self.division_factor())
    }

    /// The schedule's config.
    pub(crate) fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }
}

/// The tensors of the components' weight files, from the configs alone.
pub(crate) fn expected_tensors(
    source: &ModelSource,
) -> Result<BTreeMap<&'static str, TensorShapes>, ModelError> {
    Configs::read(source)?; // checked against each other
    COMPONENTS.iter().map(|name| Ok((*name, component_tensors(source, name)?))).collect()
}

/// The tensors of one component's weight files, from its config alone; none where it has no weights.
pub(crate) fn component_tensors(source: &ModelSource, component: &str) -> Result<TensorShapes, ModelError> {
    // Nothing is allocated there.
    let device = Device::flex();
    Ok(match component {
        "text_encoder" => {
            expected(&TextEncoder::unfilled(&TextEncoderConfig::read(source)?, &device), &text_encoder::KEYS)
        }
        "transformer" => {
            expected(&Transformer::unfilled(&TransformerConfig::read(source)?, &device), &transformer::KEYS)
        }
        "vae" => Vae::expected(&VaeConfig::read(source)?, &device),
        _ => TensorShapes::new(),
    })
}

/// The components that are loaded for some of the work.
pub(crate) fn loaded(components: Components) -> &'static [&'static str] {
    match components {
        Components::All => COMPONENTS,
        Components::Denoiser => &[DENOISER],
        Components::Encoders => &["text_encoder", "vae"],
    }
}

/// How weight files call the parameters of a component.
pub(crate) fn keys(component: &str) -> Option<&'static KeyMap> {
    match component {
        "transformer" => Some(&transformer::KEYS),
        "text_encoder" => Some(&text_encoder::KEYS),
        "vae" => Some(&vae::KEYS),
        _ => None,
    }
}

/// Key names of this family's transformer in LoRA files.
pub(crate) fn transformer_keys() -> &'static KeyMap {
    &transformer::KEYS
}
