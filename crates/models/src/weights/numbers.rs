//! Tensors that are no weights, such as an optimiser's state: flat lists of numbers, kept to the bit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::write::write_streamed;
use super::{TensorEntry, WeightFiles};
use crate::ModelError;

/// The numbers of one tensor, lent where they are written and owned where they are read.
#[derive(Clone, Debug, PartialEq)]
pub enum Numbers<'a> {
    /// 32 bits each.
    F32(Cow<'a, [f32]>),
    /// 64 bits each.
    F64(Cow<'a, [f64]>),
    /// Codes of 8 bits each.
    U8(Cow<'a, [u8]>),
}

impl Numbers<'_> {
    fn entry(&self, key: &str) -> TensorEntry {
        let (dtype, len, width) = match self {
            Self::F32(values) => ("F32", values.len(), 4),
            Self::F64(values) => ("F64", values.len(), 8),
            Self::U8(codes) => ("U8", codes.len(), 1),
        };
        TensorEntry { key: key.to_owned(), dtype: dtype.to_owned(), shape: vec![len], bytes: len * width }
    }

    /// Bytes in a file, its header aside.
    pub fn size_bytes(&self) -> u64 {
        self.entry("").bytes as u64
    }

    fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::F32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F64(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::U8(codes) => Cow::Borrowed(codes),
        }
    }

    fn from_bytes(dtype: &str, bytes: &[u8]) -> Option<Self> {
        match dtype {
            "F32" => Some(Self::F32(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())),
            "F64" => Some(Self::F64(bytes.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x)).collect())),
            "U8" => Some(Self::U8(bytes.to_vec().into())),
            _ => None,
        }
    }
}

/// Writes lists of numbers into one safetensors file.
///
/// # Errors
/// If the file cannot be written; an older file of that name is then untouched.
pub fn save_numbers(path: &Path, numbers: &BTreeMap<String, Numbers<'_>>) -> Result<(), ModelError> {
    let entries: Vec<TensorEntry> = numbers.iter().map(|(key, numbers)| numbers.entry(key)).collect();
    write_streamed(path, &entries, &BTreeMap::new(), &mut |entry| Ok(numbers[&entry.key].bytes()))
}

/// Reads what [`save_numbers`] wrote.
///
/// # Errors
/// If the file cannot be read, is damaged, or has a tensor of another type.
pub fn read_numbers(path: &Path) -> Result<BTreeMap<String, Numbers<'static>>, ModelError> {
    let files = WeightFiles::open(path)?;
    let read = |entry: TensorEntry| {
        let numbers = Numbers::from_bytes(&entry.dtype, &files.bytes(&entry.key)?);
        let reason = || format!("tensor {} has type {}, expected F32, F64 or U8", entry.key, entry.dtype);
        let other = || ModelError::Safetensors { path: path.to_owned(), reason: reason() };
        Ok((entry.key.clone(), numbers.ok_or_else(other)?))
    };
    files.entries().into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let numbers = BTreeMap::from([
            ("a".to_owned(), Numbers::F32(Cow::Owned(vec![0.1, -0.0, f32::MIN_POSITIVE / 2.0]))),
            ("b".to_owned(), Numbers::F64(Cow::Owned(vec![0.1, 1e-300]))),
            ("c".to_owned(), Numbers::U8((0..=255).collect())),
        ]);
        save_numbers(&path, &numbers).unwrap();
        let read = read_numbers(&path).unwrap();
        assert_eq!(format!("{read:?}"), format!("{numbers:?}"));
    }
}
