//! From one spelling of a LoRA file to another.

use std::collections::BTreeMap;
use std::path::Path;

use super::LoraWeights;
use super::keys::{Half, LoraFormat};
use crate::weights::{RawTensor, WeightFiles, read_info, write};
use crate::{ModelError, WeightType};

/// Writes a LoRA file's updates with the keys of `format`.
///
/// Every layer's scale goes into its up half, which readers of either format then take as it is; numbers keep their
/// type but for halves that were scaled, which become f32. The metadata is kept, save what says the scale.
///
/// # Errors
/// If the input is no LoRA, the output exists and is not what would be written, or it cannot be written.
pub fn convert(input: &Path, output: &Path, format: LoraFormat) -> Result<(), ModelError> {
    let source = LoraWeights::open(input)?;
    let mut tensors = BTreeMap::new();
    for (name, layer) in source.layers() {
        let mut factors = source.read(name)?;
        factors.up.iter_mut().for_each(|value| *value *= layer.scale);
        let up_type = if layer.scale == 1.0 { layer.dtype } else { WeightType::F32 };
        let down = RawTensor::new(vec![layer.rank, layer.input], &factors.down, layer.dtype);
        let up = RawTensor::new(vec![layer.output, layer.rank], &factors.up, up_type);
        tensors.insert(format.key(name, Half::Down), down);
        tensors.insert(format.key(name, Half::Up), up);
    }
    let mut info = source.info().clone();
    info.remove(super::peft::ENTRY);
    info.insert("format".into(), "pt".into());
    match output.exists() {
        false => write(output, &tensors, &info),
        true if holds(output, &tensors, &info).unwrap_or(false) => Ok(()),
        true => Err(ModelError::Taken { path: output.to_owned() }),
    }
}

/// Whether a file holds exactly these tensors and this metadata.
fn holds(
    path: &Path,
    tensors: &BTreeMap<String, RawTensor>,
    info: &BTreeMap<String, String>,
) -> Result<bool, ModelError> {
    let files = WeightFiles::open(path)?;
    let equal = |(entry, (key, tensor)): (crate::TensorEntry, (&String, &RawTensor))| {
        Ok(entry.key == *key && tensor.is(&entry, &files.bytes(key)?))
    };
    let entries = files.entries();
    if entries.len() != tensors.len() || read_info(path)? != *info {
        return Ok(false);
    }
    let equal: Result<Vec<bool>, ModelError> = entries.into_iter().zip(tensors).map(equal).collect();
    Ok(equal?.into_iter().all(|equal| equal))
}
