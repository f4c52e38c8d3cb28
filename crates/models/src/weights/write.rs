//! Writing safetensors files, never half of one: a module's parameters at once, or tensors one after the other where
//! they are too large to be in memory together.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use fewstep_kernels::HalfType;
use half::{bf16, f16};
use serde_json::json;

use super::{KeyMap, TensorEntry, WeightFiles};
use crate::{Model, ModelError, NamedVisitor, visit_named};

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
    /// Rounds values to the type.
    pub(crate) fn new(shape: Vec<usize>, values: &[f32], dtype: WeightType) -> Self {
        Self { dtype: dtype.name(), shape, bytes: dtype.encode(values) }
    }

    /// Whether a file holds this very tensor.
    pub(crate) fn is(&self, entry: &TensorEntry, bytes: &[u8]) -> bool {
        self.dtype == entry.dtype && self.shape == entry.shape && self.bytes == bytes
    }
}

impl WeightType {
    /// The type a file calls so; `None` for types that hold no real numbers.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|dtype| dtype.name() == name)
    }

    /// How files spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        }
    }

    /// burn's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }

    /// The type as one of two bytes a number, if it is.
    pub fn half(self) -> Option<HalfType> {
        match self {
            Self::F32 => None,
            Self::F16 => Some(HalfType::F16),
            Self::BF16 => Some(HalfType::Bf16),
        }
    }

    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Rounds values to the type, little-endian.
    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            Self::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        }
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

/// As [`save_tensors`], for tensors that are too large to be in memory together: keys and shapes in the order of the
/// file, and `values` makes the numbers of each when its turn has come.
///
/// # Errors
/// Those of `values`, or if the file cannot be written; an older file of that name is then untouched.
pub fn save_streamed(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Vec<usize>)>,
    dtype: WeightType,
    values: &mut dyn FnMut(&str) -> Result<Vec<f32>, ModelError>,
) -> Result<(), ModelError> {
    let entry = |(key, shape): (String, Vec<usize>)| {
        let bytes = dtype.bytes() * shape.iter().product::<usize>();
        TensorEntry { key, dtype: dtype.name().to_owned(), shape, bytes }
    };
    let entries: Vec<TensorEntry> = tensors.into_iter().map(entry).collect();
    let mut encoded = |entry: &TensorEntry| Ok(Cow::Owned(dtype.encode(&values(&entry.key)?)));
    write_streamed(path, &entries, &BTreeMap::new(), &mut encoded)
}

/// Writes raw tensors with their metadata, in the order of their keys.
pub(crate) fn write(
    path: &Path,
    tensors: &BTreeMap<String, RawTensor>,
    info: &BTreeMap<String, String>,
) -> Result<(), ModelError> {
    let entry = |(key, tensor): (&String, &RawTensor)| TensorEntry {
        key: key.clone(),
        dtype: tensor.dtype.to_owned(),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes.len(),
    };
    let entries: Vec<TensorEntry> = tensors.iter().map(entry).collect();
    write_streamed(path, &entries, info, &mut |entry| Ok(Cow::Borrowed(&tensors[&entry.key].bytes)))
}

/// Makes the bytes of a tensor, or lends them.
pub(crate) type Source<'f, 'a> = &'f mut dyn FnMut(&TensorEntry) -> Result<Cow<'a, [u8]>, ModelError>;

/// Writes tensors in the order given; `data` makes each one's bytes when its turn has come.
///
/// The header is written here and not by the safetensors crate, whose metadata comes out in a random
/// order: equal runs must give equal files.
pub(crate) fn write_streamed<'a>(
    path: &Path,
    entries: &[TensorEntry],
    info: &BTreeMap<String, String>,
    data: Source<'_, 'a>,
) -> Result<(), ModelError> {
    let header = header(entries, info);
    let mut failed = None;
    let bytes = size_of::<u64>() + header.len() + entries.iter().map(|entry| entry.bytes).sum::<usize>();
    let written = fewstep_data::atomic::write_sized(path, bytes as u64, |file| {
        let mut file = BufWriter::new(file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for entry in entries {
            match data(entry) {
                Ok(bytes) => {
                    assert_eq!(bytes.len(), entry.bytes, "bytes of tensor {}", entry.key);
                    file.write_all(&bytes)?;
                }
                Err(error) => {
                    failed = Some(error);
                    return Err(std::io::ErrorKind::Other.into());
                }
            }
        }
        file.flush()
    });
    failed.map_or_else(|| written.map_err(ModelError::io(path)), Err)
}

/// The JSON header, padded so that the data starts at a multiple of 8 bytes.
fn header(tensors: &[TensorEntry], info: &BTreeMap<String, String>) -> String {
    // The peers' loaders expect the entry `format`.
    let mut metadata = info.clone();
    metadata.insert("format".into(), "pt".into());
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), json!(metadata));
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.bytes;
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.key.clone(), entry);
    }
    let mut header = serde_json::Value::Object(entries).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    header
}

/// Gathers a component's parameters under their file keys; LoRA parameters are left out.
pub(crate) fn collect_component(
    model: &Model,
    component: &str,
    dtype: WeightType,
) -> BTreeMap<String, RawTensor> {
    let mut collector = Collector { model, component, dtype, tensors: BTreeMap::new() };
    visit_named(model, &mut collector);
    collector.tensors
}

struct Collector<'a> {
    model: &'a Model,
    component: &'a str,
    dtype: WeightType,
    tensors: BTreeMap<String, RawTensor>,
}

impl NamedVisitor for Collector<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let (component, key) = self.model.weight_key(name);
        if component != self.component || name.contains(".lora.") {
            return;
        }
        let tensor = parameter.val();
        let shape = tensor.dims().to_vec();
        self.tensors.insert(key, RawTensor::new(shape, &values(tensor), self.dtype));
    }
}

/// Adds the tensors that a component's files hold and the model does not use.
pub(crate) fn carry_ignored(
    tensors: &mut BTreeMap<String, RawTensor>,
    files: &WeightFiles,
    keys: &KeyMap,
    dtype: WeightType,
) -> Result<(), ModelError> {
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
