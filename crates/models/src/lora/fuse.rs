//! Adapters added into the base weights: a model folder that needs no LoRA any more.
//!
//! Works on the files, one tensor at a time, so that a model larger than the memory can be fused.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::atomic::NewFolder;

use super::{BASE_HASH, LoraWeights, check_base};
use crate::model::kind_of;
use crate::weights::{
    KeyMap, Shards, TensorEntry, WeightFiles, component_files, copy_tree, file_hash, is_weights, read_info,
    values, weights_hash, write_shards,
};
use crate::{LoraFile, ModelError, ModelSource, WeightType};

/// What to fuse, and where to.
#[derive(Clone, Debug)]
pub struct Fusion {
    /// The base, a model folder in the official layout.
    pub model: PathBuf,
    /// The adapters; their updates add up.
    pub loras: Vec<LoraFile>,
    /// The folder to write.
    pub output: PathBuf,
    /// Number type of the fused component; `None` keeps every tensor's own.
    pub dtype: Option<WeightType>,
    /// Largest size of a weight file; see [`MAX_SHARD_BYTES`].
    pub max_shard_bytes: usize,
}

impl Fusion {
    fn base(&self) -> ModelSource {
        ModelSource::from(&self.model)
    }
}

/// diffusers' default size of a weight file ("10GB" in `save_pretrained`).
pub const MAX_SHARD_BYTES: usize = 10_000_000_000;

/// The metadata entry that tells what a folder was fused from.
const FUSED: &str = "fewstep.fused";

/// Writes a complete model folder in which every layer's weight is W + Σ alpha · scale · up · down, computed in f32
/// and rounded once.
///
/// All other components are copied byte for byte. A folder that holds this very fusion already is left as it is.
///
/// # Errors
/// If an adapter does not fit the base or was trained on another one, the output holds something else, or a file
/// cannot be read or written. Nothing is left at the output then.
pub fn fuse(fusion: &Fusion) -> Result<(), ModelError> {
    let kind = kind_of(&fusion.base())?;
    let denoiser = kind.denoiser();
    let source = Source::open(fusion, denoiser, kind.keys(denoiser).expect("a denoiser has weights"))?;
    let record = source.record(fusion)?;
    if taken(&fusion.output) {
        return match found_record(&fusion.output.join(denoiser)) {
            Some(found) if found == record => Ok(()),
            _ => Err(ModelError::Taken { path: fusion.output.clone() }),
        };
    }
    let folder = NewFolder::begin(&fusion.output).map_err(ModelError::io(&fusion.output))?;
    let replaced = fusion.model.join(denoiser);
    let keep = |path: &Path| path.parent() != Some(&replaced) || !is_weights(path);
    copy_tree(&fusion.model, folder.part(), &keep)?;
    let info = source.info(record);
    let shards = Shards {
        folder: &folder.part().join(denoiser),
        name: "diffusion_pytorch_model",
        max_bytes: fusion.max_shard_bytes,
        info: &info,
    };
    let planned: Vec<TensorEntry> =
        source.base.entries().into_iter().map(|entry| planned(entry, fusion.dtype)).collect();
    write_shards(&shards, &planned, &mut |entry| source.fused(entry))?;
    folder.publish().map_err(ModelError::io(&fusion.output))
}

/// The opened files of a fusion.
struct Source {
    base: WeightFiles,
    /// Adapters with their alphas.
    loras: Vec<(LoraWeights, f32)>,
    keys: &'static KeyMap,
}

impl Source {
    /// Opens all files and checks that they fit each other.
    fn open(fusion: &Fusion, denoiser: &str, keys: &'static KeyMap) -> Result<Self, ModelError> {
        let base = WeightFiles::open(&fusion.model.join(denoiser))?;
        let shape = |entry: &TensorEntry| layer_shape(entry, keys);
        let shapes: BTreeMap<String, [usize; 2]> = base.entries().iter().filter_map(shape).collect();
        let available: Vec<String> = shapes.keys().cloned().collect();
        let mut loras = Vec::new();
        for file in &fusion.loras {
            check_base(&file.path, &fusion.base())?;
            let lora = LoraWeights::open(&file.path)?;
            lora.check_layers(&available)?;
            for name in lora.layers().keys() {
                lora.check_shape(name, shapes[name])?;
            }
            loras.push((lora, file.alpha));
        }
        Ok(Self { base, loras, keys })
    }

    /// What makes this fusion the same as another, as JSON.
    fn record(&self, fusion: &Fusion) -> Result<String, ModelError> {
        let lora = |(lora, alpha): &(LoraWeights, f32)| {
            Ok(serde_json::json!({"sha256": file_hash(lora.path())?, "alpha": alpha}))
        };
        let loras = self.loras.iter().map(lora).collect::<Result<Vec<_>, ModelError>>()?;
        let dtype = fusion.dtype.map(WeightType::name);
        let base = weights_hash(&fusion.base())?;
        Ok(serde_json::json!({"base": base, "loras": loras, "dtype": dtype}).to_string())
    }

    /// The metadata of the fused weights: that of the adapters, which tells how they were trained, and the record.
    fn info(&self, record: String) -> BTreeMap<String, String> {
        let own = |(key, _): &(&String, &String)| key.starts_with("fewstep.") && *key != BASE_HASH;
        let entries = self.loras.iter().flat_map(|(lora, _)| lora.info()).filter(own);
        let mut info: BTreeMap<String, String> =
            entries.map(|(key, value)| (key.clone(), value.clone())).collect();
        info.insert(FUSED.into(), record);
        info
    }

    /// The bytes of a tensor of the fused model.
    fn fused(&self, entry: &TensorEntry) -> Result<Cow<'_, [u8]>, ModelError> {
        let key = self.keys.canonical(&entry.key);
        let layer = key.strip_suffix(".weight").unwrap_or(&key);
        let updates: Vec<&(LoraWeights, f32)> =
            self.loras.iter().filter(|(lora, _)| lora.layers().contains_key(layer)).collect();
        let bytes = self.base.bytes(&entry.key)?;
        let Some(dtype) = WeightType::from_name(&entry.dtype) else { return Ok(Cow::Owned(bytes)) };
        if updates.is_empty() && bytes.len() == entry.bytes {
            return Ok(Cow::Owned(bytes));
        }
        let (_, mut weight) = self.base.read(&entry.key)?;
        for (lora, alpha) in updates {
            let update = update(lora, layer, *alpha)?;
            weight.iter_mut().zip(update).for_each(|(weight, update)| *weight += update);
            if !weight.iter().all(|weight| weight.is_finite()) {
                return Err(ModelError::NotFinite { path: lora.path().to_owned(), key: layer.to_owned() });
            }
        }
        Ok(Cow::Owned(dtype.encode(&weight)))
    }
}

/// alpha · scale · up · down of one layer, `[out, in]`.
fn update(lora: &LoraWeights, name: &str, alpha: f32) -> Result<Vec<f32>, ModelError> {
    let layer = &lora.layers()[name];
    let factors = lora.read(name)?;
    let matrix =
        |values, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &Device::flex());
    let up = matrix(factors.up, [layer.output, layer.rank]);
    let product = up.matmul(matrix(factors.down, [layer.rank, layer.input]));
    Ok(values(product.mul_scalar(alpha * layer.scale)))
}

/// Layer and `[out, in]` of a projection's weight.
fn layer_shape(entry: &TensorEntry, keys: &KeyMap) -> Option<(String, [usize; 2])> {
    let key = keys.canonical(&entry.key);
    Some((key.strip_suffix(".weight")?.to_owned(), entry.shape.as_slice().try_into().ok()?))
}

/// The entry a tensor gets in the fused model.
fn planned(mut entry: TensorEntry, dtype: Option<WeightType>) -> TensorEntry {
    if let (Some(dtype), Some(_)) = (dtype, WeightType::from_name(&entry.dtype)) {
        entry.bytes = entry.elements() * dtype.bytes();
        dtype.name().clone_into(&mut entry.dtype);
    }
    entry
}

/// Whether there is anything at the output but an empty folder.
fn taken(output: &Path) -> bool {
    match std::fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => output.exists(),
    }
}

/// The record of an earlier fusion.
fn found_record(denoiser: &Path) -> Option<String> {
    let files = component_files(denoiser).ok()?;
    read_info(files.first()?).ok()?.remove(FUSED)
}
