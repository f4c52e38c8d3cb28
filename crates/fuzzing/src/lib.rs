//! What arbitrary bytes must not do to the readers of files: the bodies of the targets in `fuzz/`.
//!
//! Each function is one target. It panics when a reader panics, accepts what it should refuse, or says something else
//! about the same bytes when asked twice. `tests/seeds.rs` runs all of them over the files in `fuzz/seeds`, which holds a
//! few of every kind and what fuzzing has found, and over changed copies of these.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A target fails by panicking.

mod mutate;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use fewstep_data::image::{Picture, Size};
use fewstep_data::metadata::{Metadata, Row};
use fewstep_data::video::{Clip, Video};
use fewstep_models::WeightFiles;
use fewstep_models::lora::{LoraFormat, LoraWeights, convert};
use fewstep_train::Recipe;
use safetensors::SafeTensors;
use serde_json::json;
use tempfile::TempDir;

pub use mutate::Mutations;

/// A target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 6] = [
    ("metadata", metadata),
    ("safetensors", safetensors),
    ("lora", lora),
    ("recipe", recipe),
    ("picture", picture),
    ("video", video),
];

/// Bytes as a metadata file of each format.
pub fn metadata(bytes: &[u8]) {
    for name in ["m.csv", "m.json", "m.jsonl"] {
        let Ok(metadata) = Metadata::parse(Path::new(name), bytes.to_vec()) else { continue };
        // What is wrong with values is told by row.
        let _ = (metadata.captioned_rows(), metadata.distill_rows());
        metadata.rows.iter().for_each(check_row);
    }
}

fn check_row(row: &Row) {
    let names: BTreeSet<&str> = row.values.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), row.values.len(), "a column stands twice in {:?}", row.values);
    for (column, _) in &row.values {
        if let Ok(scale) = row.number(column) {
            assert!(scale.is_finite() && scale >= 0.0);
        }
        if let Ok(file) = row.relative_path(column) {
            let below: PathBuf = Path::new(file).components().collect();
            assert!(below.is_relative() && !below.starts_with(".."), "{file:?} leaves its folder");
        }
    }
}

/// Bytes as a safetensors file, and as the header of one whose tensors are zeros.
pub fn safetensors(bytes: &[u8]) {
    check_weights(bytes);
    if let Some(file) = zeros_behind(bytes) {
        check_weights(&file);
    }
}

/// What is accepted here, the safetensors crate accepts too and reads the same of it.
fn check_weights(bytes: &[u8]) {
    let path = scratch().join("weights.safetensors");
    fs::write(&path, bytes).unwrap();
    let Ok(files) = WeightFiles::open(&path) else { return };
    let theirs = SafeTensors::deserialize(bytes).expect("the safetensors crate reads what we read");
    let names: BTreeSet<&str> = theirs.names().into_iter().collect();
    assert_eq!(files.keys().collect::<BTreeSet<_>>(), names);
    for entry in files.entries() {
        let tensor = theirs.tensor(&entry.key).unwrap();
        assert_eq!(tensor.shape(), entry.shape);
        assert_eq!(format!("{:?}", tensor.dtype()), entry.dtype);
        if let Ok((shape, values)) = files.read(&entry.key) {
            assert_eq!(values.len(), shape.iter().product::<usize>());
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
}

/// A file with this header and as many zeros as it says; `None` where that is no JSON or more than a little.
fn zeros_behind(header: &[u8]) -> Option<Vec<u8>> {
    const MOST: u64 = 1 << 16;
    let json: serde_json::Value = serde_json::from_slice(header).ok()?;
    let ends = json.as_object()?.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    let data = ends.max().unwrap_or(0);
    (data <= MOST).then(|| framed(header, data as usize))
}

fn framed(header: &[u8], data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, &vec![0; data]].concat()
}

/// Lines as the keys of a LoRA file. What can be read stays the same when it is written in another spelling.
pub fn lora(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (path, other) = (scratch().join("lora.safetensors"), scratch().join("other.safetensors"));
    fs::write(&path, lora_of_keys(text)).unwrap();
    let Ok(lora) = LoraWeights::open(&path) else { return };
    for format in LoraFormat::ALL {
        let _ = fs::remove_file(&other);
        convert(&path, &other, format).unwrap();
        let again = LoraWeights::open(&other).unwrap();
        assert!(lora.layers().keys().eq(again.layers().keys()), "{:?}", again.layers());
        assert!(again.layers().values().all(|layer| layer.scale == 1.0));
        assert_eq!(again.format(), Some(format));
    }
}

/// A file in which every key names a `[2, 2]` matrix of ones, or the scalar 1 where it ends as an alpha does.
fn lora_of_keys(text: &str) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for key in text.lines() {
        let shape = if key.ends_with(".alpha") { vec![] } else { vec![2_usize, 2] };
        let start = data.len();
        let numbers = shape.iter().product();
        data.extend(std::iter::repeat_n(1_f32.to_le_bytes(), numbers).flatten());
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        if header.insert(key.to_owned(), entry).is_some() {
            data.truncate(start); // the same key again; the file is refused for its gap or taken without it
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = framed(header.as_bytes(), 0);
    file.extend(data);
    file
}

/// Bytes as a recipe. What can be read stays the same when it is written and read again.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("run.toml");
    let Ok(recipe) = Recipe::parse(path, text) else { return };
    let written = recipe.to_toml();
    let again = Recipe::parse(path, &written).unwrap();
    // As text, because a NaN is unlike itself.
    assert_eq!(again.to_toml(), written);
    assert_eq!(recipe.validate().is_ok(), again.validate().is_ok());
    let _ = recipe.differences(&Recipe::default());
}

/// The largest picture that is decoded.
const LARGEST_SIDE_PX: usize = 512;

/// The size that bytes claim as a picture, if a small one.
fn small_size(bytes: &[u8], path: &Path) -> Option<Size> {
    Picture::size_in(bytes, path).ok().filter(|size| size.height.max(size.width) <= LARGEST_SIDE_PX)
}

/// Bytes as a picture, if a small one.
pub fn picture(bytes: &[u8]) {
    let path = Path::new("picture");
    let Some(size) = small_size(bytes, path) else { return };
    if let Ok(picture) = Picture::decode(bytes, path) {
        assert_eq!(picture.size(), size);
        assert_eq!(picture.rgb.len(), 3 * size.height * size.width);
    }
}

/// Bytes as an animation, if a small one.
pub fn video(bytes: &[u8]) {
    let path = Path::new("video");
    let Some(size) = small_size(bytes, path) else { return };
    let clip = Clip { num_frames: 9, division: 4, remainder: 1 };
    if let Ok(video) = Video::decode(bytes.to_vec(), path, clip) {
        assert_eq!(video.size(), size);
        assert!([1, 5, 9].contains(&video.frames().len()));
        assert!(video.frames().iter().all(|frame| frame.rgb.len() == 3 * size.height * size.width));
        assert!(video.frames_per_second().is_none_or(|rate| rate.is_finite() && rate > 0.0));
    }
}

/// A folder for the files of this process, in memory where `TMPDIR` says so.
fn scratch() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path()
}
