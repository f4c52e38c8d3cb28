//! Where a tensor of the data set is until a batch needs it.

use std::path::PathBuf;
use std::sync::Arc;

use fewstep_models::{ModelError, WeightFiles};

use crate::host::HostTensor;

/// A tensor in memory or in a file.
#[derive(Clone)]
pub(crate) enum Place {
    /// In memory.
    Memory(Arc<HostTensor>),
    /// In one of many files, which is opened for each reading: a process may hold only so many open.
    File { path: PathBuf, key: &'static str },
    /// In a file with many tensors, which stays open.
    Open { files: Arc<WeightFiles>, key: String },
}

impl Place {
    /// Copies the tensor into memory.
    ///
    /// # Errors
    /// If its file cannot be read.
    pub(crate) fn read(&self) -> Result<HostTensor, ModelError> {
        let (shape, values) = match self {
            Self::Memory(tensor) => return Ok(HostTensor::clone(tensor)),
            Self::File { path, key } => WeightFiles::open(path)?.read(key)?,
            Self::Open { files, key } => files.read(key)?,
        };
        Ok(HostTensor { shape, values })
    }

    /// The tensor's shape; no values are read.
    ///
    /// # Errors
    /// If its file cannot be read.
    pub(crate) fn shape(&self) -> Result<Vec<usize>, ModelError> {
        match self {
            Self::Memory(tensor) => Ok(tensor.shape.clone()),
            Self::File { path, key } => Ok(WeightFiles::open(path)?.shape(key)?.to_vec()),
            Self::Open { files, key } => Ok(files.shape(key)?.to_vec()),
        }
    }
}
