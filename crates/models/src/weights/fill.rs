//! Filling a module's parameters: from weight files, or with fresh random numbers.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;

use super::shapes::{compare, expected, spellings};
use super::{KeyMap, WeightFiles};
use crate::{ModelError, NamedMapper, map_named};

/// A parameter that takes memory only once it is filled.
pub(crate) fn unfilled<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    let zeros = move |device: &Device, require_grad| {
        let tensor: Tensor<D> = Tensor::zeros(shape, device);
        tensor.set_require_grad(require_grad)
    };
    Param::uninitialized(ParamId::new(), zeros, device.clone(), true, shape.into())
}

/// Loads every parameter of a component.
///
/// # Errors
/// As [`compare`] and [`WeightFiles::read`].
pub(crate) fn load<M: Module>(module: M, files: &WeightFiles, keys: &KeyMap) -> Result<M, ModelError> {
    compare(files, &expected(&module, keys), keys)?;
    let mut loader = Loader { files, keys, spellings: spellings(files, keys), error: None };
    let module = map_named(module, &mut loader);
    loader.error.map_or(Ok(module), Err)
}

struct Loader<'a> {
    files: &'a WeightFiles,
    keys: &'a KeyMap,
    spellings: BTreeMap<String, String>,
    error: Option<ModelError>,
}

impl NamedMapper for Loader<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.files.read(&self.spellings[&self.keys.key(name)]) {
            Ok((_, values)) => fill(parameter, values),
            Err(error) => {
                self.error.get_or_insert(error);
                parameter
            }
        }
    }
}

/// Fills every parameter of a component with fresh numbers.
///
/// Matrices are normal with variance 1 / fan-in, embeddings with [`EMBEDDING_DEVIATION`], biases zero, norm weights one;
/// a parameter whose name contains one of `zeros` starts at zero (the modulations and the last projection, so that
/// every block starts as the identity: adaLN-Zero, arXiv 2212.09748).
pub(crate) fn initialize<M: Module>(module: M, generator: &mut TorchGenerator, zeros: &[&str]) -> M {
    map_named(module, &mut Initializer { generator, zeros })
}

/// The published Qwen2.5-VL config's `initializer_range`. Small, because Adam moves a rarely seen row by about the
/// learning rate each time: rows of unit size would stay the random codes they began as.
const EMBEDDING_DEVIATION: f32 = 0.02;

struct Initializer<'a> {
    generator: &'a mut TorchGenerator,
    zeros: &'a [&'a str],
}

impl NamedMapper for Initializer<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = parameter.lazy_shape().dims::<D>();
        let count = shape.iter().product();
        let values = if self.zeros.iter().any(|zero| name.contains(zero)) || name.ends_with("bias") {
            vec![0.0; count]
        } else if D == 1 {
            vec![1.0; count]
        } else {
            let fan_in = shape[1..].iter().product::<usize>() as f32;
            let deviation =
                if name.contains("embed_tokens") { EMBEDDING_DEVIATION } else { fan_in.sqrt().recip() };
            self.generator.randn(count).into_iter().map(|value| value * deviation).collect()
        };
        fill(parameter, values)
    }
}

fn fill<const D: usize>(parameter: Param<Tensor<D>>, values: Vec<f32>) -> Param<Tensor<D>> {
    let data = TensorData::new(values, parameter.lazy_shape().dims::<D>());
    let (id, tensor) = (parameter.id, Tensor::from_data(data, &parameter.lazy_device()));
    parameter.transform_for_load(tensor, id)
}
