//! `fewstep evaluate`: teacher and students side by side, in numbers and pictures.
//!
//! Every model draws the same prompts from the same noise. Paired errors and the distance to the
//! teacher's pictures say how well a student imitates; the distance to real pictures and prompt
//! retrieval say how good its pictures are by themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fewstep_data::image::Picture;
use fewstep_data::metadata::{CaptionedRow, Media, Metadata, RandDevice};
use fewstep_data::video::{Clip, Video};
use fewstep_models::conventions::name_of;
use fewstep_models::{
    DTYPES, Extent, Model, ModelSource, Pipeline, Request, Student as TrainedStudent, lora,
};
use fewstep_report::{
    Chart, Curve, Features, Grid, GridRow, Judge, Report, Row, Stage, kid, latent_mse, psnr_db, retrieval,
};

use crate::args::with_defaults;
use crate::conventions::LoadArgs;
use crate::drawing_memory;
use crate::model_args::ModelArgs;
use crate::parse::{Student, guidance, student};
use crate::progress::Progress;
use crate::student::{Asked, Found, Settings};

/// Flags of `evaluate`.
#[derive(Args, Clone, Debug)]
pub struct EvaluateArgs {
    /// The teacher.
    #[command(flatten)]
    pub model: ModelArgs,
    /// A student, NAME=PATH: a LoRA of the teacher (a file) or a full model (a folder); may be given several times
    #[arg(long, value_parser = student)]
    pub student: Vec<Student>,
    /// Metadata (csv, json, jsonl) of prompts to draw, with the real picture of each in the column `image`, or the real
    /// video in `video`
    #[arg(long)]
    pub dataset_metadata_path: PathBuf,
    /// Folder these columns are relative to [default: the metadata's folder]
    #[arg(long)]
    pub dataset_base_path: Option<PathBuf>,
    /// Use only the first so many prompts
    #[arg(long)]
    pub limit: Option<usize>,
    /// Pictures of each prompt, every one with a seed of its own
    #[arg(long, default_value_t = 1)]
    pub images_per_prompt: usize,
    /// Seed of the first picture; the next ones count up
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(..1 << 62))]
    pub seed: u64,
    /// Picture height in pixels
    #[arg(long)]
    pub height: usize,
    /// Picture width in pixels
    #[arg(long)]
    pub width: usize,
    /// Frames, with a model that draws videos 4n + 1 of them; videos are compared by their latents, and by the frame in the
    /// middle
    #[arg(long, default_value_t = 1)]
    pub num_frames: usize,
    /// Sampling steps of the teacher [default: the model's usual ones]
    #[arg(long)]
    pub teacher_num_inference_steps: Option<usize>,
    /// Guidance scale of the teacher [default: the model's usual one]
    #[arg(long, value_parser = guidance)]
    pub teacher_cfg_scale: Option<f32>,
    /// Sampling steps at which the undistilled model is shown [default: what the first student was trained for,
    /// where its file says so, otherwise 4]
    #[arg(long)]
    pub base_num_inference_steps: Option<usize>,
    /// Sampling steps at which each student is shown, separated by commas [default: what it was trained for, where its
    /// file says so, otherwise 1,2,4,8]
    #[arg(long, value_delimiter = ',')]
    pub student_num_inference_steps: Option<Vec<usize>>,
    /// Guidance scale of each student; 1 is off [default: what it was trained with, where its file says so, otherwise 1]
    #[arg(long)]
    pub student_cfg_scale: Option<f32>,
    /// Pictures drawn at once
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// The metric network's weights
    #[arg(long, default_value = "assets/judge/mobilenet_v2_features_bnfold_f16.safetensors")]
    pub judge: PathBuf,
    /// Prompts shown in the picture grid
    #[arg(long, default_value_t = 16)]
    pub shown: usize,
    /// Folder for report.json and report.html
    #[arg(long, alias = "output-path")]
    pub output: PathBuf,
    /// How all models compute.
    #[command(flatten)]
    pub load: LoadArgs,
}

impl EvaluateArgs {
    /// The flags' defaults for pictures of `height × width` pixels; students are still to be set.
    pub fn new(model: &Path, metadata: &Path, output: &Path, [height, width]: [usize; 2]) -> Self {
        with_defaults(&[
            ("model", model.into()),
            ("dataset-metadata-path", metadata.into()),
            ("output", output.into()),
            ("height", height.to_string().into()),
            ("width", width.to_string().into()),
        ])
    }

    fn extent(&self) -> Extent {
        Extent { frames: self.num_frames, height: self.height, width: self.width }
    }
}

/// One model with one sampler setting.
struct Contestant {
    name: String,
    model: Model,
    /// What its file tells of how it was trained.
    student: Option<TrainedStudent>,
    num_inference_steps: usize,
    cfg_scale: f32,
    /// The guidance scale that the denoiser is told; `None` leaves it to the model.
    embedded_guidance: Option<f32>,
}

/// What a contestant drew, one entry per picture.
struct Drawn {
    pictures: Vec<Picture>,
    /// All final latents, picture by picture.
    latents: Vec<f32>,
    features: Features,
    secs_per_image: f64,
}

/// What to draw, and the real pictures behind it.
struct Prompts {
    /// The prompt of each picture.
    texts: Vec<String>,
    /// Distinct real pictures.
    real: Vec<Picture>,
    /// For each picture the index of its real one.
    truth: Vec<usize>,
}

/// The subcommand: evaluates and prints the table and the report's path.
///
/// # Errors
/// As [`evaluate`].
pub fn run(args: &EvaluateArgs, progress: &dyn Progress) -> Result<()> {
    let report = evaluate(args, Vec::new(), progress)?;
    progress.say(&report.terminal_table());
    progress.say(&format!("report: {}", args.output.join(Report::HTML_FILE).display()));
    Ok(())
}

/// Draws, measures, and writes `report.json` and `report.html`; returns the report.
///
/// # Errors
/// If a model, the metadata or a picture cannot be read, or the report cannot be written.
pub fn evaluate(args: &EvaluateArgs, stages: Vec<Stage>, progress: &dyn Progress) -> Result<Report> {
    let start = Instant::now();
    let judge = Judge::load(&args.judge)?;
    let prompts = read_prompts(args)?;
    let source = args.model.resolve(progress)?;
    drawing_memory::check(&args.load, &source, (args.extent(), args.batch_size), prompts.texts.iter())?;
    let contestants = contestants(args, &source, progress)?;
    progress.start("evaluating", (contestants.len() * prompts.texts.len()) as u64);
    let mut drawn = Vec::new();
    for contestant in &contestants {
        progress.note(&contestant.name);
        drawn.push(draw(args, contestant, &prompts.texts, &judge, progress)?);
    }
    progress.finish();
    let real = judge.features(&prompts.real);
    let rows = contestants
        .iter()
        .zip(&drawn)
        .map(|(who, drawn_by)| row(who, drawn_by, &drawn[0], &real, &prompts.truth));
    let mut report = Report {
        title: "fewstep: teacher and students".into(),
        rows: rows.collect(),
        counts: BTreeMap::from([
            ("pictures".into(), prompts.texts.len() as u64),
            ("real_pictures".into(), prompts.real.len() as u64),
        ]),
        seeds: vec![args.seed, args.seed + prompts.texts.len() as u64 - 1],
        grids: vec![grid(args, &contestants, &drawn, &prompts)],
        charts: loss_charts(args)?,
        stages,
        notes: notes(args),
        ..Report::default()
    };
    report.stages.push(Stage { name: "evaluation".into(), secs: start.elapsed().as_secs_f64() });
    report.summary = summary(&report.rows);
    std::fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    report.write_json(&args.output.join(Report::JSON_FILE))?;
    report.write_html(&args.output.join(Report::HTML_FILE))?;
    Ok(report)
}

fn read_prompts(args: &EvaluateArgs) -> Result<Prompts> {
    ensure!(args.images_per_prompt > 0, "--images-per-prompt 0, expected 1 or more");
    let metadata = Metadata::read(&args.dataset_metadata_path)?;
    let folder = args.dataset_metadata_path.parent().unwrap_or(Path::new("."));
    let base = args.dataset_base_path.as_deref().unwrap_or(folder);
    let mut prompts = Prompts { texts: Vec::new(), real: Vec::new(), truth: Vec::new() };
    let mut index_of: BTreeMap<String, usize> = BTreeMap::new();
    for row in metadata.rows.iter().take(args.limit.unwrap_or(usize::MAX)) {
        let CaptionedRow { file, prompt, .. } = row.captioned()?;
        let next = index_of.len();
        let index = *index_of.entry(file).or_insert(next);
        if index == next {
            prompts.real.push(shown(row.media_file(base)?, args.num_frames)?);
        }
        for _ in 0..args.images_per_prompt {
            prompts.texts.push(prompt.clone());
            prompts.truth.push(index);
        }
    }
    ensure!(!prompts.texts.is_empty(), "{}: no prompts", args.dataset_metadata_path.display());
    Ok(prompts)
}

/// A picture; of a video the frame in the middle of so many.
fn shown((media, path): (Media, PathBuf), num_frames: usize) -> Result<Picture> {
    if media == Media::Image {
        return Ok(Picture::load(&path)?);
    }
    let video = Video::load(&path, Clip { num_frames, ..Clip::WHOLE })?;
    Ok(video.frames()[video.frames().len() / 2].clone())
}

/// The teacher first, then the undistilled model in few steps, then every student at every step count.
fn contestants(
    args: &EvaluateArgs,
    source: &ModelSource,
    progress: &dyn Progress,
) -> Result<Vec<Contestant>> {
    let teacher = Model::from_pretrained(source, &args.load.options()?)?;
    let mut students = Vec::new();
    for student in &args.student {
        students.extend(contestants_of(args, student, (source, &teacher), progress)?);
    }
    let trained = students.first().and_then(|first| first.student.as_ref());
    let base = trained.map_or(USUAL_STEPS, |of| of.setting(args.extent()).num_inference_steps);
    let base = args.base_num_inference_steps.unwrap_or(base);
    let contestant = |name: &str, num_inference_steps, cfg_scale| Contestant {
        name: name.to_owned(),
        model: teacher.clone(),
        student: None,
        num_inference_steps,
        cfg_scale,
        embedded_guidance: None,
    };
    let usual = teacher.defaults();
    let guidance = args.teacher_cfg_scale.unwrap_or(usual.cfg_scale);
    let steps = args.teacher_num_inference_steps.unwrap_or(usual.num_inference_steps);
    let mut contestants = vec![contestant("teacher", steps, guidance), contestant("undistilled", base, 1.0)];
    if guidance != 1.0 {
        contestants.push(contestant("undistilled", base, guidance));
    }
    contestants.extend(students);
    Ok(contestants)
}

/// Steps of a student whose file does not tell, and of the undistilled model beside it.
const USUAL_STEPS: usize = 4;

/// One student at every step count, its own where the flags name none.
fn contestants_of(
    args: &EvaluateArgs,
    Student { name, path }: &Student,
    (source, teacher): (&ModelSource, &Model),
    progress: &dyn Progress,
) -> Result<Vec<Contestant>> {
    let model = load_student(args, source, teacher, path)?;
    let found = Found::at(path)?;
    let trained = found.as_ref().map(|found| found.student().setting(args.extent()));
    let steps = match (&args.student_num_inference_steps, trained) {
        (Some(steps), _) => steps.clone(),
        (None, Some(trained)) => vec![trained.num_inference_steps],
        (None, None) => vec![1, 2, USUAL_STEPS, 8],
    };
    let cfg_scale = args.student_cfg_scale.or(trained.map(|trained| trained.cfg_scale)).unwrap_or(1.0);
    let student = found.as_ref().map(|found| found.student().clone());
    let contestant = |num_inference_steps: &usize| Contestant {
        name: name.clone(),
        model: model.clone(),
        student: student.clone(),
        num_inference_steps: *num_inference_steps,
        cfg_scale,
        embedded_guidance: trained.and_then(|trained| trained.embedded_guidance),
    };
    let contestants: Vec<Contestant> = steps.iter().map(contestant).collect();
    if let Some(found) = found {
        tell(args, &found, &contestants, progress);
    }
    Ok(contestants)
}

/// Says what was taken from a student's file, and once what is not as it was trained.
fn tell(args: &EvaluateArgs, found: &Found, contestants: &[Contestant], progress: &dyn Progress) {
    let asked = Asked {
        num_inference_steps: args
            .student_num_inference_steps
            .as_ref()
            .and_then(|steps| steps.first().copied()),
        cfg_scale: args.student_cfg_scale,
        embedded_guidance: None,
        rand_device: Some(RandDevice::Cpu),
        exponential_shift_mu: None,
        solver: None,
        extent: args.extent(),
    };
    let trained = found.student().setting(asked.extent).num_inference_steps;
    // Among others a student is shown at its own steps: that is what the flag is for.
    let shown = contestants.iter().find(|who| who.num_inference_steps == trained).or(contestants.first());
    let warning = shown.and_then(|who| {
        let settings = Settings {
            num_inference_steps: who.num_inference_steps,
            cfg_scale: who.cfg_scale,
            embedded_guidance: who.embedded_guidance,
            rand_device: RandDevice::Cpu,
        };
        found.warning(&asked, &settings)
    });
    for line in found.taken(&asked).into_iter().chain(warning) {
        progress.say(&line);
    }
}

fn load_student(args: &EvaluateArgs, source: &ModelSource, teacher: &Model, path: &Path) -> Result<Model> {
    if path.is_dir() {
        return Ok(Model::from_pretrained(&path.into(), &args.load.options()?)?);
    }
    if !path.is_file() {
        bail!("{}: no such student\nhint: give a LoRA file (.safetensors) or a model folder", path.display());
    }
    lora::check_base(path, source)?;
    Ok(lora::load(teacher.clone(), path, 1.0)?)
}

fn draw(
    args: &EvaluateArgs,
    contestant: &Contestant,
    prompts: &[String],
    judge: &Judge,
    progress: &dyn Progress,
) -> Result<Drawn> {
    let mut pipeline = Pipeline::new(contestant.model.clone(), args.load.device.open()?);
    pipeline.student.clone_from(&contestant.student);
    let requests: Vec<Request> = prompts
        .iter()
        .zip(args.seed..)
        .map(|(prompt, seed)| Request {
            seed,
            num_inference_steps: contestant.num_inference_steps,
            cfg_scale: contestant.cfg_scale,
            embedded_guidance: contestant.embedded_guidance,
            num_frames: args.num_frames,
            ..Request::new(prompt, args.height, args.width)
        })
        .collect();
    let (mut pictures, mut latents, mut secs) = (Vec::new(), Vec::new(), 0.0);
    for batch in requests.chunks(args.batch_size.max(1)) {
        let start = Instant::now();
        for generated in pipeline.generate_batch(batch)? {
            pictures.push(generated.picture().clone());
            latents.extend(
                generated.latents.into_data().try_into_vec::<f32>().expect("samplers compute in f32"),
            );
        }
        secs += start.elapsed().as_secs_f64();
        progress.advance(batch.len() as u64);
    }
    let features = judge.features(&pictures);
    Ok(Drawn { secs_per_image: secs / pictures.len() as f64, pictures, latents, features })
}

fn row(who: &Contestant, drawn: &Drawn, teacher: &Drawn, real: &Features, truth: &[usize]) -> Row {
    let paired = !std::ptr::eq(drawn, teacher);
    let found = retrieval(&drawn.features, real, truth);
    Row {
        name: who.name.clone(),
        num_inference_steps: who.num_inference_steps,
        cfg_scale: f64::from(who.cfg_scale),
        latent_mse: paired.then(|| latent_mse(&drawn.latents, &teacher.latents)),
        psnr_db: paired.then(|| psnr_db(&drawn.pictures, &teacher.pictures)).flatten(),
        kid_teacher: paired.then(|| kid(&drawn.features, &teacher.features)).flatten(),
        kid_real: kid(&drawn.features, real),
        top1: found.map(|found| found.top1),
        top5: found.map(|found| found.top5),
        secs_per_image: Some(drawn.secs_per_image),
    }
}

fn grid(args: &EvaluateArgs, contestants: &[Contestant], drawn: &[Drawn], prompts: &Prompts) -> Grid {
    let column = |who: &Contestant| match who.cfg_scale {
        1.0 => format!("{}, {} steps", who.name, who.num_inference_steps),
        scale => format!("{}, {} steps, guidance {scale}", who.name, who.num_inference_steps),
    };
    // Spread over the prompts, so that the grid is no selection; odd, so that languages in turn both show.
    let stride = prompts.texts.len().div_ceil(args.shown.max(1)) | 1;
    let row = |index: usize| GridRow {
        prompt: prompts.texts[index].clone(),
        seed: Some(args.seed + index as u64),
        pictures: std::iter::once(&prompts.real[prompts.truth[index]])
            .chain(drawn.iter().map(|drawn| &drawn.pictures[index]))
            .map(|picture| Some(picture.clone()))
            .collect(),
    };
    Grid {
        title: "Same prompt, same noise".into(),
        columns: std::iter::once("real".to_owned()).chain(contestants.iter().map(column)).collect(),
        rows: (0..prompts.texts.len()).step_by(stride).map(row).collect(),
    }
}

/// The students' losses, from the `loss.csv` beside their weights.
fn loss_charts(args: &EvaluateArgs) -> Result<Vec<Chart>> {
    let mut curves = Vec::new();
    for Student { name, path } in &args.student {
        let log = path.parent().unwrap_or(Path::new(".")).join("loss.csv");
        if log.exists() {
            curves.push(Curve { name: name.clone(), points: read_losses(&log)? });
        }
    }
    if curves.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![Chart {
        title: "Distillation loss".into(),
        x_label: "step".into(),
        y_label: "mean squared error of the final latents".into(),
        log_y: true,
        smoothing: 5,
        curves,
    }])
}

fn read_losses(path: &Path) -> Result<Vec<(f64, f64)>> {
    let metadata = Metadata::read(path)?;
    let point = |row: &fewstep_data::metadata::Row| {
        let number = |column| -> Result<f64> {
            let text = row.text(column)?;
            text.parse()
                .with_context(|| format!("{}: {column} is {text:?}, expected a number", path.display()))
        };
        Ok((number("step")?, number("loss")?))
    };
    metadata.rows.iter().map(point).collect()
}

/// Says in words what the table shows about the students at the undistilled model's number of steps.
fn summary(rows: &[Row]) -> String {
    let undistilled: Vec<&Row> = rows.iter().filter(|row| row.name == "undistilled").collect();
    let Some(best) = undistilled.iter().filter_map(|row| row.latent_mse).reduce(f64::min) else {
        return String::new();
    };
    let steps = undistilled[0].num_inference_steps;
    let students = rows.iter().filter(|row| !["teacher", "undistilled"].contains(&row.name.as_str()));
    let mut sentences = vec![format!(
        "Each row of pictures has one prompt and one noise. The teacher takes {} steps with guidance; the \
         undistilled model is the same weights in {steps} steps.",
        rows[0].num_inference_steps
    )];
    for student in students.filter(|row| row.num_inference_steps == steps) {
        let Some(error) = student.latent_mse else { continue };
        sentences.push(format!(
            "{} in {steps} steps has {:.2} of the undistilled model's paired error.",
            student.name,
            error / best
        ));
    }
    sentences.join(" ")
}

fn notes(args: &EvaluateArgs) -> Vec<String> {
    vec![
        format!(
            "Seeds {} and up, one per picture; noise of torch's CPU generator; {} on the CPU.",
            args.seed,
            name_of(&DTYPES, args.load.dtype)
        ),
        "KID is the unbiased kernel distance of MobileNetV2 features at 128 px, a small negative value is noise \
         around zero. Retrieval looks for a picture's own real picture among those of all prompts."
            .into(),
        "PSNR and latent error compare with the teacher's picture of the same prompt and noise.".into(),
    ]
}
