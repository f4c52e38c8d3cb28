//! Parameters as host memory: reading without a copy where the device is the CPU, and writing.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
pub(crate) use fewstep_kernels::with_values;
use fewstep_models::{Model, NamedMapper, NamedVisitor, map_named, visit_named};

/// Shape and values of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HostTensor {
    /// Its shape.
    pub(crate) shape: Vec<usize>,
    /// Its elements in row-major order.
    pub(crate) values: Vec<f32>,
}

impl HostTensor {
    /// The `[C, H, W]` of each sample of a batch `[B, C, H, W]`.
    pub(crate) fn rows(batch: Tensor<4>) -> Vec<Self> {
        let [_, channels, height, width] = batch.dims();
        let shape = vec![channels, height, width];
        let values = to_vec(batch);
        let rows = values.chunks_exact(channels * height * width);
        rows.map(|row| Self { shape: shape.clone(), values: row.to_vec() }).collect()
    }

    /// The batch `[B, C, H, W]` of one sample `[C, H, W]` or more, all of one shape.
    pub(crate) fn stack(rows: &[&Self], device: &Device) -> Tensor<4> {
        let [channels, height, width] = rows[0].shape[..] else {
            panic!("a sample has shape {:?}, expected [C, H, W]", rows[0].shape)
        };
        let values = rows.iter().flat_map(|row| row.values.iter().copied()).collect();
        Tensor::from_data(TensorData::new(values, [rows.len(), channels, height, width]), device)
    }
}

/// Parameters by name.
pub(crate) type HostTensors = BTreeMap<String, HostTensor>;

/// A tensor's elements in row-major order.
pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect("a float tensor can be read as f32")
}

/// Copies the parameters whose gradient is kept.
pub(crate) fn trainable_values(model: &Model) -> HostTensors {
    struct Reader(HostTensors);
    impl NamedVisitor for Reader {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if parameter.is_require_grad() {
                let shape = parameter.dims().to_vec();
                let values = with_values(parameter.val(), <[f32]>::to_vec);
                self.0.insert(name.to_owned(), HostTensor { shape, values });
            }
        }
    }
    let mut reader = Reader(BTreeMap::new());
    visit_named(model, &mut reader);
    reader.0
}

/// Replaces the parameters that `values` names; gradient settings stay.
pub(crate) fn with_parameters<'a>(model: Model, values: impl Fn(&str) -> Option<&'a [f32]>) -> Model {
    struct Writer<F>(F);
    impl<'a, F: Fn(&str) -> Option<&'a [f32]>> NamedMapper for Writer<F> {
        fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(values) = (self.0)(name) else { return parameter };
            let (id, old, mapper) = parameter.consume();
            let new = Tensor::from_data(TensorData::new(values.to_vec(), old.dims()), &old.device());
            Param::from_mapped_value(id, new.set_require_grad(old.is_require_grad()), mapper)
        }
    }
    map_named(model, &mut Writer(values))
}
