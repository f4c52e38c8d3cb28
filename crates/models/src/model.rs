//! The one enum of families. Everything else asks a family through [`Family`] and [`Kind`].

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::guidance::guided;
use fewstep_flow::schedule::{GridRequest, SchedulerConfig, TrainingLevels};
use fewstep_flow::{SigmaGrid, Solver};

use crate::family::{AUTOENCODER, Defaults, Family, Kind, Sizes};
use crate::flux::{self, Flux};
use crate::load_options::{rounded, store_weights};
use crate::qwen_image::{self, QwenImage};
use crate::stable_diffusion::{self, StableDiffusion};
use crate::stable_diffusion_3::{self, StableDiffusion3};
use crate::student::SigmaRule;
use crate::wan::{self, Wan};
use crate::weights::{KeyMap, TensorShapes, WeightType, compare};
use crate::z_image::{self, ZImage};
use crate::{
    Components, Condition, Conventions, DecodeRange, Extent, Linear, LoadOptions, ModelError, ModelSource,
    Peer, PromptLength, lora, model_folder,
};

/// Predicts velocities: all that methods and samplers know of a model.
pub trait Denoiser {
    /// The velocity noise − clean at noisy latents.
    ///
    /// # Shapes
    /// - `noisy`: `[B, C, H, W]`
    /// - `sigma`: `[B]` in [0, 1], 1 is pure noise
    /// - output `[B, C, H, W]`
    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4>;

    /// Combines two velocities under guidance: unconditional + cfg_scale·(conditional − unconditional), and what
    /// the family adds to that.
    ///
    /// # Shapes
    /// All `[B, C, H, W]`.
    fn guide(&self, conditional: Tensor<4>, unconditional: Tensor<4>, cfg_scale: f32) -> Tensor<4> {
        guided(conditional, unconditional, cfg_scale)
    }

    /// Latents as they are kept between steps: rounded to the model's number type.
    ///
    /// # Shapes
    /// `[B, C, H, W]`
    fn kept(&self, latents: Tensor<4>) -> Tensor<4> {
        latents
    }
}

/// A loaded model of any family.
///
/// It is a burn module: `train()` moves it to the autodiff side of its device, `valid()` back, sharing
/// storage.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a run has a handful of them, beside their tensors")]
pub enum Model {
    /// See [`crate::flux`].
    Flux(Flux),
    /// See [`crate::qwen_image`].
    QwenImage(QwenImage),
    /// See [`crate::stable_diffusion`].
    StableDiffusion(StableDiffusion),
    /// See [`crate::stable_diffusion_3`].
    StableDiffusion3(StableDiffusion3),
    /// See [`crate::wan`].
    Wan(Wan),
    /// See [`crate::z_image`].
    ZImage(ZImage),
}

/// Every family there is code for.
pub(crate) static KINDS: [&dyn Kind; 7] = [
    &flux::Kind,
    &qwen_image::Kind,
    &stable_diffusion::BASE,
    &stable_diffusion::XL,
    &stable_diffusion_3::Kind,
    &wan::Kind,
    &z_image::Kind,
];

impl Model {
    fn family(&self) -> &dyn Family {
        match self {
            Self::Flux(model) => model,
            Self::QwenImage(model) => model,
            Self::StableDiffusion(model) => model,
            Self::StableDiffusion3(model) => model,
            Self::Wan(model) => model,
            Self::ZImage(model) => model,
        }
    }

    fn family_mut(&mut self) -> &mut dyn Family {
        match self {
            Self::Flux(model) => model,
            Self::QwenImage(model) => model,
            Self::StableDiffusion(model) => model,
            Self::StableDiffusion3(model) => model,
            Self::Wan(model) => model,
            Self::ZImage(model) => model,
        }
    }
}

impl Model {
    /// Loads a model.
    ///
    /// # Errors
    /// If a folder names no known family, a file is missing or damaged, or weights do not fit.
    pub fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        kind_of(source)?.load(source, options)
    }

    /// A model without its weights: sizes, names and schedule of the components that the options name. Nothing is
    /// allocated, and no weight file need be there. Evaluating it gives nothing of use.
    ///
    /// # Errors
    /// If the folder names no known family, or a config or the tokenizer is missing, damaged or unsupported.
    pub fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        kind_of(source)?.outline(source, options)
    }

    /// Builds a model's configs with fresh weights; the same seed gives the same weights.
    ///
    /// # Errors
    /// As [`Model::from_pretrained`], weights aside.
    pub fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        kind_of(source)?.random(source, seed, device)
    }

    /// The model with weights, and what its parts hand on, in a number type: as one loaded in it.
    pub fn stored_in(self, dtype: WeightType) -> Self {
        let mut model = store_weights(self, dtype);
        model.family_mut().settings_mut().dtype = dtype;
        model
    }

    /// Writes a complete model folder: the weights of this model's components that can learn, every other file
    /// as `source` has it.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn save_pretrained(
        &self,
        source: &ModelSource,
        folder: &Path,
        dtype: WeightType,
        info: &BTreeMap<String, String>,
    ) -> Result<(), ModelError> {
        let unchanged = self.unchanged();
        model_folder::write_all_but_weights(self.kind(), source, folder, &unchanged)?;
        for component in self.component_names().iter().filter(|name| !unchanged.contains(name)) {
            model_folder::write_component(self, source, folder, component, (dtype, info))?;
        }
        Ok(())
    }

    /// Bytes of the folder that [`Model::save_pretrained`] writes, headers of weight files aside; the model needs no
    /// weights for it.
    ///
    /// # Errors
    /// If a folder or file cannot be read.
    pub fn saved_bytes(&self, source: &ModelSource, dtype: WeightType) -> Result<u64, ModelError> {
        let unchanged = self.unchanged();
        let mut bytes =
            source.bytes(&|component, is_weights| !is_weights || unchanged.contains(&component))?;
        for component in self.component_names().iter().filter(|name| !unchanged.contains(name)) {
            let tensors = self.kind().component_tensors(source, component)?;
            let numbers: usize = tensors.values().map(|shape| shape.iter().product::<usize>()).sum();
            bytes += (numbers * dtype.bytes()) as u64;
        }
        Ok(bytes)
    }

    /// Components whose files a saved model has from where it was loaded.
    fn unchanged(&self) -> Vec<&'static str> {
        let loaded = self.kind().loaded(self.family().settings().components);
        let names = self.component_names().iter().copied();
        names.filter(|name| *name == AUTOENCODER || !loaded.contains(name)).collect()
    }

    fn kind(&self) -> &'static dyn Kind {
        self.family().kind()
    }

    fn sizes(&self) -> &Sizes {
        &self.family().settings().sizes
    }
}

impl Model {
    /// Text states of prompts, differentiable in the text encoder.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        self.family().encode_prompts(prompts)
    }

    /// Text states of negative prompts, which guidance pushes away from. Some families read an empty one in their own
    /// way.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    pub fn encode_negatives(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        self.family().encode_negatives(prompts)
    }

    /// How long a prompt is, and how much of it is read.
    ///
    /// # Errors
    /// If the prompt cannot be tokenised.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        self.family().prompt_tokens(prompt)
    }

    /// J, the width of the text states that the denoiser reads.
    pub fn text_width(&self) -> usize {
        self.sizes().text_width
    }

    /// P, the width of the pooled states that the denoiser reads; `None` where it reads none.
    pub fn pooled_width(&self) -> Option<usize> {
        self.sizes().pooled_width
    }

    /// What the model is usually run with.
    pub fn defaults(&self) -> Defaults {
        self.family().defaults()
    }

    /// Pictures, or videos of so many frames, to latents.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, frames · height, width]` in [−1, 1]; output `[B, C, latent frames · H, W]`
    ///
    /// # Panics
    /// If the family has no such videos, as [`Model::latent_shape`] would have said.
    pub fn encode_images(&self, pixels: Tensor<4>, frames: usize) -> Tensor<4> {
        self.assert_frames(frames);
        let latents = self.family().encode_images(rounded(pixels, self.dtype()), frames);
        rounded(latents, self.dtype())
    }

    /// Latents to pictures, or to videos of so many frames, in the range of [`Conventions::decode`].
    ///
    /// # Shapes
    /// - `latents`: `[B, C, latent frames · H, W]`; output `[B, 3, frames · height, width]`
    ///
    /// # Panics
    /// As [`Model::encode_images`].
    pub fn decode_latents(&self, latents: Tensor<4>, frames: usize) -> Tensor<4> {
        self.assert_frames(frames);
        let pixels = rounded(self.family().decode_latents(latents, frames), self.dtype());
        match self.conventions().decode {
            DecodeRange::Unbounded => pixels,
            DecodeRange::Clamped => pixels.clamp(-1.0, 1.0),
        }
    }

    fn assert_frames(&self, frames: usize) {
        if let Err(error) = self.kind().latent_frames(frames) {
            panic!("{error}");
        }
    }

    /// What the model was loaded with.
    pub fn conventions(&self) -> &Conventions {
        &self.family().settings().conventions
    }

    /// The number type the model was loaded with.
    pub fn dtype(&self) -> WeightType {
        self.family().settings().dtype
    }
}

impl Model {
    /// `[C, latent frames · H, W]` of the latents of a picture or a video.
    ///
    /// # Errors
    /// If a side is no multiple of [`Model::division_factor`], or longer than pictures are, or the family's; or the family
    /// cannot draw so many frames.
    pub fn latent_shape(&self, extent: impl Into<Extent>) -> Result<[usize; 3], ModelError> {
        let Extent { frames, height, width } = extent.into();
        let Sizes { latent_channels, latent_factor, division_factor, max_side_px, .. } = *self.sizes();
        check_sides([height, width], max_side_px)?;
        token_grid([height, width], division_factor)?;
        let frames = self.kind().latent_frames(frames)?;
        Ok([latent_channels, frames * (height / latent_factor), width / latent_factor])
    }

    /// Whether the denoiser can be told a guidance scale that is asked for.
    ///
    /// # Errors
    /// If it takes none.
    pub fn check_embedded_guidance(&self, asked: Option<f32>) -> Result<(), ModelError> {
        match (asked, self.defaults().embedded_guidance) {
            (Some(found), None) => Err(ModelError::NotTold { found, class: self.kind().pipeline_class() }),
            _ => Ok(()),
        }
    }

    /// Frames per latent frame after the first, which has one of its own; `None` where the family draws pictures alone.
    pub fn frames_per_latent(&self) -> Option<usize> {
        self.kind().frames_per_latent()
    }

    /// Picture sides are multiples of this many pixels.
    pub fn division_factor(&self) -> usize {
        self.sizes().division_factor
    }

    /// The sigma grid of inference, which is also the one a student is trained on.
    ///
    /// # Errors
    /// If the schedule has no grid of that many steps.
    pub fn sigma_grid(
        &self,
        num_inference_steps: usize,
        extent: impl Into<Extent>,
    ) -> Result<SigmaGrid, ModelError> {
        self.grid(&self.grid_request(num_inference_steps, extent))
    }

    /// A run from pure noise on the model's own schedule.
    pub fn grid_request(&self, num_inference_steps: usize, extent: impl Into<Extent>) -> GridRequest {
        let Extent { frames, height, width } = extent.into();
        let (factor, frames) = (self.division_factor(), self.kind().latent_frames(frames).unwrap_or(1));
        let image_tokens = frames.saturating_mul(height / factor).saturating_mul(width / factor);
        let rounding = self.conventions().sigma_rounding;
        GridRequest { rounding, ..GridRequest::new(num_inference_steps, image_tokens) }
    }

    /// The schedule's config.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.family().settings().scheduler
    }

    /// The solver of the pipeline that is followed: DiffSynth's always takes Euler's steps, and so does a few-step
    /// student.
    pub fn solver(&self) -> Solver {
        match self.conventions().peer {
            Some(Peer::Diffsynth) => Solver::Euler,
            Some(Peer::Diffusers) | None => self.scheduler().solver(),
        }
    }

    /// The noise levels of training, with the weights of a peer's loss: those that the model was trained on, or that
    /// steps of a grid start at.
    ///
    /// # Errors
    /// If the request cannot be met.
    pub fn training_levels(&self, request: &GridRequest) -> Result<TrainingLevels, ModelError> {
        match self.scheduler() {
            SchedulerConfig::Diffusion(config) => Ok(config.training_levels()),
            SchedulerConfig::FlowMatching(_) | SchedulerConfig::UniPc(_) => {
                Ok(TrainingLevels::of(&self.grid(request)?))
            }
        }
    }

    /// The weight of a velocity's squared error at which all levels count alike in what the denoiser was trained to
    /// predict: 1 where that is the velocity.
    pub fn loss_weight(&self, sigma: f32) -> f32 {
        match self.scheduler() {
            SchedulerConfig::Diffusion(config) => config.prediction_type.loss_weight(sigma),
            SchedulerConfig::FlowMatching(_) | SchedulerConfig::UniPc(_) => 1.0,
        }
    }

    /// The highest sigma that the denoiser was trained on.
    pub fn highest_sigma(&self) -> f32 {
        match self.scheduler() {
            SchedulerConfig::Diffusion(config) => config.table().highest(),
            SchedulerConfig::FlowMatching(_) | SchedulerConfig::UniPc(_) => 1.0,
        }
    }

    /// The sigma grid of a run that changes the model's schedule.
    ///
    /// # Errors
    /// If the request cannot be met.
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        self.family().grid(request)
    }

    /// The sigma grid of a run as a student's rule has it. A family may have more to say of its own scheduler than its
    /// config does.
    pub(crate) fn grid_by(&self, rule: &SigmaRule, asked: &GridRequest) -> Result<SigmaGrid, ModelError> {
        let request = rule.request(asked);
        match rule.scheduler == *self.scheduler() {
            true => self.grid(&request),
            false => Ok(rule.scheduler.grid(&request)?),
        }
    }

    /// The first state of a run from pure noise on a grid: the noise itself where the grid starts at 1.
    ///
    /// # Shapes
    /// `[B, C, H, W]`
    pub fn start(&self, noise: Tensor<4>, grid: &SigmaGrid) -> Tensor<4> {
        self.family().start(noise, grid.as_slice()[0])
    }

    /// The latents of the last state of a run on a grid: the state itself where the grid ends at 0.
    ///
    /// # Shapes
    /// `[B, C, H, W]`
    pub fn finish(&self, state: Tensor<4>, grid: &SigmaGrid) -> Tensor<4> {
        let sigma = grid.as_slice().last().expect("a grid has sigmas");
        self.family().finish(state, *sigma)
    }
}

impl Model {
    /// Names of the components that parameters' names start with.
    pub fn component_names(&self) -> &'static [&'static str] {
        self.kind().components()
    }

    /// The components that turn prompts into text states.
    pub fn text_encoder_names(&self) -> &'static [&'static str] {
        self.kind().text_encoders()
    }

    /// The layers of the denoiser that the peers' recipes give adapters, as [`crate::lora::LoraConfig`] names them.
    pub fn lora_targets(&self) -> &'static [&'static str] {
        self.kind().lora_targets()
    }

    /// A key of the denoiser's weights or adapters as [`Model::weight_key`] has it, whichever spelling a file has.
    pub fn canonical_key(&self, key: &str) -> String {
        let plain = key.strip_prefix("pipe.dit.").unwrap_or(key);
        lora::canonical_key(key).unwrap_or_else(|| self.denoiser_keys().canonical(plain))
    }

    /// What DiffSynth-Studio calls a tensor of the denoiser, by its key of [`Model::weight_key`].
    pub fn diffsynth_key(&self, key: &str) -> String {
        let adapter = lora::LoraFormat::Diffsynth.respelled(key);
        adapter.or_else(|| self.kind().diffsynth_key(key)).unwrap_or_else(|| key.to_owned())
    }

    /// What DiffSynth-Studio calls a layer of the denoiser, where it has a name of its own there.
    pub(crate) fn diffsynth_layer(&self, layer: &str) -> Option<String> {
        self.kind().diffsynth_layer(layer)
    }

    /// The component that denoises: the one adapters belong to.
    pub fn denoiser_name(&self) -> &'static str {
        self.kind().denoiser()
    }

    /// The component of a parameter, and its key in that component's weight files; that of an adapter is its key in
    /// LoRA files.
    pub fn weight_key<'a>(&self, parameter: &'a str) -> (&'a str, String) {
        let (component, name) = parameter.split_once('.').unwrap_or((parameter, ""));
        let keys = self.kind().keys(component);
        let key = keys.map_or_else(|| name.to_owned(), |keys| keys.key(name));
        let half = |ours, theirs| Some(format!("{}{theirs}", key.strip_suffix(ours)?));
        let lora = half(".lora.down", ".lora_A.default.weight");
        (component, lora.or_else(|| half(".lora.up", ".lora_B.default.weight")).unwrap_or(key))
    }

    /// Parameters that are tables whose rows are looked up, and not matrices that something is multiplied by.
    pub fn tables(&self) -> &'static [&'static str] {
        self.kind().tables()
    }

    /// The model with a component that computes with the nearest numbers of the model's type to its matrices: what a
    /// component does whose weights learn in f32. Gradients pass the rounding.
    pub fn rounding(mut self, component: &str) -> Self {
        let half = self.dtype().half();
        let family = self.family_mut();
        match component == family.kind().denoiser() {
            true => family.denoiser_linears().into_iter().for_each(|(_, linear)| linear.rounded_to = half),
            false => family.round_encoder_to(component, half),
        }
        self
    }

    /// The model with gradient checkpointing in its denoiser or without: backward passes compute the inside of each block
    /// again instead of keeping it.
    pub fn recomputing_blocks(mut self, recomputes_blocks: bool) -> Self {
        if let Some(switch) = self.family_mut().recomputes_blocks_mut() {
            *switch = recomputes_blocks;
        }
        self
    }

    /// The denoiser's projections with their module names, for adapters.
    pub(crate) fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)> {
        self.family_mut().denoiser_linears()
    }

    /// How the denoiser's parameters are called in files.
    pub(crate) fn denoiser_keys(&self) -> &'static KeyMap {
        self.keys(self.denoiser_name())
    }

    /// How the parameters of a component with weights are called in files.
    pub(crate) fn keys(&self, component: &str) -> &'static KeyMap {
        self.kind().keys(component).unwrap_or_else(|| panic!("{component} has no weights"))
    }
}

impl Denoiser for Model {
    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        self.family().velocity(noisy, sigma, condition)
    }

    fn guide(&self, conditional: Tensor<4>, unconditional: Tensor<4>, cfg_scale: f32) -> Tensor<4> {
        self.family().guide(conditional, unconditional, cfg_scale)
    }

    fn kept(&self, latents: Tensor<4>) -> Tensor<4> {
        rounded(latents, self.dtype())
    }
}

/// The family of a model.
///
/// # Errors
/// If it is none there is code for.
pub(crate) fn kind_of(source: &ModelSource) -> Result<&'static dyn Kind, ModelError> {
    let (path, found) = source.pipeline_class()?;
    let known = KINDS.iter().find(|kind| kind.pipeline_class() == found);
    known.copied().ok_or_else(|| {
        let expected = KINDS.iter().map(|kind| kind.pipeline_class()).collect();
        ModelError::UnknownClass { path, role: "pipeline", found, expected }
    })
}

/// Shapes of all tensors that the weight files of a model must hold, by component and key.
///
/// Only the configs are read: the weights need not be there, and none are allocated. Tensors that the files may
/// hold and the model does not use, such as a vision tower, are left out.
///
/// # Errors
/// If the folder names no known family, or a config is missing, damaged or unsupported.
pub fn expected_tensors(source: &ModelSource) -> Result<BTreeMap<&'static str, TensorShapes>, ModelError> {
    let kind = kind_of(source)?;
    kind.check_configs(source)?;
    kind.components().iter().map(|name| Ok((*name, kind.component_tensors(source, name)?))).collect()
}

/// Compares the weight files of one component with the configs, without reading values.
///
/// # Errors
/// If its config is missing, damaged or unsupported; if the files are missing or damaged; or as loading would refuse them.
pub fn check_weights(source: &ModelSource, component: &'static str) -> Result<(), ModelError> {
    let kind = kind_of(source)?;
    let expected = kind.component_tensors(source, component)?;
    match kind.keys(component) {
        Some(keys) if !expected.is_empty() => compare(&source.weights(component)?, &expected, keys),
        _ => Ok(()), // no component with weights
    }
}

/// The components that are loaded for some of the work.
///
/// # Errors
/// If the folder names no known family.
pub fn loaded_components(
    source: &ModelSource,
    components: Components,
) -> Result<Vec<&'static str>, ModelError> {
    Ok(kind_of(source)?.loaded(components))
}

/// Height and width of a picture in units of `factor` pixels.
///
/// # Errors
/// If a side is no multiple of it, or longer than pictures are.
pub(crate) fn token_grid([height, width]: [usize; 2], factor: usize) -> Result<[usize; 2], ModelError> {
    check_sides([height, width], MAX_SIDE_PX)?;
    for (axis, found) in [("height", height), ("width", width)] {
        if found == 0 || !found.is_multiple_of(factor) {
            return Err(ModelError::Size { axis, found, factor });
        }
    }
    Ok([height / factor, width / factor])
}

/// Refuses pictures with a side of more than `most` pixels.
pub(crate) fn check_sides([height, width]: [usize; 2], most: usize) -> Result<(), ModelError> {
    let sides = [("height", height), ("width", width)];
    match sides.into_iter().find(|(_, found)| *found > most) {
        Some((axis, found)) => Err(ModelError::TooLarge { axis, found, most }),
        None => Ok(()),
    }
}
