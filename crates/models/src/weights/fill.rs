//! Filling a module's parameters: from weight files, or with fresh random numbers.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;
use half::{bf16, f16};

use super::shapes::{compare, expected, spellings};
use super::{KeyMap, WeightFiles};
use crate::load_options::storage;
use crate::{ModelError, NamedMapper, WeightType, map_named};

/// A parameter that takes memory only once it is filled.
pub(crate) fn unfilled<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    let zeros = move |device: &Device, require_grad| {
        let tensor: Tensor<D> = Tensor::zeros(shape, device);
        tensor.set_require_grad(require_grad)
    };
    Param::uninitialized(ParamId::new(), zeros, device.clone(), true, shape.into())
}

/// Loads every parameter of a component, rounded to a type and stored as [`storage`] says, one tensor at a time.
///
/// # Errors
/// As [`compare`], or names a tensor with values that are not finite in that type.
pub(crate) fn load<M: Module>(
    module: M,
    files: &WeightFiles,
    keys: &KeyMap,
    dtype: WeightType,
) -> Result<M, ModelError> {
    compare(files, &expected(&module, keys), keys)?;
    let mut loader = Loader { files, keys, dtype, spellings: spellings(files, keys), error: None };
    let module = map_named(module, &mut loader);
    loader.error.map_or(Ok(module), Err)
}

struct Loader<'a> {
    files: &'a WeightFiles,
    keys: &'a KeyMap,
    dtype: WeightType,
    spellings: BTreeMap<String, String>,
    error: Option<ModelError>,
}

impl Loader<'_> {
    fn read<const D: usize>(&self, key: &str, shape: [usize; D]) -> Result<TensorData, ModelError> {
        let data = self.files.read_as(key, self.dtype, storage(D, self.dtype), shape)?;
        if !all_finite(&data) {
            return Err(ModelError::NotFinite { path: self.files.path().to_owned(), key: key.to_owned() });
        }
        Ok(data)
    }
}

impl NamedMapper for Loader<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = parameter.lazy_shape().dims::<D>();
        match self.read(&self.spellings[&self.keys.key(name)], shape) {
            Ok(data) => fill(parameter, data),
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
        fill(parameter, TensorData::new(values, shape))
    }
}

fn fill<const D: usize>(parameter: Param<Tensor<D>>, data: TensorData) -> Param<Tensor<D>> {
    let options = (&parameter.lazy_device(), data.dtype());
    let (id, tensor) = (parameter.id, Tensor::from_data(data, options));
    parameter.transform_for_load(tensor, id)
}

fn all_finite(data: &TensorData) -> bool {
    let read = "read in this type";
    match data.dtype() {
        DType::BF16 => data.as_slice::<bf16>().expect(read).iter().all(|value| value.is_finite()),
        DType::F16 => data.as_slice::<f16>().expect(read).iter().all(|value| value.is_finite()),
        _ => data.as_slice::<f32>().expect(read).iter().all(|value| value.is_finite()),
    }
}
