//! From a prompt to a picture in three lines: what a program that uses the models calls.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use fewstep_data::image::Picture;
use fewstep_flow::Solver;
use fewstep_flow::noise::latent_noise;

use crate::sampling::{Guidance, sample_latents};
use crate::{Condition, LoadOptions, Model, ModelError, ModelSource, lora};

/// A LoRA file and how strongly it is applied.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFile {
    /// The safetensors file.
    pub path: PathBuf,
    /// 1 applies it as trained.
    pub alpha: f32,
}

/// How a pipeline is loaded.
#[derive(Clone, Debug, Default)]
pub struct PipelineOptions {
    /// Device, conventions and number type.
    pub load: LoadOptions,
    /// An adapter of the denoiser.
    pub lora: Option<LoraFile>,
}

/// One picture to draw.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to draw.
    pub prompt: String,
    /// What guidance pushes away from; used where `cfg_scale` is not 1.
    pub negative_prompt: String,
    /// Seed of the initial noise (torch's CPU generator).
    pub seed: u64,
    /// Evaluations along the sigma grid.
    pub num_inference_steps: usize,
    /// Guidance scale; 1 is off.
    pub cfg_scale: f32,
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Integrator.
    pub solver: Solver,
}

impl Request {
    /// A request with the settings of a few-step student: 4 steps, no guidance, seed 0.
    pub fn new(prompt: impl Into<String>, height: usize, width: usize) -> Self {
        Self {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            seed: 0,
            num_inference_steps: 4,
            cfg_scale: 1.0,
            height,
            width,
            solver: Solver::Euler,
        }
    }
}

/// A drawn picture and what it was decoded from.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The picture, pixels rounded as [`crate::Conventions::rounding`] says.
    pub picture: Picture,
    /// Final latents `[1, C, H, W]`.
    pub latents: Tensor<4>,
    /// The prompt's text states, one unpadded sample.
    pub condition: Condition,
}

impl Generated {
    /// Writes the picture as PNG.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        Ok(self.picture.save_png(path.as_ref())?)
    }
}

/// A loaded model with everything needed to draw.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// The model, on the plain side of its device.
    pub model: Model,
    device: Device,
}

impl Pipeline {
    /// Loads a model, such as the one in a folder, and the adapter of `options`.
    ///
    /// # Errors
    /// As [`Model::from_pretrained`] and [`lora::load`].
    pub fn from_pretrained(
        source: impl Into<ModelSource>,
        options: PipelineOptions,
    ) -> Result<Self, ModelError> {
        let source = source.into();
        let mut model = Model::from_pretrained(&source, &options.load)?;
        if let Some(file) = &options.lora {
            lora::check_base(&file.path, &source)?;
            model = lora::load(model, &file.path, file.alpha)?;
        }
        Ok(Self { model, device: options.load.device })
    }

    /// A pipeline around a model that is already loaded on the plain side of `device`.
    pub fn new(model: Model, device: Device) -> Self {
        Self { model, device }
    }

    /// Draws one picture.
    ///
    /// # Errors
    /// If the size does not fit the family or the schedule has no such grid.
    pub fn generate(&self, request: &Request) -> Result<Generated, ModelError> {
        let mut generated = self.generate_batch(std::slice::from_ref(request))?;
        Ok(generated.pop().expect("one picture per request"))
    }

    /// Draws several pictures at once; a batch gives the pictures its requests give one by one.
    ///
    /// # Errors
    /// As [`Pipeline::generate`].
    ///
    /// # Panics
    /// If the requests differ in anything but prompts and seeds.
    pub fn generate_batch(&self, requests: &[Request]) -> Result<Vec<Generated>, ModelError> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        assert!(
            requests.iter().all(|request| alike(first, request)),
            "requests of one batch differ in their settings"
        );
        let [channels, height, width] = self.model.latent_shape(first.height, first.width)?;
        let grid = self.model.sigma_grid(first.num_inference_steps, first.height, first.width)?;
        let guidance = self.guidance(requests)?;
        let noise = requests
            .iter()
            .map(|request| latent_noise(request.seed, [1, channels, height, width], &self.device))
            .collect();
        let latents = sample_latents(&self.model, first.solver, &grid, Tensor::cat(noise, 0), &guidance);
        Ok(self.decode(latents, &guidance.condition))
    }

    fn guidance(&self, requests: &[Request]) -> Result<Guidance, ModelError> {
        let prompts: Vec<String> = requests.iter().map(|request| request.prompt.clone()).collect();
        let condition = self.model.encode_prompts(&prompts)?;
        let cfg_scale = requests[0].cfg_scale;
        if cfg_scale == 1.0 {
            return Ok(Guidance::off(condition));
        }
        let negatives: Vec<String> = requests.iter().map(|request| request.negative_prompt.clone()).collect();
        let unconditional = Some(self.model.encode_prompts(&negatives)?);
        Ok(Guidance { condition, unconditional, cfg_scale })
    }

    /// Decodes final latents `[B, C, H, W]` into pictures.
    fn decode(&self, latents: Tensor<4>, condition: &Condition) -> Vec<Generated> {
        let pixels = self.model.decode_latents(latents.clone());
        let [batch, _, height, width] = pixels.dims();
        let values = crate::weights::values(pixels);
        let per_picture = values.chunks_exact(3 * height * width);
        let rounding = self.model.conventions().rounding;
        let picture = |pixels: &[f32]| Picture::from_pixels(pixels, width, height, rounding);
        per_picture
            .zip(latents.chunk(batch, 0))
            .enumerate()
            .map(|(row, (pixels, latents))| Generated {
                picture: picture(pixels),
                latents,
                condition: condition.row(row),
            })
            .collect()
    }
}

/// Whether two requests can share a batch.
fn alike(a: &Request, b: &Request) -> bool {
    let key = |r: &Request| (r.num_inference_steps, r.cfg_scale.to_bits(), r.height, r.width, r.solver);
    key(a) == key(b)
}
