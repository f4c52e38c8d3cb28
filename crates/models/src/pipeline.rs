//! From a prompt to a picture in three lines: what a program that uses the models calls.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::image::{Picture, Rounding, Size};
use fewstep_flow::noise::{NoiseSource, RandDevice};
use fewstep_flow::path::noisy;
use fewstep_flow::schedule::{GridRequest, ShiftOverride};
use fewstep_flow::{SigmaGrid, Solver};

use crate::sampling::{Guidance, sample_latents, sample_trajectory};
use crate::{Condition, Denoiser, Extent, LoadOptions, Model, ModelError, ModelSource, Peer, Student, lora};

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

/// One picture or video to draw.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to draw.
    pub prompt: String,
    /// What guidance pushes away from; used where `cfg_scale` is not 1.
    pub negative_prompt: String,
    /// Seed of the initial noise.
    pub seed: u64,
    /// The torch generator that draws the noise.
    pub rand_device: RandDevice,
    /// Evaluations along the sigma grid.
    pub num_inference_steps: usize,
    /// Guidance scale; 1 is off.
    pub cfg_scale: f32,
    /// The guidance scale that the denoiser is told, where it takes one; `None` for the model's own.
    pub embedded_guidance: Option<f32>,
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Frames; 1 is a picture.
    pub num_frames: usize,
    /// Integrator; `None` is the published pipeline's, and Euler's of a few-step student.
    pub solver: Option<Solver>,
    /// μ of the schedule's shift in place of the one for the picture's size (the peers' name).
    pub exponential_shift_mu: Option<f64>,
    /// A picture to start from, of which each frame of a video is a copy; another size is resized and cut in the middle.
    pub input_image: Option<Picture>,
    /// How much of the input picture is drawn anew, in (0, 1]: lowers the first sigma. At 1 nothing of it is left.
    pub denoising_strength: f64,
    /// Whether [`Generated::trajectory`] is kept.
    pub keep_trajectory: bool,
}

impl Request {
    /// A request with the settings of a few-step student: 4 steps, no guidance, seed 0.
    pub fn new(prompt: impl Into<String>, height: usize, width: usize) -> Self {
        Self {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            seed: 0,
            rand_device: RandDevice::Cpu,
            num_inference_steps: 4,
            cfg_scale: 1.0,
            embedded_guidance: None,
            height,
            width,
            num_frames: 1,
            solver: None,
            exponential_shift_mu: None,
            input_image: None,
            denoising_strength: 1.0,
            keep_trajectory: false,
        }
    }

    /// Size of what is drawn.
    pub fn extent(&self) -> Extent {
        Extent { frames: self.num_frames, height: self.height, width: self.width }
    }
}

/// A drawn picture or video and what it was decoded from.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The frames, at least one, pixels rounded as [`crate::Conventions::rounding`] says.
    pub frames: Vec<Picture>,
    /// What the seed gave, `[1, C, F · H, W]`.
    pub noise: Tensor<4>,
    /// The sigma of every state of a trajectory, the final 0 included.
    pub sigmas: SigmaGrid,
    /// Every state `[steps + 1, C, F · H, W]`, from the first (the noise, or an input picture mixed with it) to the final
    /// latents; where [`Request::keep_trajectory`] asked for it.
    pub trajectory: Option<Tensor<4>>,
    /// Final latents `[1, C, F · H, W]`.
    pub latents: Tensor<4>,
    /// The prompt's text states, one unpadded sample.
    pub condition: Condition,
}

impl Generated {
    /// The picture; of a video the frame in the middle.
    pub fn picture(&self) -> &Picture {
        &self.frames[self.frames.len() / 2]
    }

    /// Writes the picture as PNG; of a video the frame in the middle.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ModelError> {
        Ok(self.picture().save_png(path.as_ref())?)
    }
}

/// A loaded model with everything needed to draw.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// The model, on the plain side of its device.
    pub model: Model,
    /// What the weights were trained to run, where they are a student's: pictures are drawn on its grids.
    pub student: Option<Student>,
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
        let student = Student::find(&source, options.lora.as_ref())?;
        Ok(Self { model, student, device: options.load.device })
    }

    /// A pipeline around a model that is already loaded on the plain side of `device`.
    pub fn new(model: Model, device: Device) -> Self {
        Self { model, student: None, device }
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
    /// If the requests differ in anything but prompts, seeds and the content of their input pictures.
    pub fn generate_batch(&self, requests: &[Request]) -> Result<Vec<Generated>, ModelError> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        self.generate_on_grid(requests, self.grid(first)?)
    }

    /// As [`Pipeline::generate_batch`], on a grid other than the requests' own, such as one a student is trained on.
    ///
    /// # Errors
    /// As [`Pipeline::generate`].
    ///
    /// # Panics
    /// As [`Pipeline::generate_batch`].
    pub fn generate_on_grid(
        &self,
        requests: &[Request],
        grid: SigmaGrid,
    ) -> Result<Vec<Generated>, ModelError> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        assert!(
            requests.iter().all(|request| alike(first, request)),
            "requests of one batch differ in their settings"
        );
        let guidance = self.guidance(requests)?;
        let noise = self.noise(requests)?;
        let start = self.start(requests, noise.clone(), &grid);
        let states = match first.keep_trajectory {
            true => sample_trajectory(&self.model, self.solver(first), &grid, start, &guidance),
            false => vec![sample_latents(&self.model, self.solver(first), &grid, start, &guidance)],
        };
        let frames = first.num_frames;
        Ok(self.pictures(Drawn { grid, noise, states, frames, condition: guidance.condition }))
    }

    /// The sigma grid of a request: a student's own, unless the request changes the schedule or starts from a picture.
    ///
    /// # Errors
    /// If the size does not fit the family or the schedule has no such grid.
    pub fn grid(&self, request: &Request) -> Result<SigmaGrid, ModelError> {
        self.model.latent_shape(request.extent())?;
        let plain = self.model.grid_request(request.num_inference_steps, request.extent());
        if let (Some(student), None) = (&self.student, request.exponential_shift_mu)
            && request.denoising_strength == 1.0
        {
            if let Some(grid) = student.trained_grid(request.num_inference_steps, request.extent()) {
                return Ok(grid);
            }
            // A file without a rule leaves it to the model's own schedule, the best guess.
            if let Some(rule) = &student.rule {
                return self.model.grid_by(rule, &plain);
            }
        }
        self.model.grid(&GridRequest {
            shift: request.exponential_shift_mu.map(ShiftOverride::Mu),
            denoising_strength: request.denoising_strength,
            ..plain
        })
    }

    /// The solver of a request.
    pub fn solver(&self, request: &Request) -> Solver {
        let own = || if self.student.is_some() { Solver::Euler } else { self.model.solver() };
        request.solver.unwrap_or_else(own)
    }

    fn guidance(&self, requests: &[Request]) -> Result<Guidance, ModelError> {
        let prompts: Vec<String> = requests.iter().map(|request| request.prompt.clone()).collect();
        let Request { cfg_scale, embedded_guidance, num_frames, .. } = requests[0];
        let told = |condition: Condition| {
            condition.with_embedded_guidance(embedded_guidance).with_frames(num_frames)
        };
        let condition = told(self.model.encode_prompts(&prompts)?);
        // diffusers takes less than 1 as off too.
        let is_off = cfg_scale < 1.0 && self.model.conventions().peer == Some(Peer::Diffusers);
        if cfg_scale == 1.0 || is_off {
            return Ok(Guidance::off(condition));
        }
        let negatives: Vec<String> = requests.iter().map(|request| request.negative_prompt.clone()).collect();
        let unconditional = Some(told(self.model.encode_negatives(&negatives)?));
        Ok(Guidance { condition, unconditional, cfg_scale })
    }

    /// `[B, C, H, W]`, one seed per sample.
    fn noise(&self, requests: &[Request]) -> Result<Tensor<4>, ModelError> {
        let [channels, height, width] = self.model.latent_shape(requests[0].extent())?;
        let shape = [1, channels, height, width];
        let dtype = self.model.dtype().into();
        let draw = |request: &Request| {
            let source = NoiseSource { rand_device: request.rand_device, dtype };
            source.latent_noise(request.seed, shape, &self.device)
        };
        Ok(Tensor::cat(requests.iter().map(draw).collect(), 0))
    }

    /// Where sampling starts: the noise, or the input pictures' latents noised to the first sigma.
    fn start(&self, requests: &[Request], noise: Tensor<4>, grid: &SigmaGrid) -> Tensor<4> {
        let inputs: Vec<&Picture> =
            requests.iter().filter_map(|request| request.input_image.as_ref()).collect();
        if inputs.is_empty() {
            return self.model.kept(self.model.start(noise, grid));
        }
        let Extent { frames, height, width } = requests[0].extent();
        let pixels =
            inputs.into_iter().flat_map(|picture| fitted(picture, Size { height, width }).to_pixels());
        let pixels = TensorData::new(pixels.collect(), [requests.len(), 3, height, width]);
        let pixels = Tensor::<4>::from_data(pixels, &self.device).repeat_dim(2, frames);
        let clean = self.model.encode_images(pixels, frames);
        let sigma = Tensor::full([requests.len()], grid.as_slice()[0], &self.device);
        self.model.kept(noisy(clean, noise, sigma))
    }

    /// Decodes what was drawn, sample by sample.
    fn pictures(&self, drawn: Drawn) -> Vec<Generated> {
        let last = drawn.states.last().expect("the final latents are always there").clone();
        let latents = self.model.finish(last, &drawn.grid);
        let pixels = self.model.decode_latents(latents.clone(), drawn.frames);
        let [_, _, rows, width] = pixels.dims();
        let values = crate::weights::values(pixels);
        let rounding = self.model.conventions().rounding;
        let pixels = values.chunks_exact(3 * rows * width);
        pixels
            .enumerate()
            .map(|(row, pixels)| Generated {
                frames: frames_of(pixels, [drawn.frames, rows / drawn.frames, width], rounding),
                noise: sample(&drawn.noise, row),
                sigmas: drawn.grid.clone(),
                trajectory: drawn.trajectory(row),
                latents: sample(&latents, row),
                condition: drawn.condition.row(row),
            })
            .collect()
    }
}

/// A batch after sampling.
struct Drawn {
    grid: SigmaGrid,
    noise: Tensor<4>,
    /// All states, or the last alone where no trajectory is kept.
    states: Vec<Tensor<4>>,
    frames: usize,
    condition: Condition,
}

impl Drawn {
    fn trajectory(&self, row: usize) -> Option<Tensor<4>> {
        let of_row = |state: &Tensor<4>| sample(state, row);
        (self.states.len() > 1).then(|| Tensor::cat(self.states.iter().map(of_row).collect(), 0))
    }
}

/// One of a batch, `[1, C, H, W]`.
fn sample(batch: &Tensor<4>, row: usize) -> Tensor<4> {
    batch.clone().narrow(0, row, 1)
}

/// The pictures of `[3, F · height, width]` numbers in [−1, 1].
fn frames_of(pixels: &[f32], [frames, height, width]: [usize; 3], rounding: Rounding) -> Vec<Picture> {
    let area = height * width;
    let of_frame = |frame: usize| {
        let channel = |channel: usize| &pixels[(channel * frames + frame) * area..][..area];
        Picture::from_pixels(&[0, 1, 2].map(channel).concat(), width, height, rounding)
    };
    (0..frames).map(of_frame).collect()
}

/// A picture as it is where it has the size, otherwise resized and cut.
fn fitted(picture: &Picture, size: Size) -> Picture {
    if picture.size() == size { picture.clone() } else { picture.crop_and_resize(size) }
}

/// Whether two requests can share a batch.
fn alike(a: &Request, b: &Request) -> bool {
    let sampling = |r: &Request| (r.num_inference_steps, r.cfg_scale.to_bits(), r.extent(), r.solver);
    let told = |r: &Request| r.embedded_guidance.map(f32::to_bits);
    let schedule = |r: &Request| (r.exponential_shift_mu.map(f64::to_bits), r.denoising_strength.to_bits());
    let kinds = |r: &Request| (r.input_image.is_some(), r.keep_trajectory);
    sampling(a) == sampling(b) && told(a) == told(b) && schedule(a) == schedule(b) && kinds(a) == kinds(b)
}
