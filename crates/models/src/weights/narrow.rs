//! Reading tensors as they are to be stored: half-width numbers are never expanded to f32 on the way.

use burn::tensor::TensorData;
use half::{bf16, f16};

use super::{WeightFiles, WeightType};
use crate::ModelError;

impl WeightFiles {
    /// A tensor rounded to one type and stored in another that holds those numbers.
    ///
    /// # Errors
    /// As [`WeightFiles::read`].
    pub(crate) fn read_as<const D: usize>(
        &self,
        key: &str,
        rounded_to: WeightType,
        stored_in: WeightType,
        shape: [usize; D],
    ) -> Result<TensorData, ModelError> {
        Ok(match stored_in {
            WeightType::F32 => {
                let (_, mut values) = self.read(key)?;
                rounded_to.round(&mut values);
                TensorData::new(values, shape)
            }
            WeightType::BF16 => TensorData::new(self.read_half(key, stored_in, bf16::from_bits)?, shape),
            WeightType::F16 => TensorData::new(self.read_half(key, stored_in, f16::from_bits)?, shape),
        })
    }

    /// The numbers of a tensor in a type of two bytes: the file's own bytes where it has them in that type.
    fn read_half<T>(
        &self,
        key: &str,
        dtype: WeightType,
        from_bits: impl Fn(u16) -> T,
    ) -> Result<Vec<T>, ModelError> {
        if self.type_name(key)? == dtype.name() {
            return Ok(halves(&self.bytes(key)?, from_bits));
        }
        let (_, values) = self.read(key)?;
        Ok(halves(&dtype.encode(&values), from_bits))
    }
}

fn halves<T>(bytes: &[u8], from_bits: impl Fn(u16) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|pair| from_bits(u16::from_le_bytes(*pair))).collect()
}

impl WeightType {
    /// Every value as the nearest number of the type.
    fn round(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
            Self::BF16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        }
    }
}
