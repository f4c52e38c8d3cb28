//! `fewstep generate`: draws pictures and writes them as a data set that `train` reads.
//!
//! Next to each picture its final latents and text states are kept, so that distillation needs neither
//! the VAE, nor the text encoder, nor the picture's round trip through 8 bits.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fewstep_data::metadata::{DistillRow, Metadata, RandDevice, write_distill_csv};
use fewstep_data::provenance::{Provenance, TORCH_CPU};
use fewstep_flow::Solver;
use fewstep_models::{
    Generated, LoraFile, ModelSource, Pipeline, PipelineOptions, Request, WeightType, save_tensors,
    weights_hash,
};
use sha2::{Digest, Sha256};

use crate::args::with_defaults;
use crate::model_args::ModelArgs;
use crate::parse::{lora_file, solver};
use crate::progress::Progress;

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
    /// More prompts: a text file with one per line, or a metadata file (csv, json, jsonl) with a column `prompt`
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
    /// Pictures per prompt, each with a seed of its own
    #[arg(long, default_value_t = 1)]
    pub images_per_prompt: usize,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    pub num_inference_steps: usize,
    /// Guidance scale; 1 is off
    #[arg(long, default_value_t = 4.0)]
    pub cfg_scale: f32,
    /// Integrator: euler or heun
    #[arg(long, default_value = "euler", value_parser = solver)]
    pub solver: Solver,
    /// Picture height in pixels
    #[arg(long)]
    pub height: usize,
    /// Picture width in pixels
    #[arg(long)]
    pub width: usize,
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
    #[arg(long, default_value_t = 1.0)]
    pub student_cfg_scale: f32,
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
}

/// Draws what the flags ask for. Pictures that are there already from the same run are kept.
///
/// # Errors
/// If a flag is unusable, the model cannot be loaded, the folder holds another run, or a file cannot be
/// written.
pub fn generate(args: &GenerateArgs, progress: &dyn Progress) -> Result<()> {
    let requests = requests(args)?;
    let options = PipelineOptions { lora: args.lora.clone(), ..PipelineOptions::default() };
    let source = args.model.resolve(progress)?;
    let pipeline = Pipeline::from_pretrained(source.clone(), options)?;
    let provenance = provenance(args, &source, &pipeline, &requests)?;
    claim(&args.output, &provenance)?;
    let indices: Vec<usize> = (0..requests.len()).collect();
    progress.start("generating", requests.len() as u64);
    for batch in indices.chunks(args.batch_size) {
        if !batch.iter().all(|index| is_done(&args.output, *index)) {
            let generated = pipeline.generate_batch(&requests[batch[0]..batch[0] + batch.len()])?;
            for (index, generated) in batch.iter().zip(&generated) {
                save(&args.output, *index, generated)?;
            }
        }
        progress.advance(batch.len() as u64);
    }
    progress.finish();
    let rows: Vec<DistillRow> =
        requests.iter().enumerate().map(|(index, request)| row(args, index, request)).collect();
    Ok(write_distill_csv(&args.output.join("metadata.csv"), &rows)?)
}

/// Reads prompts from a text file, one per line, or from a metadata file's column `prompt`.
///
/// # Errors
/// If the file cannot be read or holds no prompt.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let prompts = if path.extension().is_some_and(|extension| extension == "txt") {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        text.lines().map(str::to_owned).collect()
    } else {
        let metadata = Metadata::read(path)?;
        let rows = metadata.rows.iter().map(|row| Ok(row.text("prompt")?.to_owned()));
        rows.collect::<Result<Vec<String>>>()?
    };
    ensure!(!prompts.is_empty(), "{}: no prompts", path.display());
    Ok(prompts)
}

/// One request per picture: every prompt `images_per_prompt` times, seeds counting up.
fn requests(args: &GenerateArgs) -> Result<Vec<Request>> {
    ensure!(args.batch_size > 0, "--batch-size 0, expected 1 or more");
    ensure!(args.images_per_prompt > 0, "--images-per-prompt 0, expected 1 or more");
    let mut prompts = args.prompt.clone();
    if let Some(path) = &args.prompts {
        prompts.extend(read_prompts(path)?);
    }
    prompts.truncate(args.limit.unwrap_or(usize::MAX));
    ensure!(!prompts.is_empty(), "no prompts\nhint: give --prompt TEXT or --prompts FILE");
    let repeated = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, args.images_per_prompt));
    let request = |(index, prompt): (usize, &String)| Request {
        prompt: prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        seed: args.seed + index as u64,
        num_inference_steps: args.num_inference_steps,
        cfg_scale: args.cfg_scale,
        height: args.height,
        width: args.width,
        solver: args.solver,
    };
    Ok(repeated.enumerate().map(request).collect())
}

fn provenance(
    args: &GenerateArgs,
    source: &ModelSource,
    pipeline: &Pipeline,
    requests: &[Request],
) -> Result<Provenance> {
    pipeline.model.latent_shape(args.height, args.width)?;
    let grid = |steps| pipeline.model.sigma_grid(steps, args.height, args.width);
    let mut hash = Sha256::new();
    for request in requests {
        hash.update(format!("{}\0{}\0", request.seed, request.prompt));
    }
    Ok(Provenance {
        teacher: source.to_string(),
        teacher_hash: weights_hash(source)?,
        lora: args.lora.as_ref().map(|lora| format!("{}:{}", lora.path.display(), lora.alpha)),
        num_inference_steps: args.num_inference_steps,
        cfg_scale: args.cfg_scale,
        negative_prompt: args.negative_prompt.clone(),
        solver: format!("{:?}", args.solver).to_lowercase(),
        sigmas: grid(args.num_inference_steps)?.as_slice().to_vec(),
        student_num_inference_steps: args.student_num_inference_steps,
        student_cfg_scale: args.student_cfg_scale,
        student_sigmas: grid(args.student_num_inference_steps)?.as_slice().to_vec(),
        noise_generator: TORCH_CPU.into(),
        dtype: "f32".into(),
        height: args.height,
        width: args.width,
        batch_size: args.batch_size,
        requests_hash: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// Makes the folder this run's, or checks that it already is.
fn claim(folder: &Path, provenance: &Provenance) -> Result<()> {
    for part in ["images", "latents"] {
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

fn image_name(index: usize) -> String {
    format!("images/{index:06}.png")
}

fn latents_path(folder: &Path, index: usize) -> PathBuf {
    folder.join(format!("latents/{index:06}.safetensors"))
}

/// The picture is written last, so its presence says that both files are complete.
fn is_done(folder: &Path, index: usize) -> bool {
    folder.join(image_name(index)).exists()
}

fn save(folder: &Path, index: usize, generated: &Generated) -> Result<()> {
    let latents = generated.latents.clone().squeeze_dim::<3>(0);
    let text = generated.condition.text.clone().squeeze_dim::<2>(0);
    let tensors = [
        ("latents".to_owned(), latents.dims().to_vec(), latents.into_data().try_into_vec::<f32>()),
        ("text".to_owned(), text.dims().to_vec(), text.into_data().try_into_vec::<f32>()),
    ];
    let tensors =
        tensors.map(|(name, shape, values)| (name, shape, values.expect("samplers compute in f32")));
    save_tensors(&latents_path(folder, index), tensors, WeightType::F32, &Default::default())?;
    Ok(generated.save(folder.join(image_name(index)))?)
}

fn row(args: &GenerateArgs, index: usize, request: &Request) -> DistillRow {
    DistillRow {
        image: image_name(index),
        prompt: request.prompt.clone(),
        seed: request.seed,
        rand_device: RandDevice::Cpu,
        num_inference_steps: args.student_num_inference_steps,
        cfg_scale: args.student_cfg_scale,
    }
}
