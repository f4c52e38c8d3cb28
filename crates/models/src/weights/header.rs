//! The header of a safetensors file, checked in full before a byte of a tensor is read.
//!
//! A file is eight bytes that say how long the header is, the header as JSON, and the tensors' bytes one after the other
//! without gaps. The safetensors crate checks most of what is checked here, but it lets a name that stands there twice
//! replace the one before, and its messages do not say which tensor is at fault and with what.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::ops::Range;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::TensorEntry;

/// The longest header read; the safetensors crate has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes before the header, which say how long it is.
const LENGTH_BYTES: u64 = 8;
/// The most dimensions of a tensor; torch has the same limit.
const MAX_RANK: usize = 64;
/// Of names in messages: a hostile name may be as long as the header.
const SHOWN_CHARS: usize = 200;

/// What a file says of its tensors and of itself.
#[derive(Debug)]
pub(crate) struct Header {
    /// The tensors in the order of their bytes, and where these stand in the file.
    pub(crate) tensors: Vec<(TensorEntry, Range<u64>)>,
    /// The entry `__metadata__`; empty where there is none.
    pub(crate) info: BTreeMap<String, String>,
}

impl Header {
    /// Reads and checks the header of a file of `file_bytes` bytes. No more is allocated than the header is long, a
    /// small factor aside.
    ///
    /// # Errors
    /// Says what is wrong, found against expected.
    pub(crate) fn read(file: impl Read, file_bytes: u64) -> Result<Self, String> {
        let json = read_json(file, file_bytes)?;
        let start = LENGTH_BYTES + json.len() as u64;
        let raw: RawHeader = serde_json::from_slice(&json)
            .map_err(|error| format!("its header: {}", shown(&error.to_string())))?;
        let tensors = place(raw.tensors, file_bytes - start)?;
        let moved =
            |(entry, range): (TensorEntry, Range<u64>)| (entry, start + range.start..start + range.end);
        Ok(Self { tensors: tensors.into_iter().map(moved).collect(), info: raw.info })
    }
}

fn read_json(mut file: impl Read, file_bytes: u64) -> Result<Vec<u8>, String> {
    let unread = |error: std::io::Error| format!("its header cannot be read: {error}");
    let Some(room) = file_bytes.checked_sub(LENGTH_BYTES) else {
        return Err(format!(
            "found {file_bytes} bytes, expected at least the {LENGTH_BYTES} of a header's length"
        ));
    };
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(unread)?;
    let (length, most) = (u64::from_le_bytes(length), room.min(MAX_HEADER_BYTES));
    if length > most {
        return Err(format!("its header should be {length} bytes long, expected at most {most}"));
    }
    let mut json = vec![0; length as usize];
    file.read_exact(&mut json).map_err(unread)?;
    Ok(json)
}

/// Sorts tensors by place and checks that they fill `data_bytes` without gap or overlap.
fn place(raw: Vec<(String, RawTensor)>, data_bytes: u64) -> Result<Vec<(TensorEntry, Range<u64>)>, String> {
    let mut tensors = Vec::with_capacity(raw.len());
    for (key, tensor) in raw {
        let placed = tensor.check(&key, data_bytes);
        tensors.push(placed.map_err(|reason| format!("tensor {}: {reason}", shown(&key)))?);
    }
    tensors.sort_by_key(|(_, range)| (range.start, range.end));
    let mut end = 0;
    for (entry, range) in &tensors {
        if range.start != end {
            let fault = if range.start < end { "overlap those of another tensor" } else { "leave a gap" };
            let key = shown(&entry.key);
            return Err(format!(
                "tensor {key}: its bytes start at {}, expected {end}: they {fault}",
                range.start
            ));
        }
        end = range.end;
    }
    match end == data_bytes {
        true => Ok(tensors),
        false => Err(format!("found {data_bytes} bytes behind its header, expected {end} by its tensors")),
    }
}

/// A tensor as the header spells it.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    /// The tensor by itself, and the range of its bytes behind the header.
    fn check(self, key: &str, data_bytes: u64) -> Result<(TensorEntry, Range<u64>), String> {
        let Self { dtype, shape, data_offsets: [start, end] } = self;
        let bits = Dtype::deserialize(StrDeserializer::<serde::de::value::Error>::new(&dtype))
            .map_err(|_| format!("found number type {:?}, expected one such as F32 or BF16", shown(&dtype)))?
            .bitsize();
        if shape.len() > MAX_RANK {
            return Err(format!("found {} dimensions, expected at most {MAX_RANK}", shape.len()));
        }
        if start > end || end > data_bytes {
            return Err(format!(
                "found data_offsets [{start}, {end}], expected them to rise within {data_bytes} bytes"
            ));
        }
        let elements = shape.iter().try_fold(1_usize, |product, side| product.checked_mul(*side));
        let size = elements.and_then(|elements| elements.checked_mul(bits)).filter(|bits| bits % 8 == 0);
        if size.map(|bits| bits as u64 / 8) != Some(end - start) {
            return Err(format!(
                "found {} bytes, expected those of {dtype} numbers in shape {shape:?}",
                end - start
            ));
        }
        let entry = TensorEntry { key: key.to_owned(), dtype, shape, bytes: (end - start) as usize };
        Ok((entry, start..end))
    }
}

/// The header's JSON, in which no tensor may stand twice.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    info: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut seen = BTreeSet::new();
                let mut header = RawHeader { tensors: Vec::new(), info: BTreeMap::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("{} stands there twice", shown(&key))));
                    }
                    match key.as_str() {
                        "__metadata__" => header.info = map.next_value::<Option<_>>()?.unwrap_or_default(),
                        _ => header.tensors.push((key, map.next_value()?)),
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The beginning of a text from a file.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with a file of this header and as many bytes behind it.
    fn refusal(header: &str, data_bytes: usize) -> String {
        let file = framed(header.len() as u64, header, data_bytes);
        Header::read(file.as_slice(), file.len() as u64).expect_err(header)
    }

    fn framed(length: u64, header: &str, data_bytes: usize) -> Vec<u8> {
        [&length.to_le_bytes(), header.as_bytes(), &vec![0; data_bytes]].concat()
    }

    fn tensor(name: &str, dtype: &str, shape: &str, offsets: [u64; 2]) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets:?}}}"#)
    }

    #[test]
    fn every_type_is_read_as_the_safetensors_crate_reads_it() {
        let header = [
            r#""__metadata__":{"format":"pt"}"#.to_owned(),
            tensor("bits", "F4", "[4]", [12, 14]),
            tensor("none", "F32", "[0, 7]", [14, 14]),
            tensor("scalar", "F64", "[]", [14, 22]),
            tensor("matrix", "BF16", "[2, 3]", [0, 12]),
        ];
        let file = framed(header.join(",").len() as u64 + 2, &format!("{{{}}}", header.join(",")), 22);
        let read = Header::read(file.as_slice(), file.len() as u64).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.info, BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
        assert_eq!(read.tensors.len(), theirs.len());
        for (entry, range) in read.tensors {
            let view = theirs.tensor(&entry.key).unwrap();
            assert_eq!((view.shape(), view.data().len()), (entry.shape.as_slice(), entry.bytes));
            assert_eq!(format!("{:?}", view.dtype()), entry.dtype);
            let at = view.data().as_ptr() as usize - file.as_ptr() as usize;
            assert_eq!(range, at as u64..(at + entry.bytes) as u64);
        }
    }

    #[test]
    fn a_length_past_the_file_is_refused_before_anything_is_allocated() {
        for length in [u64::MAX, u64::MAX - 7, 1 << 40, 3] {
            let file = framed(length, "{}", 0);
            assert_eq!(
                Header::read(file.as_slice(), file.len() as u64).unwrap_err(),
                format!("its header should be {length} bytes long, expected at most 2")
            );
        }
        let sparse = Header::read(framed(1 << 40, "{}", 0).as_slice(), 1 << 41).unwrap_err();
        assert!(sparse.ends_with("expected at most 100000000"), "{sparse}");
        let short = Header::read(&b"\0\0\0"[..], 3).unwrap_err();
        assert_eq!(short, "found 3 bytes, expected at least the 8 of a header's length");
    }

    #[test]
    fn a_place_that_is_not_the_tensors_own_is_named() {
        let two = |first, second| {
            let tensors = [tensor("a", "F32", "[2]", first), tensor("b", "F32", "[2]", second)];
            format!("{{{}}}", tensors.join(","))
        };
        let overlap = refusal(&two([0, 8], [4, 12]), 12);
        assert_eq!(
            overlap,
            "tensor b: its bytes start at 4, expected 8: they overlap those of another tensor"
        );
        let gap = refusal(&two([0, 8], [9, 17]), 17);
        assert_eq!(gap, "tensor b: its bytes start at 9, expected 8: they leave a gap");
        let behind = refusal(&two([0, 8], [8, 16]), 20);
        assert_eq!(behind, "found 20 bytes behind its header, expected 16 by its tensors");
        for offsets in [[8, 0], [0, u64::MAX], [u64::MAX, u64::MAX], [8, 17]] {
            let outside = refusal(&two([0, 8], offsets), 16);
            assert_eq!(
                outside,
                format!("tensor b: found data_offsets {offsets:?}, expected them to rise within 16 bytes")
            );
        }
    }

    #[test]
    fn a_shape_that_does_not_make_the_bytes_is_named() {
        let most = usize::MAX;
        let shapes = ["[3]", "[]", "[0]", &format!("[{most}, {most}]"), &format!("[{most}]")];
        for shape in shapes {
            let found = refusal(&format!("{{{}}}", tensor("a", "F32", shape, [0, 8])), 8);
            assert_eq!(
                found,
                format!("tensor a: found 8 bytes, expected those of F32 numbers in shape {shape}")
            );
        }
        let nibble = refusal(&format!("{{{}}}", tensor("a", "F4", "[3]", [0, 1])), 1);
        assert!(nibble.contains("expected those of F4 numbers in shape [3]"), "{nibble}");
        let deep = format!("[{}1]", "1,".repeat(64));
        let found = refusal(&format!("{{{}}}", tensor("a", "U8", &deep, [0, 1])), 1);
        assert_eq!(found, "tensor a: found 65 dimensions, expected at most 64");
        let dtype = refusal(&format!("{{{}}}", tensor("a", "F33", "[1]", [0, 8])), 8);
        assert_eq!(dtype, "tensor a: found number type \"F33\", expected one such as F32 or BF16");
    }

    #[test]
    fn a_header_that_is_not_as_it_should_be_is_named() {
        let entry = tensor("a", "U8", "[1]", [0, 1]);
        let nested = format!(r#"{{"__metadata__":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        let cases = [
            (format!("{{{entry},{entry}}}"), "a stands there twice"),
            (
                r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#.into(),
                "invalid value: integer `-1`",
            ),
            (
                r#"{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#.into(),
                "invalid type: floating point",
            ),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}"#.into(), "invalid length 1"),
            (r#"{"a":{"shape":[1],"data_offsets":[0,1]}}"#.into(), "missing field `dtype`"),
            (r#"{"__metadata__":{"a":1}}"#.into(), "invalid type: integer `1`, expected a string"),
            (format!("{{{entry}}} x"), "trailing characters"),
            ("[]".into(), "expected an object of tensors"),
            ("".into(), "EOF"),
            (nested, "expected a map"),
            (format!(r#"{{"a":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000)), "invalid type"),
            (
                format!(r#"{{"a":{{"x":{}{},"dtype":"U8"}}}}"#, "[".repeat(100_000), "]".repeat(100_000)),
                "missing field",
            ),
        ];
        for (header, expected) in cases {
            let error = refusal(&header, 1);
            assert!(error.starts_with("its header: ") && error.contains(expected), "{error}");
            assert!(error.len() < 400, "{error}");
        }
        let latin = [&3_u64.to_le_bytes()[..], b"{\"\xff"].concat();
        assert!(Header::read(latin.as_slice(), 11).unwrap_err().starts_with("its header: "));
    }
}
