//! The command line: subcommands, and flags that are accepted in kebab-case and snake_case.

use std::ffi::OsString;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::demo::DemoArgs;
use crate::download::DownloadArgs;
use crate::evaluate::EvaluateArgs;
use crate::generate::GenerateArgs;
use crate::inspect::InspectArgs;
use crate::lora::LoraArgs;
use crate::selftest::SelftestArgs;
use crate::train::TrainArgs;
use crate::watch::WatchArgs;

/// Makes diffusion models few-step
#[derive(Parser, Debug)]
#[command(version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train a model: a teacher on pictures (sft) or a few-step student (direct_distill)
    Train(Box<TrainArgs>),
    /// Draw pictures, and the data set that a student is trained on
    Generate(GenerateArgs),
    /// Compare teacher and students on prompts, in numbers and pictures
    Evaluate(EvaluateArgs),
    /// Fetch model files from Hugging Face or ModelScope
    Download(DownloadArgs),
    /// Make a small text-to-image model few-step on bundled data, from teacher pictures to a report
    Demo(DemoArgs),
    /// Tell what a file or folder is; for a model, the memory and time it takes
    Inspect(InspectArgs),
    /// Show a training run as a web page on this machine, while it goes on or later
    Watch(WatchArgs),
    /// Convert LoRA files, or fuse them into full weights
    Lora(LoraArgs),
    /// Compare every fused operation with its plain form on this machine, and tell how fast it is
    Selftest(SelftestArgs),
}

impl Cli {
    /// Parses the process's arguments; wrong usage ends the process with exit code 2.
    ///
    /// Also returns the matches of the subcommand, which know what stood on the command line.
    pub fn parse() -> (Self, ArgMatches) {
        let mut matches = Self::command().get_matches_from(kebab_case(std::env::args_os()));
        let cli = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let (_, subcommand) = matches.remove_subcommand().expect("clap requires a subcommand");
        (cli, subcommand)
    }
}

/// A subcommand's arguments with the defaults of its flags, given the required ones.
///
/// # Panics
/// If a required flag is not among `required`: that is a mistake in the calling code.
pub(crate) fn with_defaults<A: clap::Args>(required: &[(&str, OsString)]) -> A {
    let flags =
        required.iter().flat_map(|(name, value)| [OsString::from(format!("--{name}")), value.clone()]);
    let command = A::augment_args(clap::Command::new("defaults").no_binary_name(true));
    let parsed = command.try_get_matches_from(flags).and_then(|matches| A::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| panic!("required flags of a subcommand: {error}"))
}

/// Writes the names of long flags with hyphens; values stay as they are.
fn kebab_case(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut flags = true;
    arguments
        .map(|argument| {
            flags &= argument != "--";
            match argument.to_str() {
                Some(text) if flags && text.starts_with("--") => flag_in_kebab_case(text).into(),
                _ => argument,
            }
        })
        .collect()
}

fn flag_in_kebab_case(flag: &str) -> String {
    match flag.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")),
        None => flag.replace('_', "-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snake_case_flags_become_kebab_case_and_values_stay() {
        let given = ["fewstep", "train", "--batch_size", "a_b", "--output_path=my_run", "--", "--x_y"];
        let found = kebab_case(given.iter().map(OsString::from));
        assert_eq!(found, ["fewstep", "train", "--batch-size", "a_b", "--output-path=my_run", "--", "--x_y"]);
    }

    #[test]
    fn every_flag_is_well_formed() {
        Cli::command().debug_assert();
    }
}
