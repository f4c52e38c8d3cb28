//! SHA-256 as text.

use std::fs::File;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::TrainError;

/// The hash of what was fed.
pub(crate) fn hex(fed: Sha256) -> String {
    fed.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of a file's bytes.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn of_file(path: &Path) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(TrainError::io(path))?;
    std::io::copy(&mut file, &mut hash).map_err(TrainError::io(path))?;
    Ok(hex(hash))
}
