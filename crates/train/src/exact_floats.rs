//! Numbers in JSON that are read back to the bit, for serde's `with`: serde_json's own reading may be off by one unit in
//! the last place. They are written as text, the shortest that stands for the number.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// For `serialize_with`.
pub(crate) fn serialize<S: Serializer>(numbers: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    numbers.iter().map(f64::to_string).collect::<Vec<_>>().serialize(serializer)
}

/// For `deserialize_with`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use crate::checkpoint::Progress;

    #[test]
    fn losses_come_back_to_the_bit() {
        let mut bits = 0x3fb9_9999_9999_999a_u64;
        let mut next = || {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            f64::from_bits(bits >> 2) // positive and finite
        };
        let progress = Progress { losses: (0..1000).map(|_| next()).collect(), ..Progress::default() };
        let json = serde_json::to_string(&progress).unwrap();
        assert_eq!(serde_json::from_str::<Progress>(&json).unwrap(), progress);
    }
}
