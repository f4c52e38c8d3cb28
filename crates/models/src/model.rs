//! The one enum of families, and what every family offers.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_data::image::MAX_SIDE_PX;
use fewstep_flow::SigmaGrid;
use fewstep_flow::guidance::guided;
use fewstep_flow::schedule::{GridRequest, SchedulerConfig};

use crate::load_options::{rounded, store_weights};
use crate::qwen_image::{self, PromptLength, QwenImage};
use crate::weights::{KeyMap, TensorShapes, WeightType, compare, copy_tree, is_weights};
use crate::{Components, Condition, Conventions, DecodeRange, Linear, LoadOptions, ModelError, ModelSource};

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
pub enum Model {
    /// See [`crate::qwen_image`].
    QwenImage(QwenImage),
}

impl Model {
    /// Loads a model.
    ///
    /// # Errors
    /// If a folder names no known family, a file is missing or damaged, or weights do not fit.
    pub fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        check_family(source)?;
        QwenImage::from_pretrained(source, options).map(Model::QwenImage)
    }

    /// A model without its weights: sizes, names and schedule of the components that the options name. Nothing is
    /// allocated, and no weight file need be there. Evaluating it gives nothing of use.
    ///
    /// # Errors
    /// If the folder names no known family, or a config or the tokenizer is missing, damaged or unsupported.
    pub fn outline(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        check_family(source)?;
        QwenImage::outline(source, options).map(Model::QwenImage)
    }

    /// Builds a model's configs with fresh weights; the same seed gives the same weights.
    ///
    /// # Errors
    /// As [`Model::from_pretrained`], weights aside.
    pub fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        check_family(source)?;
        QwenImage::random(source, seed, device).map(Model::QwenImage)
    }

    /// The model with weights, and what its parts hand on, in a number type: as one loaded in it.
    pub fn stored_in(self, dtype: WeightType) -> Self {
        match store_weights(self, dtype) {
            Model::QwenImage(model) => Model::QwenImage(model.with_dtype(dtype)),
        }
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
        let unchanged = match self {
            Model::QwenImage(model) => model.unchanged(),
        };
        match (source.folder(), self) {
            (Some(source), _) => {
                let kept =
                    |path: &Path| unchanged.iter().any(|name| path.parent() == Some(&source.join(name)));
                copy_tree(source, folder, &|path| !is_weights(path) || kept(path))?;
            }
            (None, Model::QwenImage(_)) => qwen_image::write_configs(source, folder, &unchanged)?,
        }
        match self {
            Model::QwenImage(model) => model.save_weights(source, folder, dtype, info),
        }
    }

    /// Text states of prompts, differentiable in the text encoder.
    ///
    /// # Errors
    /// If a prompt cannot be tokenised.
    pub fn encode_prompts(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        match self {
            Model::QwenImage(model) => model.encode_prompts(prompts),
        }
    }

    /// How long a prompt is, and how much of it is read.
    ///
    /// # Errors
    /// If the prompt cannot be tokenised.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        match self {
            Model::QwenImage(model) => model.prompt_tokens(prompt),
        }
    }

    /// Pictures to latents.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1]; output `[B, C, H, W]`
    pub fn encode_images(&self, pixels: Tensor<4>) -> Tensor<4> {
        let pixels = rounded(pixels, self.dtype());
        let latents = match self {
            Model::QwenImage(model) => model.vae.encode(pixels),
        };
        rounded(latents, self.dtype())
    }

    /// Latents to pictures, in the range of [`Conventions::decode`].
    ///
    /// # Shapes
    /// - `latents`: `[B, C, H, W]`; output `[B, 3, height, width]`
    pub fn decode_latents(&self, latents: Tensor<4>) -> Tensor<4> {
        let pixels = match self {
            Model::QwenImage(model) => model.vae.decode(latents),
        };
        let pixels = rounded(pixels, self.dtype());
        match self.conventions().decode {
            DecodeRange::Unbounded => pixels,
            DecodeRange::Clamped => pixels.clamp(-1.0, 1.0),
        }
    }

    /// What the model was loaded with.
    pub fn conventions(&self) -> &Conventions {
        match self {
            Model::QwenImage(model) => model.conventions(),
        }
    }

    /// The number type the model was loaded with.
    pub fn dtype(&self) -> WeightType {
        match self {
            Model::QwenImage(model) => model.dtype(),
        }
    }

    /// `[C, H, W]` of the latents of a picture size in pixels.
    ///
    /// # Errors
    /// If a side is no multiple of [`Model::division_factor`], or longer than pictures are.
    pub fn latent_shape(&self, height: usize, width: usize) -> Result<[usize; 3], ModelError> {
        token_grid([height, width], self.division_factor())?;
        match self {
            Model::QwenImage(model) => {
                let scale = model.vae.factor();
                Ok([model.vae.channels(), height / scale, width / scale])
            }
        }
    }

    /// Picture sides are multiples of this many pixels.
    pub fn division_factor(&self) -> usize {
        match self {
            Model::QwenImage(model) => model.division_factor(),
        }
    }

    /// The sigma grid of inference, which is also the one a student is trained on.
    ///
    /// # Errors
    /// If the schedule has no grid of that many steps.
    pub fn sigma_grid(
        &self,
        num_inference_steps: usize,
        height: usize,
        width: usize,
    ) -> Result<SigmaGrid, ModelError> {
        self.grid(&self.grid_request(num_inference_steps, height, width))
    }

    /// A run of pictures of a size from pure noise on the model's own schedule.
    pub fn grid_request(&self, num_inference_steps: usize, height: usize, width: usize) -> GridRequest {
        let image_tokens = match self {
            Model::QwenImage(model) => model.image_tokens(height, width),
        };
        let rounding = self.conventions().sigma_rounding;
        GridRequest { rounding, ..GridRequest::new(num_inference_steps, image_tokens) }
    }

    /// The schedule's config.
    pub fn scheduler(&self) -> &SchedulerConfig {
        match self {
            Model::QwenImage(model) => model.scheduler(),
        }
    }

    /// The sigma grid of a run that changes the model's schedule.
    ///
    /// # Errors
    /// If the request cannot be met.
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, ModelError> {
        Ok(self.scheduler().grid(request)?)
    }

    /// Bytes of the folder that [`Model::save_pretrained`] writes, headers of weight files aside; the model needs no
    /// weights for it.
    ///
    /// # Errors
    /// If a folder or file cannot be read.
    pub fn saved_bytes(&self, source: &ModelSource, dtype: WeightType) -> Result<u64, ModelError> {
        let unchanged = match self {
            Model::QwenImage(model) => model.unchanged(),
        };
        let mut bytes =
            source.bytes(&|component, is_weights| !is_weights || unchanged.contains(&component))?;
        for component in self.component_names().iter().filter(|name| !unchanged.contains(name)) {
            let numbers: usize = qwen_image::component_tensors(source, component)?
                .values()
                .map(|shape| shape.iter().product::<usize>())
                .sum();
            bytes += (numbers * dtype.bytes()) as u64;
        }
        Ok(bytes)
    }

    /// Names of the components that parameters' names start with.
    pub fn component_names(&self) -> &'static [&'static str] {
        match self {
            Model::QwenImage(_) => qwen_image::COMPONENTS,
        }
    }

    /// J, the width of the text states that the denoiser reads.
    pub fn text_width(&self) -> usize {
        match self {
            Model::QwenImage(model) => model.text_width(),
        }
    }

    /// The components that turn prompts into text states.
    pub fn text_encoder_names(&self) -> &'static [&'static str] {
        match self {
            Model::QwenImage(_) => qwen_image::TEXT_ENCODERS,
        }
    }

    /// The layers of the denoiser that the peers' recipes give adapters, as [`crate::lora::LoraConfig`] names them.
    pub fn lora_targets(&self) -> &'static [&'static str] {
        match self {
            Model::QwenImage(_) => qwen_image::LORA_TARGETS,
        }
    }

    /// The component that denoises: the one adapters belong to.
    pub fn denoiser_name(&self) -> &'static str {
        match self {
            Model::QwenImage(_) => qwen_image::DENOISER,
        }
    }

    /// The component of a parameter, and its key in that component's weight files; that of an adapter is its key in
    /// LoRA files.
    pub fn weight_key<'a>(&self, parameter: &'a str) -> (&'a str, String) {
        let (component, name) = parameter.split_once('.').unwrap_or((parameter, ""));
        let keys = match self {
            Model::QwenImage(_) => qwen_image::keys(component),
        };
        let key = keys.map_or_else(|| name.to_owned(), |keys| keys.key(name));
        let half = |ours, theirs| Some(format!("{}{theirs}", key.strip_suffix(ours)?));
        let lora = half(".lora.down", ".lora_A.default.weight");
        (component, lora.or_else(|| half(".lora.up", ".lora_B.default.weight")).unwrap_or(key))
    }

    /// Parameters that are tables whose rows are looked up, and not matrices that something is multiplied by.
    pub fn tables(&self) -> &'static [&'static str] {
        match self {
            Model::QwenImage(_) => qwen_image::TABLES,
        }
    }

    /// The model with a component that computes with the nearest numbers of the model's type to its matrices: what a
    /// component does whose weights learn in f32. Gradients pass the rounding.
    pub fn rounding(mut self, component: &str) -> Self {
        let half = self.dtype().half();
        match &mut self {
            Model::QwenImage(model) => model.round_to(component, half),
        }
        self
    }

    /// The model with gradient checkpointing in its denoiser or without: backward passes compute the inside of each block
    /// again instead of keeping it.
    pub fn recomputing_blocks(self, recomputes_blocks: bool) -> Self {
        match self {
            Model::QwenImage(model) => Model::QwenImage(model.recomputing_blocks(recomputes_blocks)),
        }
    }

    /// The denoiser's projections with their module names, for adapters.
    pub(crate) fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)> {
        match self {
            Model::QwenImage(model) => model.linears(),
        }
    }

    /// How the denoiser's parameters are called in files.
    pub(crate) fn denoiser_keys(&self) -> &'static KeyMap {
        match self {
            Model::QwenImage(_) => qwen_image::transformer_keys(),
        }
    }
}

impl Denoiser for Model {
    fn velocity(&self, noisy: Tensor<4>, sigma: Tensor<1>, condition: &Condition) -> Tensor<4> {
        match self {
            Model::QwenImage(model) => model.velocity(noisy, sigma, condition),
        }
    }

    fn guide(&self, conditional: Tensor<4>, unconditional: Tensor<4>, cfg_scale: f32) -> Tensor<4> {
        match self {
            Model::QwenImage(model) => model.guide(conditional, unconditional, cfg_scale),
        }
    }

    fn kept(&self, latents: Tensor<4>) -> Tensor<4> {
        rounded(latents, self.dtype())
    }
}

/// Shapes of all tensors that the weight files of a model must hold, by component and key.
///
/// Only the configs are read: the weights need not be there, and none are allocated. Tensors that the files may
/// hold and the model does not use, such as a vision tower, are left out.
///
/// # Errors
/// If the folder names no known family, or a config is missing, damaged or unsupported.
pub fn expected_tensors(source: &ModelSource) -> Result<BTreeMap<&'static str, TensorShapes>, ModelError> {
    check_family(source)?;
    qwen_image::expected_tensors(source)
}

/// Compares the weight files of one component with the configs, without reading values.
///
/// # Errors
/// If its config is missing, damaged or unsupported; if the files are missing or damaged; or as loading would refuse them.
pub fn check_weights(source: &ModelSource, component: &'static str) -> Result<(), ModelError> {
    check_family(source)?;
    let expected = qwen_image::component_tensors(source, component)?;
    match qwen_image::keys(component) {
        Some(keys) if !expected.is_empty() => compare(&source.weights(component)?, &expected, keys),
        _ => Ok(()), // no component with weights
    }
}

/// The components that are loaded for some of the work.
pub fn loaded_components(components: Components) -> &'static [&'static str] {
    qwen_image::loaded(components)
}

/// Height and width of a picture in units of `factor` pixels.
///
/// # Errors
/// If a side is no multiple of it, or longer than pictures are.
pub(crate) fn token_grid([height, width]: [usize; 2], factor: usize) -> Result<[usize; 2], ModelError> {
    for (axis, found) in [("height", height), ("width", width)] {
        if found > MAX_SIDE_PX {
            return Err(ModelError::TooLarge { axis, found });
        }
        if found == 0 || !found.is_multiple_of(factor) {
            return Err(ModelError::Size { axis, found, factor });
        }
    }
    Ok([height / factor, width / factor])
}

/// Checks that the model is of a family there is code for.
pub(crate) fn check_family(source: &ModelSource) -> Result<(), ModelError> {
    let (path, found) = source.pipeline_class()?;
    if found != qwen_image::PIPELINE_CLASS {
        let expected = vec![qwen_image::PIPELINE_CLASS];
        return Err(ModelError::UnknownClass { path, role: "pipeline", found, expected });
    }
    Ok(())
}
