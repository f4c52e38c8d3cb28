//! What a model family is to the rest of this crate.
//!
//! A family implements [`Kind`], what is known of it from its folder alone, and [`Family`], a loaded model of it. Most
//! methods have a default that fits a flow-matching model in the official layout.

use std::fmt::Debug;

use burn::tensor::{Device, Tensor};
use fewstep_flow::SigmaGrid;
use fewstep_flow::guidance::guided;
use fewstep_flow::schedule::{GridRequest, SchedulerConfig};
use fewstep_kernels::HalfType;
use serde_json::Value;

use crate::footprint::Evaluation;
use crate::load_options::rounded;
use crate::trial::Trial;
use crate::weights::{KeyMap, Rule, TensorShapes, WeightFiles, WeightType};
use crate::{
    Components, Condition, Conventions, Encoding, Linear, LoadOptions, Model, ModelError, ModelSource,
    PromptLength, Workload,
};

/// The component that turns pictures into latents and back, in every official layout. No method trains it: a saved model
/// has its files from where it was loaded.
pub const AUTOENCODER: &str = "vae";

/// The most frames of a video: positions that published models know are as many, of latent frames.
pub const MAX_FRAMES: usize = 4 * 1023 + 1;

/// What a model is usually run with where nobody says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// Sampling steps.
    pub num_inference_steps: usize,
    /// Guidance of two evaluations; 1 is off.
    pub cfg_scale: f32,
    /// The guidance scale that the denoiser is told where a condition has none; `None` where it takes none.
    pub embedded_guidance: Option<f32>,
}

/// What every loaded model has, whatever its family.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Its schedule.
    pub(crate) scheduler: SchedulerConfig,
    /// What the peers compute differently, with the family's own choices where the options left them open.
    pub(crate) conventions: Conventions,
    /// What its parts hand on is rounded to this type.
    pub(crate) dtype: WeightType,
    /// What was loaded.
    pub(crate) components: Components,
    /// What is known whichever components were.
    pub(crate) sizes: Sizes,
}

/// The sizes of what goes into a model and comes out of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// C.
    pub(crate) latent_channels: usize,
    /// Pixels per latent pixel along one side.
    pub(crate) latent_factor: usize,
    /// Picture sides are multiples of this many pixels, and an image token is a square of them.
    pub(crate) division_factor: usize,
    /// The longest side of a picture in pixels.
    pub(crate) max_side_px: usize,
    /// J, the width of the text states that the denoiser reads.
    pub(crate) text_width: usize,
    /// P, the width of the pooled states that the denoiser reads; `None` where it reads none.
    pub(crate) pooled_width: Option<usize>,
}

/// A family before anything of a model is loaded.
pub(crate) trait Kind: Sync + Debug {
    /// The class `model_index.json` names.
    fn pipeline_class(&self) -> &'static str;

    /// Components with weights, in the order of the folders: [`Kind::text_encoders`], [`Kind::denoiser`],
    /// [`AUTOENCODER`].
    fn components(&self) -> &'static [&'static str];

    /// The component that denoises: the one adapters belong to.
    fn denoiser(&self) -> &'static str {
        "transformer"
    }

    /// The components that turn prompts into text states.
    fn text_encoders(&self) -> &'static [&'static str] {
        &["text_encoder"]
    }

    /// Folders of tokenizer files.
    fn tokenizers(&self) -> &'static [&'static str] {
        &["tokenizer"]
    }

    /// The layers of the denoiser that the peers' recipes give adapters, as [`crate::lora::LoraConfig`] names them.
    fn lora_targets(&self) -> &'static [&'static str];

    /// What DiffSynth-Studio calls a tensor of the denoiser, by its key in weight files of diffusers; `None` where it is the
    /// same.
    fn diffsynth_key(&self, _key: &str) -> Option<String> {
        None
    }

    /// The same of a layer, where no other family has a layer of that name.
    fn diffsynth_layer(&self, _layer: &str) -> Option<String> {
        None
    }

    /// Parameters that are tables whose rows are looked up, and not matrices that something is multiplied by.
    fn tables(&self) -> &'static [&'static str] {
        &[]
    }

    /// Frames per latent frame after the first, which has one of its own; `None` where the family draws pictures alone.
    fn frames_per_latent(&self) -> Option<usize> {
        None
    }

    /// Latent frames of so many frames.
    ///
    /// # Errors
    /// If the family cannot draw so many.
    fn latent_frames(&self, frames: usize) -> Result<usize, ModelError> {
        let frames_per_latent = self.frames_per_latent();
        let step = frames_per_latent.unwrap_or(MAX_FRAMES);
        let most = if frames_per_latent.is_some() { MAX_FRAMES } else { 1 };
        match (1..=most).contains(&frames) && (frames - 1).is_multiple_of(step) {
            true => Ok((frames - 1) / step + 1),
            false => Err(ModelError::Frames { found: frames, frames_per_latent }),
        }
    }

    /// How weight files call the parameters of a component with weights.
    fn keys(&self, component: &str) -> Option<&'static KeyMap>;

    /// The component that weight files hold, by the keys only it has; `None` for other weights.
    fn component_of(&self, files: &WeightFiles) -> Option<&'static str>;

    /// How to read weight files of the family that are in the layout of its authors; `None` for others.
    fn original_layout(&self, _files: &WeightFiles) -> Option<&'static [Rule]> {
        None
    }

    /// Small files that every model of the family shares, by their place in its folder, for weight files that are given
    /// without them.
    fn published_files(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The published config of a component, for weights of its size that came without one; `None` for other weights.
    fn published_config(&self, _component: &str, _files: &WeightFiles) -> Option<Value> {
        None
    }

    /// Checks the configs of all components against each other.
    ///
    /// # Errors
    /// If one is missing, damaged or unsupported, or they do not fit each other.
    fn check_configs(&self, source: &ModelSource) -> Result<(), ModelError>;

    /// The tensors of one component's weight files, from its config alone; none where it has no weights.
    ///
    /// # Errors
    /// If its config is missing, damaged or unsupported.
    fn component_tensors(&self, source: &ModelSource, component: &str) -> Result<TensorShapes, ModelError>;

    /// Numbers of a tensor of the weight files that stay in memory.
    fn held(&self, _key: &str, shape: &[usize]) -> u64 {
        shape.iter().product::<usize>() as u64
    }

    /// What one evaluation of the denoiser on a workload's batch takes.
    ///
    /// # Errors
    /// If a config is missing or damaged, or the family cannot draw that size.
    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError>;

    /// What text encoders and autoencoder hold beside their weights.
    ///
    /// # Errors
    /// If a config is missing or damaged.
    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError>;

    /// Loads the components that the options name.
    ///
    /// # Errors
    /// If a file is missing or damaged, or weights and configs do not fit.
    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError>;

    /// The same with sizes and names but without weights.
    ///
    /// # Errors
    /// If a config or the tokenizer is missing, damaged or unsupported.
    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError>;

    /// The configs with fresh weights; the autoencoder is loaded.
    ///
    /// # Errors
    /// If a config, a tokenizer or the autoencoder is missing or damaged.
    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError>;

    /// What the family's small model for trying machines is made of; `None` where there is none.
    fn trial(&self) -> Option<Trial> {
        None
    }

    /// The components that are loaded for some of the work.
    fn loaded(&self, components: Components) -> Vec<&'static str> {
        let all = self.components().iter().copied();
        match components {
            Components::All => all.collect(),
            Components::Denoiser => vec![self.denoiser()],
            Components::Encoders => all.filter(|name| *name != self.denoiser()).collect(),
        }
    }
}

/// A loaded model, on whichever side of its device.
pub(crate) trait Family: Debug {
    /// Its family.
    fn kind(&self) -> &'static dyn Kind;

    /// What it was loaded with.
    fn settings(&self) -> &Settings;

    /// The same, to be changed.
    fn settings_mut(&mut self) -> &mut Settings;

    /// What the model is usually run with.
    fn defaults(&self) -> Defaults;

    /// Text states of prompts, differentiable in the text encoders.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError>;

    /// What guidance pushes away from.
    ///
    /// # Errors
    /// As [`Family::encode_prompts`].
    fn encode_negatives(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        self.encode_prompts(prompts)
    }

    /// How long a prompt is, and how much of it is read.
    ///
    /// # Errors
    /// If the prompt cannot be tokenised.
    fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError>;

    /// Pictures `[B, 3, frames · height, width]` in [−1, 1] to latents `[B, C, latent frames · H, W]`. Other than one
    /// frame only where [`Kind::frames_per_latent`] allows for them.
    fn encode_images(&self, pixels: Tensor<4>, frames: usize) -> Tensor<4>;

    /// Latents `[B, C, latent frames · H, W]` to pictures `[B, 3, frames · height, width]`, not clamped; frames as in
    /// [`Family::encode_images`].
    fn decode_latents(&self, latents: Tensor<4>, frames: usize) -> Tensor<4>;

    /// The velocity of [`crate::Denoiser`].
    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4>;

    /// The guided velocity of [`crate::Denoiser`].
    fn guide(&self, conditional: Tensor<4>, unconditional: Tensor<4>, cfg_scale: f32) -> Tensor<4> {
        rounded(guided(conditional, unconditional, cfg_scale), self.settings().dtype)
    }

    /// The sigma grid of a run.
    ///
    /// # Errors
    /// If the request cannot be met.
    fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        Ok(self.settings().scheduler.grid(request)?)
    }

    /// The first state of a run from pure noise, at the first sigma of its grid.
    fn start(&self, noise: Tensor<4>, _sigma: f32) -> Tensor<4> {
        noise
    }

    /// The latents of the last state of a run, at the last sigma of its grid.
    fn finish(&self, state: Tensor<4>, _sigma: f32) -> Tensor<4> {
        state
    }

    /// The switch of gradient checkpointing; `None` where the denoiser has none, or is not loaded.
    fn recomputes_blocks_mut(&mut self) -> Option<&mut bool> {
        None
    }

    /// [`crate::Model::rounding`] of a text encoder.
    fn round_encoder_to(&mut self, component: &str, half: Option<HalfType>);

    /// The denoiser's projections with their module names, for adapters, in the order of the peers' modules: fresh
    /// adapters are drawn in it. None where it was not loaded.
    fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)>;
}
