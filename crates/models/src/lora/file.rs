//! A LoRA file: which layers it updates, at which rank and scale.

use std::collections::BTreeMap;
use std::path::Path;

use super::keys::{Half, LoraFormat, Part, split};
use super::peft::PeftConfig;
use crate::weights::{TensorEntry, WeightFiles, read_info};
use crate::{ModelError, WeightType};

/// A LoRA file whose keys have been understood; its tensors are read when they are asked for.
#[derive(Debug)]
pub struct LoraWeights {
    files: WeightFiles,
    info: BTreeMap<String, String>,
    layers: BTreeMap<String, LoraLayer>,
}

/// The update of one layer, `scale · up · down`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLayer {
    /// Rank of the update.
    pub rank: usize,
    /// Inputs of the layer.
    pub input: usize,
    /// Outputs of the layer.
    pub output: usize,
    /// alpha / rank, or alpha / √rank where the file asks for that (rsLoRA, arXiv 2312.03732).
    pub scale: f32,
    /// Number type in the file; f32, which holds all others, where the factors differ.
    pub(super) dtype: WeightType,
    down_key: String,
    up_key: String,
}

/// The factors of an update.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Factors {
    /// `[rank, in]`
    pub(super) down: Vec<f32>,
    /// `[out, rank]`
    pub(super) up: Vec<f32>,
}

/// The tensors found for one layer.
#[derive(Default)]
struct Found<'a> {
    down: Option<&'a TensorEntry>,
    up: Option<&'a TensorEntry>,
    alpha: Option<&'a TensorEntry>,
}

impl LoraWeights {
    /// Opens a file and reads its keys, alphas and metadata.
    ///
    /// alpha is that of the layer's tensor `.alpha`, else that of the metadata diffusers writes, else the rank.
    ///
    /// # Errors
    /// If the file is damaged or no LoRA, holds keys of another kind or half of a pair, its shapes do not fit each
    /// other, or an alpha is 0 or not finite.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (files, info) = (WeightFiles::open(path)?, read_info(path)?);
        let entries = files.entries();
        let found = group(path, &entries)?;
        let config = PeftConfig::read(path, &info)?;
        config.check_patterns(path, found.keys().map(String::as_str))?;
        let mut layers = BTreeMap::new();
        for (layer, found) in found {
            let alpha = found.alpha.map(|entry| scalar(&files, &entry.key)).transpose()?;
            let read = LoraLayer::new(path, &found)?;
            let scale = match alpha {
                Some(alpha) => alpha / read.rank as f32,
                None => config.scale(&layer, read.rank),
            };
            if scale == 0.0 || !scale.is_finite() {
                return Err(ModelError::LoraScale { path: path.to_owned(), layer, scale });
            }
            layers.insert(layer, LoraLayer { scale, ..read });
        }
        Ok(Self { files, info, layers })
    }

    /// The updates by layer; layers are called as in the model's own weight files, without `.weight`.
    pub fn layers(&self) -> &BTreeMap<String, LoraLayer> {
        &self.layers
    }

    /// The file's metadata.
    pub fn info(&self) -> &BTreeMap<String, String> {
        &self.info
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// The spelling of the keys, where it is one of those written here.
    pub fn format(&self) -> Option<LoraFormat> {
        let spelled = |format: &LoraFormat| {
            let mut layers = self.layers.iter();
            layers.all(|(name, layer)| {
                layer.down_key == format.key(name, Half::Down) && layer.up_key == format.key(name, Half::Up)
            })
        };
        LoraFormat::ALL.into_iter().find(spelled)
    }

    /// One key of the file, as an example of its spelling.
    pub fn example_key(&self) -> &str {
        self.layers.values().next().map_or("", |layer| &layer.down_key)
    }

    /// Checks that every layer of the file is one of the model's.
    ///
    /// # Errors
    /// If one is not.
    pub(super) fn check_layers(&self, available: &[String]) -> Result<(), ModelError> {
        let unknown: Vec<String> =
            self.layers.keys().filter(|layer| !available.contains(layer)).cloned().collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let (path, layers) = (self.path().to_owned(), self.layers.len());
        Err(ModelError::LoraLayers { path, unknown, layers, available: available.to_vec() })
    }

    /// Checks that an update fits its layer's weight.
    ///
    /// # Errors
    /// If a factor has another size.
    pub(super) fn check_shape(&self, name: &str, [output, input]: [usize; 2]) -> Result<(), ModelError> {
        let layer = &self.layers[name];
        let factors = [
            (&layer.down_key, [layer.rank, layer.input], [layer.rank, input]),
            (&layer.up_key, [layer.output, layer.rank], [output, layer.rank]),
        ];
        match factors.into_iter().find(|(_, found, expected)| found != expected) {
            None => Ok(()),
            Some((key, found, expected)) => Err(shape(self.path(), key, &found, &expected)),
        }
    }

    /// The factors of a layer's update.
    ///
    /// # Errors
    /// If a value is not finite.
    pub(super) fn read(&self, name: &str) -> Result<Factors, ModelError> {
        let layer = &self.layers[name];
        let read = |key| self.files.read(key).map(|(_, values)| values);
        Ok(Factors { down: read(&layer.down_key)?, up: read(&layer.up_key)? })
    }
}

impl LoraLayer {
    /// Reads the sizes off a pair's shapes; the scale is left at 1.
    fn new(path: &Path, found: &Found<'_>) -> Result<Self, ModelError> {
        let pair = (found.down.zip(found.up)).expect("incomplete pairs were refused");
        let (&[rank, input], &[output, up_rank]) = (&matrix(path, pair.0)?, &matrix(path, pair.1)?);
        if rank != up_rank || rank == 0 {
            return Err(shape(path, &pair.1.key, &[output, up_rank], &[output, rank.max(1)]));
        }
        let dtype = |entry: &TensorEntry| {
            WeightType::from_name(&entry.dtype).ok_or_else(|| ModelError::DataType {
                path: path.to_owned(),
                key: entry.key.clone(),
                found: entry.dtype.clone(),
            })
        };
        let (down, up) = (dtype(pair.0)?, dtype(pair.1)?);
        let dtype = if down == up { down } else { WeightType::F32 };
        let (down_key, up_key) = (pair.0.key.clone(), pair.1.key.clone());
        Ok(Self { rank, input, output, scale: 1.0, dtype, down_key, up_key })
    }
}

/// Sorts the tensors by layer.
fn group<'a>(path: &Path, entries: &'a [TensorEntry]) -> Result<BTreeMap<String, Found<'a>>, ModelError> {
    let mut layers: BTreeMap<String, Found<'_>> = BTreeMap::new();
    let (mut missing, mut unknown) = (Vec::new(), Vec::new());
    for entry in entries {
        let Some((layer, part)) = split(&entry.key) else {
            unknown.push(entry.key.clone());
            continue;
        };
        let found = layers.entry(layer).or_default();
        let place = match part {
            Part::Half(Half::Down) => &mut found.down,
            Part::Half(Half::Up) => &mut found.up,
            Part::Alpha => &mut found.alpha,
        };
        // A second spelling of a layer the file has already.
        if place.replace(entry).is_some() {
            unknown.push(entry.key.clone());
        }
    }
    for (layer, found) in &layers {
        let halves = [(found.down, Half::Down), (found.up, Half::Up)];
        let absent = halves.into_iter().filter(|(entry, _)| entry.is_none());
        missing.extend(absent.map(|(_, half)| LoraFormat::default().key(layer, half)));
    }
    if unknown.is_empty() && missing.is_empty() && !layers.is_empty() {
        return Ok(layers);
    }
    Err(ModelError::LoraKeys { path: path.to_owned(), missing, unknown })
}

fn matrix(path: &Path, entry: &TensorEntry) -> Result<[usize; 2], ModelError> {
    entry.shape.as_slice().try_into().map_err(|_| shape(path, &entry.key, &entry.shape, &[0, 0]))
}

fn shape(path: &Path, key: &str, found: &[usize], expected: &[usize]) -> ModelError {
    let (path, key) = (path.to_owned(), key.to_owned());
    ModelError::Shape { path, key, found: found.to_vec(), expected: expected.to_vec() }
}

fn scalar(files: &WeightFiles, key: &str) -> Result<f32, ModelError> {
    let (found, values) = files.read(key)?;
    match values[..] {
        [value] => Ok(value),
        _ => Err(shape(files.path(), key, &found, &[])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::save_tensors;

    /// What is wrong with a file of one layer of this alpha and metadata.
    fn refusal(alpha: Option<f32>, metadata: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lora.safetensors");
        let matrix = |part: &str| (format!("to_q.lora_{part}.weight"), vec![2, 2], vec![0.5; 4]);
        let alpha = alpha.map(|alpha| ("to_q.alpha".to_owned(), vec![], vec![alpha]));
        let info = BTreeMap::from([("lora_adapter_metadata".to_owned(), metadata.to_owned())]);
        let tensors = [matrix("A"), matrix("B")].into_iter().chain(alpha);
        save_tensors(&path, tensors, WeightType::F32, &info).unwrap();
        LoraWeights::open(&path).unwrap_err().to_string()
    }

    #[test]
    fn an_alpha_that_scales_to_nothing_or_to_no_number_is_refused() {
        let zero = refusal(Some(0.0), "{}");
        assert!(zero.contains("lora.safetensors: the update of to_q is scaled by 0, expected"), "{zero}");
        assert!(zero.contains("\nhint: its alpha is wrong"), "{zero}");
        for alpha in [f32::NAN, f32::INFINITY] {
            let error = refusal(Some(alpha), "{}");
            assert!(error.contains("tensor to_q.alpha holds a value that is not finite"), "{error}");
        }
        let huge = refusal(None, r#"{"lora_alpha": 1e300}"#);
        assert!(huge.contains("the update of to_q is scaled by inf"), "{huge}");
        let none = refusal(None, r#"{"lora_alpha": 0}"#);
        assert!(none.contains("the update of to_q is scaled by 0"), "{none}");
        let deep = refusal(None, &"[".repeat(100_000));
        assert!(deep.contains("metadata lora_adapter_metadata: ") && deep.len() < 500, "{deep}");
    }
}
