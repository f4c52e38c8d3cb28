//! Hashes that tell weights apart.

use std::fs::File;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::WeightFiles;
use crate::{ModelError, ModelSource};

/// Models up to this size are hashed whole: about a second.
const WHOLE_BYTES: u64 = 1 << 30;

/// Of a larger model's tensors, so many blocks are hashed, evenly spread from the first byte to the last.
const BLOCKS: usize = 16;
const BLOCK_BYTES: usize = 4096;

/// SHA-256 over the weight files of a model: component names, file names and bytes. Where the files lie does not
/// enter.
///
/// Of models larger than `WHOLE_BYTES` the file names, sizes and headers are hashed, and every tensor's bytes in
/// `BLOCKS` places: some hundred megabytes of the published model's forty thousand. Training, merging, fusing and
/// rounding change all numbers of the tensors they change, and are seen; a few numbers changed by hand may not be.
///
/// # Errors
/// If a file cannot be read, or one that is not hashed whole is damaged.
pub fn weights_hash(source: &ModelSource) -> Result<String, ModelError> {
    hash_of(&source.weight_files()?, WHOLE_BYTES)
}

fn hash_of(files: &[(String, PathBuf)], whole_bytes: u64) -> Result<String, ModelError> {
    let size = |path: &PathBuf| Ok(std::fs::metadata(path).map_err(ModelError::io(path))?.len());
    let sizes = files.iter().map(|(_, path)| size(path)).collect::<Result<Vec<u64>, ModelError>>()?;
    let whole = sizes.iter().sum::<u64>() <= whole_bytes;
    let mut hash = Sha256::new();
    for ((name, path), size) in files.iter().zip(sizes) {
        hash.update(name.as_bytes());
        if whole {
            hash_file(path, &mut hash)?;
        } else {
            hash.update(size.to_le_bytes());
            sample(path, &mut hash)?;
        }
    }
    Ok(hex(hash.finalize().as_slice()))
}

/// Hashes what a file's header says, and blocks of every tensor.
fn sample(path: &Path, hash: &mut Sha256) -> Result<(), ModelError> {
    let file = WeightFiles::open(path)?;
    for entry in file.entries() {
        hash.update(format!("{} {} {:?}\n", entry.key, entry.dtype, entry.shape));
        for start in block_starts(entry.bytes) {
            hash.update(file.part(&entry.key, start..entry.bytes.min(start + BLOCK_BYTES))?);
        }
    }
    Ok(())
}

/// Where the blocks of a tensor begin; together they are all of a small one.
fn block_starts(bytes: usize) -> Vec<usize> {
    match bytes.checked_sub(BLOCKS * BLOCK_BYTES) {
        None => (0..bytes).step_by(BLOCK_BYTES).collect(),
        Some(_) => (0..BLOCKS).map(|block| block * (bytes - BLOCK_BYTES) / (BLOCKS - 1)).collect(),
    }
}

/// SHA-256 of one file.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn file_hash(path: &Path) -> Result<String, ModelError> {
    let mut hash = Sha256::new();
    hash_file(path, &mut hash)?;
    Ok(hex(hash.finalize().as_slice()))
}

fn hash_file(path: &Path, hash: &mut Sha256) -> Result<(), ModelError> {
    let copied = File::open(path).and_then(|mut file| std::io::copy(&mut file, hash));
    copied.map(|_| ()).map_err(ModelError::io(path))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{WeightType, save_tensors};
    use super::*;

    /// Tensors of 400, 262,144 and 65,536 bytes: hashed whole, in blocks with gaps, and in blocks without.
    const SIZES: [(&str, usize); 3] = [("bias", 100), ("large", 1 << 16), ("small", 1 << 14)];

    fn write(folder: &Path, value: impl Fn(&str, usize) -> f32) -> Vec<(String, PathBuf)> {
        let path = folder.join("model.safetensors");
        let tensors = SIZES.map(|(key, count)| {
            (key.to_owned(), vec![count], (0..count).map(|index| value(key, index)).collect())
        });
        save_tensors(&path, tensors, WeightType::F32, &Default::default()).unwrap();
        vec![("transformer/model.safetensors".to_owned(), path)]
    }

    #[test]
    fn a_change_of_any_tensor_changes_the_hash_of_a_large_model() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let plain = |_: &str, index: usize| index as f32;
        let hash = |value: &dyn Fn(&str, usize) -> f32| hash_of(&write(folder.path(), value), 0).unwrap();
        let first = hash(&plain);
        assert_eq!(hash_of(&write(elsewhere.path(), plain), 0).unwrap(), first, "the place does not count");
        for (changed, count) in SIZES {
            for places in [0..count, 0..1, count - 1..count] {
                let other = |key: &str, index| {
                    plain(key, index) + f32::from(u8::from(key == changed && places.contains(&index)))
                };
                assert_ne!(hash(&other), first, "{changed}{places:?}");
            }
        }
    }

    #[test]
    fn small_models_are_hashed_to_the_last_number() {
        let folder = tempfile::tempdir().unwrap();
        let hash = |whole_bytes, changed| {
            let value = |key: &str, index| if (key, index) == ("large", 3000) { changed } else { 1.0 };
            hash_of(&write(folder.path(), value), whole_bytes).unwrap()
        };
        assert_ne!(hash(WHOLE_BYTES, 1.0), hash(WHOLE_BYTES, 2.0));
        // That number is in a gap between two blocks.
        assert_eq!(hash(0, 1.0), hash(0, 2.0));
    }

    #[test]
    fn blocks_reach_from_the_first_byte_to_the_last() {
        for bytes in [0, 1, BLOCK_BYTES, BLOCKS * BLOCK_BYTES - 1, BLOCKS * BLOCK_BYTES, 1 << 20] {
            let starts = block_starts(bytes);
            assert!(starts.is_sorted() && starts.len() <= BLOCKS, "{starts:?}");
            assert_eq!(starts.first().copied().unwrap_or(0), 0);
            let end = starts.last().map_or(0, |start| bytes.min(start + BLOCK_BYTES));
            assert_eq!(end, bytes);
        }
    }
}
