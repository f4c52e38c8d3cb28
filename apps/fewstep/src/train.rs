//! `fewstep train`: runs or continues the run that a recipe describes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{ArgMatches, Args};
use fewstep_models::WeightType;
use fewstep_train::recipe::PeerFlags;
use fewstep_train::{Context, Outcome, Recipe};

use crate::interrupt::Interrupts;
use crate::model_args::ModelArgs;
use crate::progress::{Terminal, TrainProgress};
use crate::{INTERRUPTED, dry_run};

/// Flags of `train`.
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// Recipe file (TOML); flags win over it
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(long, help_heading = "Run")]
    quiet: bool,
    /// Check everything and tell what the run would do, take and write; start nothing and write nothing. Exit code 0
    /// where it would start, 1 where not
    #[arg(long, help_heading = "Run")]
    dry_run: bool,
    /// With --dry-run: print JSON
    #[arg(long, requires = "dry_run", help_heading = "Run")]
    json: bool,
    #[command(flatten)]
    recipe: Recipe,
    #[command(flatten)]
    unsupported: PeerFlags,
}

/// Trains until the recipe's last step or Ctrl-C.
///
/// # Errors
/// As [`fewstep_train::run`].
pub fn train(flags: &TrainArgs, matches: &ArgMatches) -> Result<ExitCode> {
    flags.unsupported.check()?;
    let recipe = flags.recipe.resolve(matches, flags.config.as_deref())?;
    let device = recipe.device.open_for(WeightType::from(recipe.dtype).dtype())?;
    let mut progress = TrainProgress::new(flags.quiet);
    for note in recipe.notes() {
        progress.say(note);
    }
    if flags.dry_run {
        let starts = dry_run::run(&recipe, &model_args(&recipe), &device, flags.json)?;
        return Ok(if starts { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let interrupts = Interrupts::take()?;
    let model = model_args(&recipe).resolve(&Terminal::new(false))?;
    dry_run::check_memory(&recipe, &model, &device)?;
    let outcome = interrupts.during(|stop| {
        let context = Context { model: Some(model), device, stop, version: &version() };
        fewstep_train::run(&recipe, context, &mut progress)
    });
    progress.finish();
    match outcome? {
        Outcome::Finished(path) => {
            progress.say(&format!("finished: {}", path.display()));
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped(step) => {
            progress.say(&format!("stopped after step {step}; the same command continues"));
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

/// The flags of the model a recipe names.
fn model_args(recipe: &Recipe) -> ModelArgs {
    let files = recipe.model_paths.is_some() || recipe.model_id_with_origin_paths.is_some();
    ModelArgs {
        model: (!files).then(|| recipe.model.clone()),
        model_paths: recipe.model_paths.clone(),
        model_id_with_origin_paths: recipe.model_id_with_origin_paths.clone(),
        tokenizer_path: recipe.tokenizer_path.clone(),
    }
}

/// Program, version and, where the build was told, commit.
pub fn version() -> String {
    let commit = option_env!("FEWSTEP_COMMIT").map_or(String::new(), |commit| format!(", commit {commit}"));
    format!("fewstep {}{commit}", env!("CARGO_PKG_VERSION"))
}
