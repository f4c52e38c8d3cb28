//! Qwen-Image (arXiv 2508.02324): a double-stream transformer over packed latents, conditioned on the
//! hidden states of a Qwen2.5-VL language model.
//!
//! Conventions that REFERENCE-grade numbers depend on are stated where they are computed; the folder
//! layout is the published one (`model_index.json`, `transformer/`, `text_encoder/`, `tokenizer/`,
//! `vae/`, `scheduler/`).

mod config;
mod latents;
mod published;
mod rotary;
mod text_encoder;
mod tokenizer;
mod transformer;
mod vae;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_flow::SigmaGrid;
use fewstep_flow::guidance::{guided, rescaled};
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::path::velocity_of_clean;
use fewstep_flow::schedule::SchedulerConfig;

pub use config::{PredictionType, PromptTemplate, TextEncoderConfig, TransformerConfig, VaeConfig};
pub use text_encoder::TextEncoder;
pub use tokenizer::PromptTokenizer;
pub use transformer::Transformer;
pub use vae::{PixelUnshuffle, Vae};

pub(crate) use published::{component_of, write_configs};

use crate::weights::{KeyMap, WeightType, collect, initialize, write};
use crate::{Condition, Conventions, GuidanceRule, LoadOptions, ModelError, ModelSource};

/// The class `model_index.json` names.
pub(crate) const PIPELINE_CLASS: &str = "QwenImagePipeline";

/// Components with weights, in the order of the folders.
pub(crate) const COMPONENTS: &[&str] = &["text_encoder", "transformer", "vae"];

/// All components of one Qwen-Image folder.
#[derive(Module, Debug)]
pub struct QwenImage {
    /// The language model whose hidden states condition the transformer.
    pub text_encoder: TextEncoder,
    /// The denoiser.
    pub transformer: Transformer,
    /// Pixels to latents and back.
    pub vae: Vae,
    #[module(skip)]
    tokenizer: PromptTokenizer,
    #[module(skip)]
    scheduler: SchedulerConfig,
    #[module(skip)]
    conventions: Conventions,
}

impl QwenImage {
    /// Loads all components.
    ///
    /// # Errors
    /// If a file is missing or damaged, or weights and configs do not fit.
    pub(crate) fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        let text_encoder = TextEncoder::from_pretrained(source, &options.device)?;
        let transformer = Transformer::from_pretrained(source, &options.device)?;
        Self::with_parts(source, text_encoder, transformer, options.conventions)
    }

    /// Builds the model's configs with fresh weights; the same seed gives the same weights.
    ///
    /// # Errors
    /// If a config or the tokenizer is missing or damaged.
    pub(crate) fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        let mut generator = TorchGenerator::new(seed);
        let text_encoder = TextEncoder::zeros(&TextEncoderConfig::read(source)?, device);
        let transformer = Transformer::zeros(&TransformerConfig::read(source)?, device);
        Self::with_parts(
            source,
            initialize(text_encoder, &mut generator, &[]),
            initialize(transformer, &mut generator, transformer::ZERO_AT_START),
            Conventions::default(),
        )
    }

    fn with_parts(
        source: &ModelSource,
        text_encoder: TextEncoder,
        transformer: Transformer,
        conventions: Conventions,
    ) -> Result<Self, ModelError> {
        let (_, scheduler) = source.text_or(published::SCHEDULER_FILE, published::SCHEDULER)?;
        Ok(Self {
            text_encoder,
            transformer: transformer.with_gelu(conventions.gelu),
            vae: Vae::from_config(VaeConfig::read(source)?),
            tokenizer: PromptTokenizer::read(source, conventions.max_prompt_tokens)?,
            scheduler: SchedulerConfig::from_json(&scheduler)?,
            conventions,
        })
    }

    /// Writes the weights of the components that have any.
    pub(crate) fn save_weights(
        &self,
        folder: &Path,
        dtype: WeightType,
        info: &BTreeMap<String, String>,
    ) -> Result<(), ModelError> {
        let save = |file: &str, tensors| write(&folder.join(file), &tensors, info);
        let text_encoder = collect(&self.text_encoder, &text_encoder::KEYS, dtype);
        save("text_encoder/model.safetensors", text_encoder)?;
        let transformer = collect(&self.transformer, &transformer::KEYS, dtype);
        save("transformer/diffusion_pytorch_model.safetensors", transformer)
    }

    /// Text states of prompts, differentiable in the text encoder.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    pub(crate) fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let tokens = self.tokenizer.encode(prompts)?;
        Ok(self.text_encoder.forward(&tokens))
    }

    /// The velocity of [`crate::Denoiser`].
    pub(crate) fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = noisy.dims();
        let packed = latents::pack(noisy.clone());
        let output = self.transformer.forward(packed, sigma.clone(), condition, [height / 2, width / 2]);
        let output = latents::unpack(output, [channels, height, width]);
        match self.transformer.prediction_type() {
            PredictionType::Velocity => output,
            PredictionType::Clean => velocity_of_clean(noisy, output, sigma),
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
            return combined;
        }
        let [_, channels, height, width] = conditional.dims();
        let rescaled = rescaled(latents::pack(combined), latents::pack(conditional));
        latents::unpack(rescaled, [channels, height, width])
    }

    /// What the model was loaded with.
    pub(crate) fn conventions(&self) -> &Conventions {
        &self.conventions
    }

    /// Pixels per transformer token along one side.
    pub(crate) fn division_factor(&self) -> usize {
        self.vae.factor() * latents::PATCH
    }

    /// The sigma grid of inference for pictures of a size.
    pub(crate) fn sigma_grid(
        &self,
        num_inference_steps: usize,
        height: usize,
        width: usize,
    ) -> Result<SigmaGrid, ModelError> {
        let tokens = (height / self.division_factor()) * (width / self.division_factor());
        Ok(self.scheduler.grid(num_inference_steps, tokens)?)
    }
}

/// Key names of this family's transformer in LoRA files.
pub(crate) fn transformer_keys() -> &'static KeyMap {
    &transformer::KEYS
}
