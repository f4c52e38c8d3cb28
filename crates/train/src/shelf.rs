//! Where encoded tensors are put: in memory, or in files of the run's folder where they are too many for that.
//!
//! Files are complete or absent, so a killed run goes on encoding where it was. They belong to a key, which tells what was
//! encoded and by what; under another key the shelf begins empty.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewstep_data::atomic;
use fewstep_models::{WeightType, save_tensors};

use crate::TrainError;
use crate::host::HostTensor;
use crate::place::Place;

const KEY: &str = "key";
const TENSOR: &str = "tensor";

/// Tensors by number.
pub(crate) struct Shelf {
    /// Absent in memory.
    folder: Option<PathBuf>,
}

impl Shelf {
    /// A shelf in memory.
    pub(crate) fn in_memory() -> Self {
        Self { folder: None }
    }

    /// The shelf in a folder, emptied if it belongs to another key.
    ///
    /// # Errors
    /// If the folder cannot be read or written.
    pub(crate) fn in_folder(folder: &Path, key: &str) -> Result<Self, TrainError> {
        let key_path = folder.join(KEY);
        if !fs::read_to_string(&key_path).is_ok_and(|found| found == key) {
            if folder.exists() {
                atomic::remove_folder(folder).map_err(TrainError::io(folder))?;
            }
            atomic::write(&key_path, key.as_bytes()).map_err(TrainError::io(&key_path))?;
        }
        Ok(Self { folder: Some(folder.to_owned()) })
    }

    /// What was put there by an earlier process.
    pub(crate) fn find(&self, number: usize) -> Option<Place> {
        let path = self.file(number)?;
        path.exists().then_some(Place::File { path, key: TENSOR })
    }

    /// Puts a tensor there.
    ///
    /// # Errors
    /// If its file cannot be written.
    pub(crate) fn put(&self, number: usize, tensor: HostTensor) -> Result<Place, TrainError> {
        let Some(path) = self.file(number) else { return Ok(Place::Memory(Arc::new(tensor))) };
        let named = [(TENSOR.to_owned(), tensor.shape, tensor.values)];
        save_tensors(&path, named, WeightType::F32, &Default::default())?;
        Ok(Place::File { path, key: TENSOR })
    }

    fn file(&self, number: usize) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{number:08}.safetensors")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shelf_on_disk_keeps_its_tensors_under_its_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latents");
        let tensor = HostTensor { shape: vec![2, 1], values: vec![0.1, -0.0] };
        let put = Shelf::in_folder(&path, "a").unwrap().put(7, tensor).unwrap();
        let found = Shelf::in_folder(&path, "a").unwrap().find(7).unwrap();
        for place in [put, found] {
            let read = place.read().unwrap();
            assert_eq!((read.shape, read.values[0]), (vec![2, 1], 0.1));
            assert_eq!(read.values[1].to_bits(), (-0.0_f32).to_bits());
        }
        assert!(Shelf::in_folder(&path, "b").unwrap().find(7).is_none());
        assert!(Shelf::in_folder(&path, "a").unwrap().find(7).is_none());
    }
}
