//! `fewstep selftest`: every fused operation against its plain twin on this machine, the parts of a small model of every
//! family against what all twins together make of them, and how fast they are.
//!
//! It is what shows whether another CPU or GPU computes what it should. The twins run on the CPU by burn's own
//! operations, forward and backward. What it cannot show is whether a formula is right: `cargo test` compares with the
//! peers' numbers.

mod cases;
mod check;
mod models;
mod pictures;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use fewstep_device::DeviceName;
use fewstep_kernels::instructions;
use serde_json::{Value, json};

use crate::machine;
use check::{Check, Found};
use models::SmallModels;

/// Arguments of `fewstep selftest`.
#[derive(Args, Debug)]
pub struct SelftestArgs {
    /// Where operations and models run: cpu, cuda:N (an NVIDIA GPU) or wgpu, as far as the build has them
    #[arg(long, default_value = "cpu")]
    pub device: DeviceName,
    /// Times each of them is measured; medians are shown
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

/// Compares and times all operations and models; the exit code is 1 where one differs from its twin.
///
/// # Errors
/// If the device cannot be used, or small models cannot be written into the system's temporary folder.
pub fn run(args: &SelftestArgs) -> Result<ExitCode> {
    let device = args.device.open()?;
    let limits = Limits { flops: machine::measured_speed(), bytes: machine::measured_copy() };
    let models = SmallModels::written()?;
    let checks: Vec<Check> =
        cases::all(&device).into_iter().chain(pictures::all()).chain(models.checks()?).collect();
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
    let differing: Vec<&str> = checks
        .iter()
        .zip(&found)
        .filter(|(_, found)| !found.agrees())
        .map(|(check, _)| check.name.as_str())
        .collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&told(&checks, &found, limits))?);
    } else {
        println!("{}", verdict(&differing, checks.len()));
    }
    Ok(if differing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn heading(limits: Limits) -> String {
    format!(
        "on a CPU operations run in {}\n\
         a matrix product here does {:.1} GFLOP/s, a copy reads and writes {:.1} GB/s; per cent are of these\n\
         {:34}{:>24}{:>11}{:7}{:>13}{:7}{:>8}{:>11}",
        instructions(),
        limits.flops / 1e9,
        limits.bytes / 1e9,
        "what",
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
        let share = passes / secs * (check.flops / limits.flops).max(check.bytes / limits.bytes);
        let share = if share > 0.0 { format!("{:>5.0} %", 100.0 * share) } else { String::new() };
        format!("{:>8.2} ms{share:7}", 1e3 * secs)
    };
    let backward = found.backward_secs.map_or_else(String::new, |secs| speed(secs, check.backward_passes));
    format!(
        "{:34}{:>24}{}  {backward:18}{:>6.1} x{:>11.1e}{}",
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
        [] => format!("all {checked} agree with their twins"),
        names => {
            format!("{} of {checked} differ from their twins: {}", names.len(), names.join("; "))
        }
    }
}

/// What nobody has counted is null.
fn counted(rate: f64) -> Option<f64> {
    (rate > 0.0).then_some(rate)
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
            "gflops": counted(check.flops / found.forward_secs / 1e9),
            "gbytes_per_sec": counted(check.bytes / found.forward_secs / 1e9),
        })
    };
    json!({
        "instructions": instructions(),
        "agrees": found.iter().all(Found::agrees),
        "peak_gflops": limits.flops / 1e9,
        "peak_gbytes_per_sec": limits.bytes / 1e9,
        "checks": checks.iter().zip(found).map(operation).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn every_operation_agrees_with_its_twin_on_this_machine() {
        for check in cases::all(&Device::flex()).into_iter().chain(pictures::all()) {
            let found = check.run(&Device::flex(), 1);
            assert!(found.agrees(), "{}: {found:?}", check.name);
        }
    }
}
