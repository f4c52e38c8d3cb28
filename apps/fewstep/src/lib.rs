//! The subcommands of `fewstep` as functions, for programs that want whole steps of the way rather than
//! the parts in the other crates.

pub mod args;
pub mod conventions;
pub mod demo;
pub mod download;
mod drawing_memory;
pub mod dry_run;
pub mod evaluate;
pub mod generate;
pub mod inspect;
pub mod interrupt;
pub mod kernel_failure;
pub mod lora;
pub mod machine;
pub mod model_args;
pub mod parse;
pub mod progress;
pub mod prompts;
pub mod selftest;
pub mod student;
pub mod train;
pub mod watch;

/// Exit code of a run that a signal stopped, as shells report SIGINT.
pub const INTERRUPTED: u8 = 130;
/// Exit code of wrong usage, as clap's.
pub const WRONG_USAGE: u8 = 2;
