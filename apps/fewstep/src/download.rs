//! `fewstep download`: fetches model files into the folder of models.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use fewstep_hub::{Event, Hub, Need, Origin, Settings, Source};

use crate::model_args::parse_origins;
use crate::parse::hub_source;
use crate::progress::Progress;

/// Flags of `download`.
#[derive(Args, Clone, Debug)]
pub struct DownloadArgs {
    /// Repository, OWNER/NAME
    #[arg(long, required_unless_present = "model_id_with_origin_paths")]
    pub model_id: Option<String>,
    /// Files of --model-id, such as `vae/*.safetensors` or `tokenizer/`; may be given several times [default: all]
    #[arg(long, requires = "model_id")]
    pub pattern: Vec<String>,
    /// Weight files as `train` takes them, OWNER/NAME:PATTERN, separated by commas; configs and tokenizer come along
    #[arg(long, value_name = "LIST", conflicts_with = "model_id")]
    pub model_id_with_origin_paths: Option<String>,
    /// Where from and where to.
    #[command(flatten)]
    pub place: Place,
}

/// Where from and where to; environment variables say it where the flags do not.
#[derive(Args, Clone, Debug, Default)]
pub struct Place {
    /// huggingface or modelscope [default: FEWSTEP_DOWNLOAD_SOURCE, DIFFSYNTH_DOWNLOAD_SOURCE, modelscope]
    #[arg(long, value_parser = hub_source)]
    pub source: Option<Source>,
    /// Folder of models; files go to DIR/OWNER/NAME [default: FEWSTEP_MODEL_BASE_PATH, DIFFSYNTH_MODEL_BASE_PATH,
    /// ./models]
    #[arg(long, value_name = "DIR")]
    pub local_dir: Option<PathBuf>,
}

/// The subcommand: downloads and says where the files are.
///
/// # Errors
/// If a flag is unusable or a file cannot be downloaded.
pub fn run(args: &DownloadArgs, progress: &dyn Progress) -> Result<()> {
    let origins = origins(args)?;
    let files = fetch(&origins, Some(&args.place), progress)?;
    for (origin, files) in origins.iter().zip(&files).filter(|(origin, _)| origin.need == Need::Required) {
        progress.say(&format!("{}:{}", origin.model_id, origin.pattern));
        for file in files {
            progress.say(&format!("  {}", file.display()));
        }
    }
    Ok(())
}

/// Downloads what is missing of each origin; returns the local files, one group per origin.
///
/// # Errors
/// If the environment is unusable or a file cannot be downloaded.
pub fn fetch(
    origins: &[Origin],
    place: Option<&Place>,
    progress: &dyn Progress,
) -> Result<Vec<Vec<PathBuf>>> {
    let hub = hub(place)?;
    let plan = hub.plan(origins)?;
    if plan.missing_bytes() > 0 {
        progress.start_bytes("downloading", plan.missing_bytes());
    }
    let done = hub.download(&plan, &mut |event| show(&event, progress));
    progress.finish();
    done?;
    Ok((0..origins.len()).map(|index| plan.paths(index).map(PathBuf::from).collect()).collect())
}

/// The files of each origin that are not there yet, with the bytes that are missing.
///
/// # Errors
/// If the environment is unusable, or the service cannot be asked for its files.
pub fn missing(origins: &[Origin]) -> Result<Vec<(PathBuf, u64)>> {
    Ok(hub(None)?.plan(origins)?.missing().map(|(path, bytes)| (path.to_owned(), bytes)).collect())
}

fn hub(place: Option<&Place>) -> Result<Hub> {
    let place = place.cloned().unwrap_or_default();
    let mut settings = Settings::from_env(place.source)?;
    settings.base_folder = place.local_dir.unwrap_or(settings.base_folder);
    Ok(Hub::new(settings))
}

fn show(event: &Event, progress: &dyn Progress) {
    match event {
        Event::File(path) => {
            progress.note(&path.file_name().unwrap_or_default().to_string_lossy());
        }
        Event::Received(bytes) => progress.advance(*bytes),
        Event::Retrying(error) => {
            let reason = error.to_string();
            progress.say(&format!("{}; trying again", reason.lines().next().unwrap_or_default()));
        }
    }
}

fn origins(args: &DownloadArgs) -> Result<Vec<Origin>> {
    let Some(model_id) = &args.model_id else {
        let list = args.model_id_with_origin_paths.as_deref().unwrap_or_default();
        let origins = parse_origins(list)?;
        ensure!(!origins.is_empty(), "--model-id-with-origin-paths names no files");
        return Ok(origins);
    };
    let all = [String::new()];
    let patterns = if args.pattern.is_empty() { &all[..] } else { &args.pattern };
    Ok(patterns
        .iter()
        .map(|pattern| Origin::new(model_id, pattern, Need::Required))
        .collect::<Result<_, _>>()?)
}
