//! Golden numbers: safetensors files under `goldens/` at the workspace root.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::Metadata};

/// The path of a golden file, given relative to `goldens/`.
pub fn golden(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens").join(relative)
}

/// A safetensors file of golden numbers, read whole.
pub struct Golden {
    path: PathBuf,
    bytes: Vec<u8>,
    data_start: usize,
    metadata: Metadata,
}

impl Golden {
    /// Reads a file, usually one named by [`golden`].
    #[track_caller]
    pub fn open(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref().to_path_buf();
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path, bytes, data_start: header + LENGTH_BYTES, metadata }
    }

    /// All keys, sorted.
    pub fn keys(&self) -> Vec<String> {
        let mut keys = self.metadata.offset_keys();
        keys.sort();
        keys
    }

    /// The shape stored under a key.
    #[track_caller]
    pub fn shape(&self, key: &str) -> Vec<usize> {
        self.entry(key).0.shape.clone()
    }

    /// A float tensor of any stored width, as f32 on the device.
    #[track_caller]
    pub fn tensor<const D: usize>(&self, key: &str, device: &Device) -> Tensor<D> {
        let shape = self.shape(key);
        assert_eq!(shape.len(), D, "{}: {key} has shape {shape:?}, expected rank {D}", self.path.display());
        Tensor::from_data(TensorData::new(self.f32s(key), shape), device)
    }

    /// Float elements of any stored width, rounded to f32.
    #[track_caller]
    pub fn f32s(&self, key: &str) -> Vec<f32> {
        self.f64s(key).into_iter().map(|x| x as f32).collect()
    }

    /// Float elements of any stored width, exactly.
    #[track_caller]
    pub fn f64s(&self, key: &str) -> Vec<f64> {
        let (info, bytes) = self.entry(key);
        match info.dtype {
            Dtype::F64 => decode(bytes, f64::from_le_bytes),
            Dtype::F32 => decode(bytes, |b| f64::from(f32::from_le_bytes(b))),
            Dtype::F16 => decode(bytes, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).to_f64()),
            other => panic!("{}: {key} is {other:?}, expected floats", self.path.display()),
        }
    }

    /// Integer (or boolean) elements of any stored width.
    #[track_caller]
    pub fn i64s(&self, key: &str) -> Vec<i64> {
        let (info, bytes) = self.entry(key);
        match info.dtype {
            Dtype::I64 => decode(bytes, i64::from_le_bytes),
            Dtype::I32 => decode(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Dtype::U8 | Dtype::BOOL => bytes.iter().map(|&b| i64::from(b)).collect(),
            other => panic!("{}: {key} is {other:?}, expected integers", self.path.display()),
        }
    }

    #[track_caller]
    fn entry(&self, key: &str) -> (&safetensors::tensor::TensorInfo, &[u8]) {
        let info = self.metadata.info(key).unwrap_or_else(|| panic!("{}: no key {key}", self.path.display()));
        let (start, end) = info.data_offsets;
        (info, &self.bytes[self.data_start + start..self.data_start + end])
    }
}

/// Bytes of the header length that opens a safetensors file.
const LENGTH_BYTES: usize = 8;

fn decode<T, const N: usize>(bytes: &[u8], element: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| element(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    #[test]
    fn every_stored_width_reads_back() {
        let floats: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let integers: Vec<u8> = [7i64, -8].iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = |dtype, bytes| TensorView::new(dtype, vec![1, 2], bytes).unwrap();
        let tensors = [
            ("f", view(Dtype::F32, &floats)),
            ("h", view(Dtype::BF16, &halves)),
            ("i", view(Dtype::I64, &integers)),
        ];
        let path = std::env::temp_dir().join(format!("fewstep-testkit-{}.safetensors", std::process::id()));
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let read = Golden::open(&path);
        std::fs::remove_file(&path).unwrap();

        assert_eq!(read.keys(), ["f", "h", "i"]);
        assert_eq!(read.f32s("f"), [1.5, -2.0]);
        assert_eq!(read.f32s("h"), [1.5, -2.0]);
        assert_eq!(read.i64s("i"), [7, -8]);
        assert_eq!(crate::values(read.tensor::<2>("f", &Device::flex())), [1.5, -2.0]);
    }
}
