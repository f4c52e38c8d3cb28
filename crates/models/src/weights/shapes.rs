//! What a weight file must hold, told without reading or allocating it.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::KeyMap;
use crate::{NamedVisitor, visit_named};

/// Shapes of tensors by their key in weight files.
pub type TensorShapes = BTreeMap<String, Vec<usize>>;

/// The tensors a component's files hold.
pub(crate) fn expected(module: &impl Module, keys: &KeyMap) -> TensorShapes {
    let mut shapes = Shapes { keys, shapes: TensorShapes::new() };
    visit_named(module, &mut shapes);
    shapes.shapes
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
