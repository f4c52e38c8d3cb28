//! Weights that a run starts from instead of the model folder's: what `resume_from_checkpoint` names.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::Tensor;
use fewstep_models::{Model, ModelError, NamedVisitor, TensorEntry, WeightFiles, visit_named};

use crate::TrainError;
use crate::host::with_parameters;
use crate::trainable::Trainable;

/// Replaces the trained parameters that a file has; the others stay. Keys may have the peer's prefix `pipe.dit.`, those
/// of adapters any spelling. Files have the scale of adapters in `up`, from which `lora_scale` is taken out.
///
/// # Errors
/// If the file is damaged, or holds tensors that are no trained parameters or have other shapes.
pub(crate) fn overlay(
    model: Model,
    path: &Path,
    trainable: &Trainable,
    lora_scale: f32,
) -> Result<Model, TrainError> {
    let files = WeightFiles::open(path)?;
    let mut values = BTreeMap::new();
    for (key, name) in names(&model, &files, trainable)? {
        let mut read = files.read(&key)?.1;
        if name.ends_with(".lora.up") && lora_scale != 1.0 {
            read.iter_mut().for_each(|value| *value /= lora_scale);
        }
        values.insert(name, read);
    }
    Ok(with_parameters(model, |name| values.get(name).map(Vec::as_slice)))
}

/// Checks a file for [`overlay`] by its header; the model needs no weights for it.
///
/// # Errors
/// As there.
pub(crate) fn check(model: &Model, path: &Path, trainable: &Trainable) -> Result<(), TrainError> {
    names(model, &WeightFiles::open(path)?, trainable).map(|_| ())
}

/// The parameters that a file has, by its keys.
fn names(
    model: &Model,
    files: &WeightFiles,
    trainable: &Trainable,
) -> Result<BTreeMap<String, String>, TrainError> {
    let path = || files.path().to_owned();
    let mut trained = Names { model, trainable, by_key: BTreeMap::new() };
    visit_named(model, &mut trained);
    let (mut names, mut unknown) = (BTreeMap::new(), Vec::new());
    let entries = files.entries();
    let count = entries.len();
    for TensorEntry { key, shape: found, .. } in entries {
        match trained.by_key.get(&model.canonical_key(&key)) {
            Some((_, expected)) if found != *expected => {
                let expected = expected.clone();
                return Err(ModelError::Shape { path: path(), key, found, expected }.into());
            }
            Some((name, _)) => drop(names.insert(key, name.clone())),
            None => unknown.push(key),
        }
    }
    match unknown.is_empty() {
        true => Ok(names),
        false => Err(TrainError::StartWeights { path: path(), unknown, count }),
    }
}

/// Trained parameters, with their names and shapes, by their keys in files.
struct Names<'a> {
    model: &'a Model,
    trainable: &'a Trainable,
    by_key: BTreeMap<String, (String, Vec<usize>)>,
}

impl NamedVisitor for Names<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        if self.trainable.includes(name) {
            let (_, key) = self.model.weight_key(name);
            self.by_key.insert(key, (name.to_owned(), parameter.lazy_shape().dims::<D>().to_vec()));
        }
    }
}
