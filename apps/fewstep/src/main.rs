//! `fewstep` makes diffusion models few-step. This file only dispatches.

use std::process::ExitCode;

use anyhow::Result;
use clap::ArgMatches;
use fewstep::args::{Cli, Command};
use fewstep::progress::Terminal;
use fewstep::{
    INTERRUPTED, WRONG_USAGE, demo, download, evaluate, generate, inspect, kernel_failure, lora, selftest,
    train, watch,
};
use fewstep_device::DeviceError;
use fewstep_train::TrainError;

#[global_allocator]
static ALLOCATOR: fewstep_kernels::TunedAllocator = fewstep_kernels::TunedAllocator;

fn main() -> ExitCode {
    outlive_file_limit();
    let (cli, matches) = Cli::parse();
    kernel_failure::caught(|| run(&cli, &matches)).unwrap_or_else(|error| fail(&error))
}

fn run(cli: &Cli, matches: &ArgMatches) -> Result<ExitCode> {
    let terminal = Terminal::new(false);
    match &cli.command {
        Command::Train(flags) => train::train(flags, matches),
        Command::Generate(flags) => generate::generate(flags, &terminal).map(|()| ExitCode::SUCCESS),
        Command::Evaluate(flags) => evaluate::run(flags, &terminal).map(|()| ExitCode::SUCCESS),
        Command::Download(flags) => download::run(flags, &terminal).map(|()| ExitCode::SUCCESS),
        Command::Demo(flags) => demo::run(flags, &terminal).map(|finished| match finished {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(INTERRUPTED),
        }),
        Command::Inspect(flags) => inspect::run(flags).map(|()| ExitCode::SUCCESS),
        Command::Watch(flags) => watch::run(flags),
        Command::Lora(flags) => lora::run(flags, &terminal).map(|()| ExitCode::SUCCESS),
        Command::Selftest(flags) => selftest::run(flags),
    }
}

/// A file that outgrows its limit (`ulimit -f`) shall be an error like a full disk, not the end of the process.
#[cfg(unix)]
fn outlive_file_limit() {
    use std::sync::{Arc, atomic::AtomicBool};
    // Where the signal cannot be taken it ends the process, which leaves every file as a kill does.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

#[cfg(not(unix))]
fn outlive_file_limit() {}

/// Prints an error with its causes; libraries put a `hint:` line last where one helps.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    let usage = error.downcast_ref::<TrainError>().is_some_and(TrainError::is_usage)
        || error.downcast_ref::<DeviceError>().is_some_and(DeviceError::is_usage);
    if usage { ExitCode::from(WRONG_USAGE) } else { ExitCode::FAILURE }
}
