//! What a weight file must hold, told without reading or allocating it.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::{KeyMap, WeightFiles};
use crate::{ModelError, NamedVisitor, visit_named};

/// Shapes of tensors by their key in weight files.
pub type TensorShapes = BTreeMap<String, Vec<usize>>;

/// The tensors a component's files hold.
pub(crate) fn expected(module: &impl Module, keys: &KeyMap) -> TensorShapes {
    let mut shapes = Shapes { keys, shapes: TensorShapes::new() };
    visit_named(module, &mut shapes);
    shapes.shapes
}

/// Compares the headers of a component's files with what they must hold; no values are read.
///
/// # Errors
/// Lists the keys the files lack and those there is no use for; otherwise names a tensor of another shape.
pub(crate) fn compare(files: &WeightFiles, expected: &TensorShapes, keys: &KeyMap) -> Result<(), ModelError> {
    let spellings = spellings(files, keys);
    let missing: Vec<String> = expected.keys().filter(|key| !spellings.contains_key(*key)).cloned().collect();
    let unused = spellings.iter().filter(|(key, _)| !expected.contains_key(*key) && !keys.ignores(key));
    let mut unknown: Vec<String> = unused.map(|(_, in_file)| in_file.clone()).collect();
    // Two spellings of one tensor, of which only one could be loaded.
    let twice = |key: &&str| spellings[&keys.canonical(key)] != **key;
    unknown.extend(files.keys().filter(twice).map(str::to_owned));
    let path = || files.path().to_owned();
    if !missing.is_empty() || !unknown.is_empty() {
        return Err(ModelError::Keys { path: path(), missing, unknown });
    }
    for found in files.entries() {
        match expected.get(&keys.canonical(&found.key)) {
            Some(shape) if *shape != found.shape => {
                let (key, found, expected) = (found.key, found.shape, shape.clone());
                return Err(ModelError::Shape { path: path(), key, found, expected });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The keys of a component's files: canonical → as the files spell it.
pub(crate) fn spellings(files: &WeightFiles, keys: &KeyMap) -> BTreeMap<String, String> {
    files.keys().map(|key| (keys.canonical(key), key.to_owned())).collect()
}

struct Shapes<'a> {
    keys: &'a KeyMap,
    shapes: TensorShapes,
}

impl NamedVisitor for Shapes<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        let shape = parameter.lazy_shape().dims::<D>().to_vec();
        self.shapes.insert(self.keys.key(name), shape);
    }
}
