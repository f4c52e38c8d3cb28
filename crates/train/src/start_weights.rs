//! Weights that a run starts from instead of the model folder's: what `resume_from_checkpoint` names.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::Tensor;
use fewstep_models::lora::LoraFormat;
use fewstep_models::{Model, ModelError, NamedVisitor, WeightFiles, visit_named};

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
    let mut names = Names { model: &model, trainable, by_key: BTreeMap::new() };
    visit_named(&model, &mut names);
    let (mut values, mut unknown) = (BTreeMap::new(), Vec::new());
    for key in files.keys() {
        let plain = key.strip_prefix("pipe.dit.").unwrap_or(key);
        let plain = LoraFormat::Diffsynth.respelled(key).unwrap_or_else(|| plain.to_owned());
        let Some((name, expected)) = names.by_key.get(&plain) else {
            unknown.push(key.to_owned());
            continue;
        };
        let (found, mut read) = files.read(key)?;
        if found != *expected {
            let (path, key, expected) = (path.to_owned(), key.to_owned(), expected.clone());
            return Err(ModelError::Shape { path, key, found, expected }.into());
        }
        if name.ends_with(".lora.up") && lora_scale != 1.0 {
            read.iter_mut().for_each(|value| *value /= lora_scale);
        }
        values.insert(name.clone(), read);
    }
    match unknown.is_empty() {
        true => Ok(with_parameters(model, |name| values.get(name).map(Vec::as_slice))),
        false => {
            let count = files.keys().count();
            Err(TrainError::StartWeights { path: path.to_owned(), unknown, count })
        }
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
            self.by_key.insert(key, (name.to_owned(), parameter.dims().to_vec()));
        }
    }
}
