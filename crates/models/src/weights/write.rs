//! Writing: a module's parameters into one safetensors file, never half of one.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use half::{bf16, f16};
use serde_json::json;

use super::{KeyMap, WeightFiles};
use crate::{ModelError, NamedVisitor, visit_named};

/// Number type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// 32 bits, exact.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

/// A tensor ready to be written.
pub(crate) struct RawTensor {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl RawTensor {
    /// Rounds values to the type, little-endian.
    fn new(shape: Vec<usize>, values: &[f32], dtype: WeightType) -> Self {
        let (dtype, bytes) = match dtype {
            WeightType::F32 => ("F32", values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            WeightType::F16 => {
                ("F16", values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect())
            }
            WeightType::BF16 => {
                ("BF16", values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect())
            }
        };
        Self { dtype, shape, bytes }
    }
}

/// Writes named f32 tensors (shape and values) into one safetensors file with its metadata.
///
/// # Errors
/// If the file cannot be written; an older file of that name is then untouched.
pub fn save_tensors(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Vec<usize>, Vec<f32>)>,
    dtype: WeightType,
    info: &BTreeMap<String, String>,
) -> Result<(), ModelError> {
    let raw = tensors
        .into_iter()
        .map(|(key, shape, values)| (key, RawTensor::new(shape, &values, dtype)))
        .collect();
    write(path, &raw, info)
}

/// Writes raw tensors with their metadata, in the order of their keys.
///
/// The header is written here and not by the safetensors crate, whose metadata comes out in a random
/// order: equal runs must give equal files.
pub(crate) fn write(
    path: &Path,
    tensors: &BTreeMap<String, RawTensor>,
    info: &BTreeMap<String, String>,
) -> Result<(), ModelError> {
    let header = header(tensors, info);
    fewstep_data::atomic::write_with(path, |file| {
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for tensor in tensors.values() {
            file.write_all(&tensor.bytes)?;
        }
        file.flush()
    })
    .map_err(ModelError::io(path))
}

/// The JSON header, padded so that the data starts at a multiple of 8 bytes.
fn header(tensors: &BTreeMap<String, RawTensor>, info: &BTreeMap<String, String>) -> String {
    // The peers' loaders expect the entry `format`.
    let mut metadata = info.clone();
    metadata.insert("format".into(), "pt".into());
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), json!(metadata));
    let mut end = 0;
    for (key, tensor) in tensors {
        let start = end;
        end += tensor.bytes.len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(key.clone(), entry);
    }
    let mut header = serde_json::Value::Object(entries).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    header
}

/// Gathers a component's parameters under their file keys; LoRA parameters are left out.
pub(crate) fn collect(module: &impl Module, keys: &KeyMap, dtype: WeightType) -> BTreeMap<String, RawTensor> {
    let mut collector = Collector { keys, dtype, tensors: BTreeMap::new() };
    visit_named(module, &mut collector);
    collector.tensors
}

struct Collector<'a> {
    keys: &'a KeyMap,
    dtype: WeightType,
    tensors: BTreeMap<String, RawTensor>,
}

impl NamedVisitor for Collector<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        if name.contains(".lora.") {
            return;
        }
        let tensor = parameter.val();
        let shape = tensor.dims().to_vec();
        self.tensors.insert(self.keys.key(name), RawTensor::new(shape, &values(tensor), self.dtype));
    }
}

/// Adds the tensors that a component's files hold and the model does not use; none where there are no files.
pub(crate) fn carry_ignored(
    tensors: &mut BTreeMap<String, RawTensor>,
    component: &Path,
    keys: &KeyMap,
    dtype: WeightType,
) -> Result<(), ModelError> {
    let files = match WeightFiles::open(component) {
        Ok(files) => files,
        Err(ModelError::NoModelFolder { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    for in_file in files.keys() {
        let key = keys.canonical(in_file);
        if keys.ignores(&key) {
            let (shape, values) = files.read(in_file)?;
            tensors.insert(key, RawTensor::new(shape, &values, dtype));
        }
    }
    Ok(())
}

/// A tensor's values on the host.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().expect("converted to f32 above")
}
