//! The one enum of families, and what every family offers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_flow::SigmaGrid;
use fewstep_flow::guidance::guided;

use crate::load_options::round_weights;
use crate::qwen_image::{self, QwenImage};
use crate::weights::{KeyMap, WeightType};
use crate::{Condition, Conventions, DecodeRange, Linear, LoadOptions, ModelError, ModelSource};

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
        let model = QwenImage::from_pretrained(source, options).map(Model::QwenImage)?;
        Ok(round_weights(model, options.dtype))
    }

    /// Builds a model's configs with fresh weights; the same seed gives the same weights.
    ///
    /// # Errors
    /// As [`Model::from_pretrained`], weights aside.
    pub fn random(source: &ModelSource, seed: u64, device: &Device) -> Result<Self, ModelError> {
        check_family(source)?;
        QwenImage::random(source, seed, device).map(Model::QwenImage)
    }

    /// Writes a complete model folder: weights of this model, every other file as `source` has it.
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
        match (source.folder(), self) {
            (Some(source), _) => copy_configs(source, folder)?,
            (None, Model::QwenImage(_)) => qwen_image::write_configs(source, folder)?,
        }
        match self {
            Model::QwenImage(model) => model.save_weights(folder, dtype, info),
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

    /// Pictures to latents.
    ///
    /// # Shapes
    /// - `pixels`: `[B, 3, height, width]` in [−1, 1]; output `[B, C, H, W]`
    pub fn encode_images(&self, pixels: Tensor<4>) -> Tensor<4> {
        match self {
            Model::QwenImage(model) => model.vae.encode(pixels),
        }
    }

    /// Latents to pictures, in the range of [`Conventions::decode`].
    ///
    /// # Shapes
    /// - `latents`: `[B, C, H, W]`; output `[B, 3, height, width]`
    pub fn decode_latents(&self, latents: Tensor<4>) -> Tensor<4> {
        let pixels = match self {
            Model::QwenImage(model) => model.vae.decode(latents),
        };
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

    /// `[C, H, W]` of the latents of a picture size in pixels.
    ///
    /// # Errors
    /// If a side is no multiple of [`Model::division_factor`].
    pub fn latent_shape(&self, height: usize, width: usize) -> Result<[usize; 3], ModelError> {
        let factor = self.division_factor();
        for (axis, found) in [("height", height), ("width", width)] {
            if found == 0 || !found.is_multiple_of(factor) {
                return Err(ModelError::Size { axis, found, factor });
            }
        }
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
        match self {
            Model::QwenImage(model) => model.sigma_grid(num_inference_steps, height, width),
        }
    }

    /// Names of the components that parameters' names start with.
    pub fn component_names(&self) -> &'static [&'static str] {
        match self {
            Model::QwenImage(_) => qwen_image::COMPONENTS,
        }
    }

    /// The component that denoises: the one adapters belong to.
    pub fn denoiser_name(&self) -> &'static str {
        match self {
            Model::QwenImage(_) => "transformer",
        }
    }

    /// The denoiser's projections with their module names, for adapters.
    pub(crate) fn denoiser_linears(&mut self) -> Vec<(String, &mut Linear)> {
        match self {
            Model::QwenImage(model) => model.transformer.linears(),
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
}

/// Checks that the model is of a family there is code for.
fn check_family(source: &ModelSource) -> Result<(), ModelError> {
    let (path, found) = source.pipeline_class()?;
    if found != qwen_image::PIPELINE_CLASS {
        let expected = vec![qwen_image::PIPELINE_CLASS];
        return Err(ModelError::UnknownClass { path, role: "pipeline", found, expected });
    }
    Ok(())
}

/// Copies everything but weights and their indices, one level of folders deep.
pub(crate) fn copy_configs(source: &Path, target: &Path) -> Result<(), ModelError> {
    std::fs::create_dir_all(target).map_err(ModelError::io(target))?;
    for path in entries(source)? {
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() {
            copy_configs(&path, &target.join(name))?;
        } else if !is_weights(&path) {
            let bytes = std::fs::read(&path).map_err(ModelError::io(&path))?;
            let copy = target.join(name);
            fewstep_data::atomic::write(&copy, &bytes).map_err(ModelError::io(&copy))?;
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

fn is_weights(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
}
