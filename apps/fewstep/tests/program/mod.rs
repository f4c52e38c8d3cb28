//! Running the program from a test.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.
#![allow(dead_code)] // Not every test binary needs all of it.

use std::process::{Command, Output};

fn fewstep(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fewstep")).args(args).output().unwrap()
}

/// Runs and expects success; returns what was said.
pub(crate) fn run(args: &[&str]) -> String {
    let output = fewstep(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "fewstep {}: {text}", args.join(" "));
    text
}

/// Runs and expects this exit code; returns what was said.
pub(crate) fn fails(args: &[&str], code: i32) -> String {
    let output = fewstep(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "fewstep {}: {text}", args.join(" "));
    text
}

/// The weights of the metric network, wherever the test runs.
pub(crate) fn judge() -> String {
    format!("{}/../../assets/judge/{}", env!("CARGO_MANIFEST_DIR"), fewstep_report::Judge::FILE)
}

/// A command line as the functions here take it.
pub(crate) fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}
