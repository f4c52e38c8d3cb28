//! `fewstep selftest`: every fused operation against its plain twin on this machine, and how fast it is.
//!
//! It is what shows whether another CPU or GPU computes what it should. The twins run on the CPU by burn's own
//! operations, forward and backward, at the sizes of a small transformer's training step. Whole models are left out:
//! `cargo test` compares them with the peers' numbers.

mod cases;
mod check;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use fewstep_train::recipe::Compute;
use serde_json::{Value, json};

use crate::machine;
use crate::train::device;
use check::{Check, Found};

/// Arguments of `fewstep selftest`.
#[derive(Args, Debug)]
pub struct SelftestArgs {
    /// Where the operations run
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: Compute,
    /// Times each operation is measured; medians are shown
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    pub runs: u16,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What the machine does at best.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Floating point operations per second, of a large matrix product.
    flops: f64,
    /// Bytes read and written per second, of a large copy.
    bytes: f64,
}

/// Compares and times all operations; the exit code is 1 where one differs from its twin.
///
/// # Errors
/// If the device cannot be used.
pub fn run(args: &SelftestArgs) -> Result<ExitCode> {
    let device = device(args.device)?;
    let limits = Limits { flops: machine::measured_speed(), bytes: machine::measured_copy() };
    let checks = cases::all();
    let mut found = Vec::with_capacity(checks.len());
    if !args.json {
        println!("{}", heading(limits));
    }
    for check in &checks {
        let result = check.run(&device, args.runs.into());
        if !args.json {
            println!("{}", line(check, &result, limits));
        }
        found.push(result);
    }
    let differing: Vec<&str> =
        checks.iter().zip(&found).filter(|(_, found)| !found.agrees()).map(|(check, _)| check.name).collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&told(&checks, &found, limits))?);
    } else {
        println!("{}", verdict(&differing, checks.len()));
    }
    Ok(if differing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn heading(limits: Limits) -> String {
    format!(
        "a matrix product here does {:.1} GFLOP/s, a copy reads and writes {:.1} GB/s; per cent are of these\n\
         {:28}{:>24}{:>10}{:>8}{:>9}{:>10}{:>9}{:>11}",
        limits.flops / 1e9,
        limits.bytes / 1e9,
        "operation",
        "size",
        "forward",
        "",
        "backward",
        "",
        "twin",
        "difference"
    )
}

fn line(check: &Check, found: &Found, limits: Limits) -> String {
    let speed = |secs: f64, passes: f64| {
        let share = if check.flops > 0.0 {
            passes * check.flops / secs / limits.flops
        } else {
            passes * check.bytes / secs / limits.bytes
        };
        format!("{:>7.2} ms{:>5.0} %", 1e3 * secs, 100.0 * share)
    };
    let backward = found.backward_secs.map_or_else(String::new, |secs| speed(secs, check.backward_passes));
    format!(
        "{:28}{:>24}{}  {backward:16}{:>6.1} x{:>11.1e}{}",
        check.name,
        check.size,
        speed(found.forward_secs, 1.0),
        found.twin_secs / found.forward_secs,
        found.difference,
        if found.agrees() { "" } else { "  DIFFERS" }
    )
}

fn verdict(differing: &[&str], checked: usize) -> String {
    match differing {
        [] => format!("all {checked} operations agree with their twins"),
        names => {
            format!("{} of {checked} operations differ from their twins: {}", names.len(), names.join(", "))
        }
    }
}

fn told(checks: &[Check], found: &[Found], limits: Limits) -> Value {
    let operation = |(check, found): (&Check, &Found)| {
        json!({
            "name": check.name,
            "size": check.size,
            "agrees": found.agrees(),
            "difference": found.difference,
            "tolerance": found.tolerance,
            "forward_secs": found.forward_secs,
            "backward_secs": found.backward_secs,
            "twin_forward_secs": found.twin_secs,
            "gflops": check.flops / found.forward_secs / 1e9,
            "gbytes_per_sec": check.bytes / found.forward_secs / 1e9,
        })
    };
    json!({
        "agrees": found.iter().all(Found::agrees),
        "peak_gflops": limits.flops / 1e9,
        "peak_gbytes_per_sec": limits.bytes / 1e9,
        "operations": checks.iter().zip(found).map(operation).collect::<Vec<_>>(),
    })
}
