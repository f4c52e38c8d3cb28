//! `fewstep generate`: draws pictures or videos and writes them as a data set that `train` reads.
//!
//! Next to each picture its final latents and text states are kept, so that distillation needs neither
//! the VAE, nor the text encoder, nor the picture's round trip through 8 bits.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Tensor;
use clap::Args;
use fewstep_data::image::Picture;
use fewstep_data::metadata::{DistillRow, Media, RandDevice, write_distill_csv};
use fewstep_data::provenance::{InputImage, Provenance};
use fewstep_data::video::Video;
use fewstep_flow::Solver;
use fewstep_models::conventions::{SOLVERS, name_of};
use fewstep_models::student::noise_generator;
use fewstep_models::{
    Components, DTYPES, Extent, Generated, LoadOptions, LoraFile, Model, ModelSource, Pipeline,
    PipelineOptions, Request, WeightType, save_tensors, weights_hash,
};
use sha2::{Digest, Sha256};

use crate::args::with_defaults;
use crate::conventions::LoadArgs;
use crate::drawing_memory;
use crate::model_args::ModelArgs;
use crate::parse::{guidance, lora_file, solver};
use crate::progress::Progress;
use crate::prompts::{PromptRow, read_prompts};
use crate::student::{Asked, Found, Settings};

/// Flags of `generate`.
#[derive(Args, Clone, Debug)]
pub struct GenerateArgs {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder to write to; a run that was interrupted there is continued
    #[arg(long, alias = "output-path")]
    pub output: PathBuf,
    /// What to draw; may be given several times
    #[arg(long)]
    pub prompt: Vec<String>,
    /// More prompts: a text file with one per line, or a metadata file (csv, json, jsonl) with a column `prompt`,
    /// whose columns `seed` and `negative_prompt`, where it has them, win over the flags
    #[arg(long)]
    pub prompts: Option<PathBuf>,
    /// Use only the first so many prompts
    #[arg(long)]
    pub limit: Option<usize>,
    /// What guidance pushes away from
    #[arg(long, default_value = "")]
    pub negative_prompt: String,
    /// Seed of the first picture; the next ones count up
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// The torch generator that draws the noise, cpu or cuda; both are computed here [default: the student's, where
    /// the weights are one's, otherwise cpu]
    #[arg(long)]
    pub rand_device: Option<RandDevice>,
    /// Pictures per prompt, each with a seed of its own
    #[arg(long, default_value_t = 1)]
    pub images_per_prompt: usize,
    /// Sampling steps [default: what a student was trained for, otherwise the model's usual ones]
    #[arg(long)]
    pub num_inference_steps: Option<usize>,
    /// Guidance scale; 1 is off [default: what a student was trained with, otherwise the model's usual one]
    #[arg(long, value_parser = guidance)]
    pub cfg_scale: Option<f32>,
    /// Guidance scale that the denoiser is told, where it was distilled to follow one [default: what a student was trained
    /// with, otherwise the model's usual one]
    #[arg(long, value_parser = guidance)]
    pub embedded_guidance: Option<f32>,
    /// Integrator: euler, heun, ddim, plms (PNDM's), plms-angular or unipc [default: euler; of models whose scheduler is
    /// DDIM, PNDM or UniPC, that scheduler's; a few-step student is trained and drawn with euler]
    #[arg(long, value_parser = solver)]
    pub solver: Option<Solver>,
    /// Picture height in pixels
    #[arg(long)]
    pub height: usize,
    /// Picture width in pixels
    #[arg(long)]
    pub width: usize,
    /// Frames, with a model that draws videos 4n + 1 of them; 1 is a picture
    #[arg(long, default_value_t = 1)]
    pub num_frames: usize,
    /// Shift of the schedule, the logarithm mu of its factor [default: a student's own sigma grid, otherwise the
    /// model's for the picture size]
    #[arg(long, value_name = "MU")]
    pub exponential_shift_mu: Option<f64>,
    /// Picture to start from, of which each frame of a video begins as a copy; another size is resized and cut in the middle
    #[arg(long, value_name = "FILE")]
    pub input_image: Option<PathBuf>,
    /// How much of the input picture is drawn anew, from 0 (nothing) to 1
    #[arg(long, default_value_t = 1.0)]
    pub denoising_strength: f64,
    /// Store noise, sigmas and every state beside the final latents in latents/
    #[arg(long)]
    pub save_latents: bool,
    /// Pictures drawn at once
    #[arg(long, default_value_t = 8)]
    pub batch_size: usize,
    /// Adapter of the model, FILE or FILE:alpha
    #[arg(long, value_parser = lora_file)]
    pub lora: Option<LoraFile>,
    /// Sampling steps the student shall run: written to metadata.csv
    #[arg(long, default_value_t = 4)]
    pub student_num_inference_steps: usize,
    /// Guidance scale the student shall run with: written to metadata.csv
    #[arg(long, default_value_t = 1.0, value_parser = guidance)]
    pub student_cfg_scale: f32,
    /// Guidance scale that the student's denoiser shall be told, where it takes one: written to metadata.csv [default:
    /// that of these pictures]
    #[arg(long, value_parser = guidance)]
    pub student_embedded_guidance: Option<f32>,
    /// How the model computes.
    #[command(flatten)]
    pub load: LoadArgs,
}

impl GenerateArgs {
    /// The flags' defaults for pictures of `height × width` pixels; prompts are still to be set.
    pub fn new(model: &Path, output: &Path, [height, width]: [usize; 2]) -> Self {
        with_defaults(&[
            ("model", model.into()),
            ("output", output.into()),
            ("height", height.to_string().into()),
            ("width", width.to_string().into()),
        ])
    }

    fn extent(&self) -> Extent {
        Extent { frames: self.num_frames, height: self.height, width: self.width }
    }
}

/// Draws what the flags ask for. Pictures that are there already from the same run are kept.
///
/// # Errors
/// If a flag is unusable, the model cannot be loaded, the folder holds another run, or a file cannot be
/// written.
pub fn generate(args: &GenerateArgs, progress: &dyn Progress) -> Result<()> {
    let rows = prompt_rows(args)?;
    let source = args.model.resolve(progress)?;
    let requests = requests(args, &rows, drawn_with(args, &source, progress)?)?;
    let prompts = requests.iter().map(|request| &request.prompt);
    drawing_memory::check(&args.load, &source, (args.extent(), args.batch_size), prompts)?;
    let options = PipelineOptions { load: args.load.options()?, lora: args.lora.clone() };
    let pipeline = Pipeline::from_pretrained(source.clone(), options)?;
    for asked in [args.embedded_guidance, args.student_embedded_guidance] {
        pipeline.model.check_embedded_guidance(asked)?;
    }
    let provenance = provenance(args, &source, &pipeline, &requests)?;
    claim(args, &provenance)?;
    warn_of_long_prompts(&pipeline, &requests, progress)?;
    let indices: Vec<usize> = (0..requests.len()).collect();
    progress.start("generating", requests.len() as u64);
    for batch in indices.chunks(args.batch_size) {
        if !batch.iter().all(|index| is_done(args, *index)) {
            let generated = pipeline.generate_batch(&requests[batch[0]..batch[0] + batch.len()])?;
            for (index, generated) in batch.iter().zip(&generated) {
                save(args, *index, generated)?;
            }
        }
        progress.advance(batch.len() as u64);
    }
    progress.finish();
    let student_told = told(&pipeline, &requests[0]).map(|own| args.student_embedded_guidance.unwrap_or(own));
    let row = |(index, request)| DistillRow { embedded_guidance: student_told, ..row(args, index, request) };
    let rows: Vec<DistillRow> = requests.iter().enumerate().map(row).collect();
    Ok(write_distill_csv(&args.output.join("metadata.csv"), &rows)?)
}

/// The flags' settings, and where they leave some open a student's; says which, and what is not as it was trained.
fn drawn_with(args: &GenerateArgs, source: &ModelSource, progress: &dyn Progress) -> Result<Settings> {
    let asked = Asked {
        num_inference_steps: args.num_inference_steps,
        cfg_scale: args.cfg_scale,
        embedded_guidance: args.embedded_guidance,
        rand_device: args.rand_device,
        exponential_shift_mu: args.exponential_shift_mu,
        solver: args.solver,
        extent: args.extent(),
    };
    let options = LoadOptions { components: Components::Denoiser, ..args.load.options()? };
    let usual = Model::outline(source, &options)?.defaults();
    let Some(found) = Found::new(source, args.lora.as_ref())? else {
        return Ok(asked.settings(None, usual));
    };
    let settings = asked.settings(Some(found.student()), usual);
    for line in found.taken(&asked).into_iter().chain(found.warning(&asked, &settings)) {
        progress.say(&line);
    }
    Ok(settings)
}

/// One request per picture: every prompt `images_per_prompt` times, seeds counting up from the flag's, or from the
/// row's own.
fn requests(args: &GenerateArgs, rows: &[PromptRow], drawn_with: Settings) -> Result<Vec<Request>> {
    ensure!(args.batch_size > 0, "--batch-size 0, expected 1 or more");
    ensure!(args.images_per_prompt > 0, "--images-per-prompt 0, expected 1 or more");
    let settings = settings(args, drawn_with)?;
    let request = |(index, (row, copy)): (usize, (&PromptRow, usize))| Request {
        prompt: row.prompt.clone(),
        negative_prompt: row.negative_prompt.clone().unwrap_or_else(|| args.negative_prompt.clone()),
        seed: row.seed.map_or(args.seed.wrapping_add(index as u64), |seed| seed.wrapping_add(copy as u64)),
        ..settings.clone()
    };
    let copies = rows.iter().flat_map(|row| (0..args.images_per_prompt).map(move |copy| (row, copy)));
    Ok(copies.enumerate().map(request).collect())
}

/// The prompts of flags and file.
fn prompt_rows(args: &GenerateArgs) -> Result<Vec<PromptRow>> {
    let given = args.prompt.iter();
    let mut rows: Vec<PromptRow> =
        given.map(|prompt| PromptRow { prompt: prompt.clone(), ..PromptRow::default() }).collect();
    if let Some(path) = &args.prompts {
        rows.extend(read_prompts(path)?);
    }
    rows.truncate(args.limit.unwrap_or(usize::MAX));
    ensure!(!rows.is_empty(), "no prompts\nhint: give --prompt TEXT or --prompts FILE");
    Ok(rows)
}

/// What all pictures have in common.
fn settings(args: &GenerateArgs, drawn_with: Settings) -> Result<Request> {
    ensure!(
        args.input_image.is_some() || args.denoising_strength == 1.0,
        "--denoising-strength {} without a picture\nhint: give --input-image FILE",
        args.denoising_strength
    );
    Ok(Request {
        rand_device: drawn_with.rand_device,
        num_inference_steps: drawn_with.num_inference_steps,
        cfg_scale: drawn_with.cfg_scale,
        embedded_guidance: drawn_with.embedded_guidance,
        solver: args.solver,
        exponential_shift_mu: args.exponential_shift_mu,
        input_image: args.input_image.as_deref().map(Picture::load).transpose()?,
        denoising_strength: args.denoising_strength,
        keep_trajectory: args.save_latents,
        num_frames: args.num_frames,
        ..Request::new("", args.height, args.width)
    })
}

/// Says once which prompts the model does not read to their end.
fn warn_of_long_prompts(pipeline: &Pipeline, requests: &[Request], progress: &dyn Progress) -> Result<()> {
    let guided = requests.iter().filter(|request| request.cfg_scale != 1.0);
    let negatives = guided.map(|request| &request.negative_prompt);
    let texts: BTreeSet<&String> = requests.iter().map(|request| &request.prompt).chain(negatives).collect();
    let mut long = Vec::new();
    for text in texts {
        let length = pipeline.model.prompt_tokens(text)?;
        if length.is_cut() {
            long.push((text, length));
        }
    }
    if let Some((text, length)) = long.first() {
        progress.say(&format!(
            "warning: {} of the prompts are cut after {} tokens; {:?} has {}",
            long.len(),
            length.limit,
            text.chars().take(SHOWN_OF_PROMPT).chain(['…']).collect::<String>(),
            length.found
        ));
    }
    Ok(())
}

/// Characters of a prompt that name it in a message.
const SHOWN_OF_PROMPT: usize = 40;

/// The scale that the denoiser is told; `None` where it takes none.
fn told(pipeline: &Pipeline, request: &Request) -> Option<f32> {
    let usual = pipeline.model.defaults().embedded_guidance?;
    Some(request.embedded_guidance.unwrap_or(usual))
}

fn provenance(
    args: &GenerateArgs,
    source: &ModelSource,
    pipeline: &Pipeline,
    requests: &[Request],
) -> Result<Provenance> {
    let first = &requests[0];
    let student = pipeline.model.sigma_grid(args.student_num_inference_steps, args.extent());
    Ok(Provenance {
        teacher: source.to_string(),
        teacher_hash: weights_hash(source)?,
        lora: args.lora.as_ref().map(|lora| format!("{}:{}", lora.path.display(), lora.alpha)),
        num_inference_steps: first.num_inference_steps,
        cfg_scale: first.cfg_scale,
        embedded_guidance: told(pipeline, first),
        negative_prompt: args.negative_prompt.clone(),
        solver: name_of(&SOLVERS, pipeline.solver(first)).into(),
        sigmas: pipeline.grid(first)?.as_slice().to_vec(),
        student_num_inference_steps: args.student_num_inference_steps,
        student_cfg_scale: args.student_cfg_scale,
        student_sigmas: student?.as_slice().to_vec(),
        noise_generator: noise_generator(first.rand_device).into(),
        dtype: name_of(&DTYPES, args.load.dtype).into(),
        conventions: pipeline.model.conventions().record(),
        exponential_shift_mu: args.exponential_shift_mu,
        input_image: first.input_image.as_ref().map(|picture| InputImage {
            hash: hex(Sha256::digest(&picture.rgb)),
            denoising_strength: args.denoising_strength,
        }),
        saves_latents: args.save_latents,
        height: args.height,
        width: args.width,
        num_frames: args.extent().num_frames(),
        batch_size: args.batch_size,
        requests_hash: requests_hash(args, requests),
    })
}

/// A negative prompt that is the flag's is not hashed: data sets of before had no other.
fn requests_hash(args: &GenerateArgs, requests: &[Request]) -> String {
    let mut hash = Sha256::new();
    for request in requests {
        hash.update(format!("{}\0{}\0", request.seed, request.prompt));
        if request.negative_prompt != args.negative_prompt {
            hash.update(format!("{}\0\0", request.negative_prompt));
        }
    }
    hex(hash.finalize())
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the folder this run's, or checks that it already is.
fn claim(args: &GenerateArgs, provenance: &Provenance) -> Result<()> {
    let folder = &args.output;
    for part in [media_folder(args.num_frames), "latents"] {
        let path = folder.join(part);
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    }
    let Some(found) = Provenance::read(folder)? else { return Ok(provenance.write(folder)?) };
    let differences = provenance.differences(&found);
    if differences.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = differences
        .iter()
        .map(|(name, ours, theirs)| format!("{name} is {theirs} there, {ours} here"))
        .collect();
    bail!(
        "{}: the folder holds another run: {}\nhint: choose another --output, or repeat the command that began it",
        folder.display(),
        list.join("; ")
    )
}

fn media_folder(num_frames: usize) -> &'static str {
    if num_frames == 1 { "images" } else { "videos" }
}

/// A picture as png, or a video as lossless animation, which browsers show.
fn media_name(num_frames: usize, index: usize) -> String {
    let extension = if num_frames == 1 { "png" } else { "webp" };
    format!("{}/{index:06}.{extension}", media_folder(num_frames))
}

fn latents_path(folder: &Path, index: usize) -> PathBuf {
    folder.join(format!("latents/{index:06}.safetensors"))
}

/// Picture or video is written last, so its presence says that both files are complete.
fn is_done(args: &GenerateArgs, index: usize) -> bool {
    args.output.join(media_name(args.num_frames, index)).exists()
}

fn save(args: &GenerateArgs, index: usize, generated: &Generated) -> Result<()> {
    let latents = latents_path(&args.output, index);
    save_tensors(&latents, tensors(generated), WeightType::F32, &Default::default())?;
    let path = args.output.join(media_name(args.num_frames, index));
    match args.num_frames {
        1 => Ok(generated.save(path)?),
        _ => Ok(Video::new(generated.frames.clone(), None).save(&path)?),
    }
}

/// What `train` reads, and with a trajectory all of the run.
fn tensors(generated: &Generated) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut tensors = vec![
        entry("latents", generated.latents.clone().squeeze_dim::<3>(0)),
        entry("text", generated.condition.text.clone().squeeze_dim::<2>(0)),
    ];
    if let Some(pooled) = &generated.condition.pooled {
        tensors.push(entry("pooled", pooled.clone().squeeze_dim::<1>(0)));
    }
    if let Some(trajectory) = &generated.trajectory {
        let sigmas = generated.sigmas.as_slice().to_vec();
        tensors.push(entry("noise", generated.noise.clone().squeeze_dim::<3>(0)));
        tensors.push(entry("trajectory", trajectory.clone()));
        tensors.push(("sigmas".to_owned(), vec![sigmas.len()], sigmas));
    }
    tensors
}

fn entry<const D: usize>(name: &str, tensor: Tensor<D>) -> (String, Vec<usize>, Vec<f32>) {
    let shape = tensor.dims().to_vec();
    (name.to_owned(), shape, tensor.into_data().try_into_vec::<f32>().expect("samplers compute in f32"))
}

fn row(args: &GenerateArgs, index: usize, request: &Request) -> DistillRow {
    DistillRow {
        media: if args.num_frames == 1 { Media::Image } else { Media::Video },
        file: media_name(args.num_frames, index),
        prompt: request.prompt.clone(),
        seed: request.seed,
        rand_device: request.rand_device,
        num_inference_steps: args.student_num_inference_steps,
        cfg_scale: args.student_cfg_scale,
        embedded_guidance: None,
        num_frames: None,
    }
}
