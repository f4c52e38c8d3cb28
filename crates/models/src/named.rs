//! Walks the parameters of a module with their dotted names.
//!
//! Names are the field names from the root, such as `transformer.transformer_blocks.0.attn.to_q.weight`.
//! The family's variant in [`crate::Model`] is no part of them.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// Sees each float parameter with its name.
pub trait NamedVisitor {
    /// Called once per parameter, in the order of the fields.
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>);
}

/// Replaces each float parameter, knowing its name.
pub trait NamedMapper {
    /// Called once per parameter, in the order of the fields.
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Visits every float parameter of `module` with its name.
pub fn visit_named(module: &impl Module, visitor: &mut impl NamedVisitor) {
    module.visit(&mut Walk { path: Path::default(), inner: visitor });
}

/// Maps every float parameter of `module` with its name.
pub fn map_named<M: Module>(module: M, mapper: &mut impl NamedMapper) -> M {
    module.map(&mut Walk { path: Path::default(), inner: mapper })
}

struct Walk<'a, T> {
    path: Path,
    inner: &'a mut T,
}

#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.to_owned());
        }
    }

    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    fn name(&self) -> String {
        self.0.join(".")
    }
}

impl<T: NamedVisitor> ModuleVisitor for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        self.inner.visit(&self.path.name(), parameter);
    }
}

impl<T: NamedMapper> ModuleMapper for Walk<'_, T> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.inner.map(&self.path.name(), parameter)
    }
}
