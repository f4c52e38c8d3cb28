//! How fast weights are read, converted to f32 and checked, from a file that is in the page cache.
//!
//! `cargo run --release -p fewstep-models --example read_speed [MEGABYTES]`

use std::collections::BTreeMap;
use std::time::Instant;

use fewstep_models::{ModelError, WeightFiles, WeightType, save_tensors};

/// Numbers of one tensor: a projection of the published transformer, 3072 × 12288.
const NUMBERS: usize = 3072 * 12288;
/// Of how many readings the fastest counts.
const READINGS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let megabytes: usize = std::env::args().nth(1).map_or(Ok(600), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    for (name, dtype) in [("f32", WeightType::F32), ("bf16", WeightType::BF16), ("f16", WeightType::F16)] {
        let path = folder.path().join(format!("{name}.safetensors"));
        let count = (megabytes << 20).div_ceil(NUMBERS * dtype.bytes());
        let values: Vec<f32> = (0..NUMBERS).map(|at| (at % 1000) as f32 * 1e-3 - 0.5).collect();
        let tensors = (0..count).map(|at| (format!("{at}"), vec![3072, 12288], values.clone()));
        save_tensors(&path, tensors, dtype, &BTreeMap::new())?;
        let secs = (0..READINGS).map(|_| read(&path)).collect::<Result<Vec<_>, ModelError>>()?;
        let fastest = secs.into_iter().fold(f64::MAX, f64::min);
        let gigabytes = std::fs::metadata(&path)?.len() as f64 / 1e9;
        println!("{name}: {:.2} GB/s ({gigabytes:.2} GB in {fastest:.3} s)", gigabytes / fastest);
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Reads every tensor of a file; returns the seconds it took.
fn read(path: &std::path::Path) -> Result<f64, ModelError> {
    let start = Instant::now();
    let files = WeightFiles::open(path)?;
    for key in files.keys() {
        std::hint::black_box(files.read(key)?);
    }
    Ok(start.elapsed().as_secs_f64())
}
