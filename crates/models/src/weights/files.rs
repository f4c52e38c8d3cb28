//! Reading: which file holds which key, its header checked, its numbers read when they are asked for.
//!
//! Files are read and not memory-mapped: one that another program shortens meanwhile is then an error and not the end of
//! the process (SIGBUS).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fewstep_data::bounded;
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;

use super::WeightType;
use super::header::Header;
use super::original::{self, Official, Rule};
use super::write::write_streamed;
use crate::ModelError;

/// The tensors of one weight file or of all shards of one component.
pub struct WeightFiles {
    path: PathBuf,
    files: Vec<(PathBuf, Mutex<File>)>,
    tensors: BTreeMap<String, Place>,
    /// Whether tensors were made of those of an original layout.
    made: bool,
}

/// Where a tensor is.
struct Place {
    /// Index into the files.
    file: usize,
    /// Of its bytes, one after the other.
    ranges: Vec<Range<u64>>,
    entry: TensorEntry,
}

impl Place {
    /// What is made of this tensor by rows of it.
    fn made(&self, official: Official) -> Self {
        let entry = |bytes| TensorEntry {
            key: official.key,
            dtype: self.entry.dtype.clone(),
            shape: official.shape,
            bytes,
        };
        let Some((parts, chosen)) = official.rows else {
            return Self { file: self.file, ranges: self.ranges.clone(), entry: entry(self.entry.bytes) };
        };
        let (start, bytes) = (self.ranges[0].start, (self.entry.bytes / parts) as u64);
        let range = |part: &usize| start + *part as u64 * bytes..start + (*part as u64 + 1) * bytes;
        let ranges: Vec<_> = chosen.iter().map(range).collect();
        Self { file: self.file, entry: entry(ranges.len() * bytes as usize), ranges }
    }
}

/// What the header of a file says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorEntry {
    /// Its name.
    pub key: String,
    /// Its number type as files spell it, such as `BF16`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its size in the file.
    pub bytes: usize,
}

impl TensorEntry {
    /// Numbers in the tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl std::fmt::Debug for WeightFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightFiles({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl WeightFiles {
    /// Opens a safetensors file, or the shards of a component's folder.
    ///
    /// # Errors
    /// If there is no such file, a shard named by an index is missing, a header is damaged, or two files hold a tensor
    /// of one name.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let mut opened = Self::none(path.to_owned());
        opened.add_all(path)?;
        Ok(opened)
    }

    /// Opens the files or folders that together hold one component.
    ///
    /// # Errors
    /// As [`WeightFiles::open`], or if there are none.
    pub(crate) fn open_all(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut opened = Self::none(paths.first().cloned().unwrap_or_default());
        for path in paths {
            opened.add_all(path)?;
        }
        Ok(opened)
    }

    fn none(path: PathBuf) -> Self {
        Self { path, files: Vec::new(), tensors: BTreeMap::new(), made: false }
    }

    fn add_all(&mut self, path: &Path) -> Result<(), ModelError> {
        let files = if path.is_dir() { component_files(path)? } else { vec![path.to_owned()] };
        files.into_iter().try_for_each(|file| self.add(file))
    }

    fn add(&mut self, path: PathBuf) -> Result<(), ModelError> {
        let (file, header) = open_file(&path)?;
        for (entry, range) in header.tensors {
            let place = Place { file: self.files.len(), ranges: vec![range], entry: entry.clone() };
            if let Some(other) = self.tensors.insert(entry.key.clone(), place) {
                let first = self.files[other.file].0.clone();
                return Err(ModelError::SameTensor { key: entry.key, first, second: path });
            }
        }
        self.files.push((path, Mutex::new(file)));
        Ok(())
    }

    /// The same tensors of the official layout, where some are in an original one. Those that no rule is about stay.
    pub(crate) fn officially(mut self, rules: &'static [Rule]) -> Self {
        let numbers = original::Numbers::of(rules, self.tensors.keys().map(String::as_str));
        let made = self.tensors.into_values().flat_map(|place| {
            let tensors = original::official(rules, &numbers, &place.entry.key, &place.entry.shape);
            match tensors.is_empty() {
                true => vec![place],
                false => tensors.into_iter().map(|tensor| place.made(tensor)).collect(),
            }
        });
        self.tensors = made.map(|place| (place.entry.key.clone(), place)).collect();
        self.made = true;
        self
    }

    /// Copies the files to a folder, those of an original layout as one file of the official.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub(crate) fn copy_officially(&self, folder: &Path) -> Result<(), ModelError> {
        if self.made {
            let bytes = &mut |entry: &TensorEntry| self.bytes(&entry.key).map(Cow::Owned);
            return write_streamed(&folder.join(OFFICIAL[0]), &self.entries(), &BTreeMap::new(), bytes);
        }
        self.files.iter().try_for_each(|(path, _)| {
            let target = folder.join(path.file_name().unwrap_or_default());
            fewstep_data::atomic::copy(path, &target).map_err(ModelError::io(path))
        })
    }

    /// The path that was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order they were opened.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(path, _)| path.clone()).collect()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a key is present.
    pub fn contains(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// What the headers say of every tensor, in the order of the keys.
    pub fn entries(&self) -> Vec<TensorEntry> {
        self.tensors.values().map(|place| place.entry.clone()).collect()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// If the key is absent.
    pub fn shape(&self, key: &str) -> Result<&[usize], ModelError> {
        Ok(&self.place(key)?.entry.shape)
    }

    /// A tensor's bytes as they stand in the file, little-endian.
    ///
    /// # Errors
    /// If the key is absent, or the file cannot be read or has become shorter.
    pub(crate) fn bytes(&self, key: &str) -> Result<Vec<u8>, ModelError> {
        self.part(key, 0..self.place(key)?.entry.bytes)
    }

    /// Some of a tensor's bytes, counted from its first.
    ///
    /// # Errors
    /// As [`WeightFiles::bytes`].
    pub(crate) fn part(&self, key: &str, part: Range<usize>) -> Result<Vec<u8>, ModelError> {
        let place = self.place(key)?;
        assert!(part.end <= place.entry.bytes, "{part:?} of {} bytes", place.entry.bytes);
        let (path, file) = &self.files[place.file];
        // A thread that panicked while it held the file left it readable: every read seeks first.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; part.len()];
        let (mut passed, mut filled) = (0, 0);
        for range in &place.ranges {
            let length = (range.end - range.start) as usize;
            let within = part.start.clamp(passed, passed + length)..part.end.clamp(passed, passed + length);
            let target = &mut bytes[filled..filled + within.len()];
            let start = SeekFrom::Start(range.start + (within.start - passed) as u64);
            let read = file.seek(start).and_then(|_| file.read_exact(target));
            read.map_err(ModelError::io(path))?;
            passed += length;
            filled += within.len();
        }
        Ok(bytes)
    }

    /// The number type of a tensor as files spell it.
    ///
    /// # Errors
    /// If the key is absent.
    pub(crate) fn type_name(&self, key: &str) -> Result<&str, ModelError> {
        Ok(&self.place(key)?.entry.dtype)
    }

    /// Shape and values of a tensor, as f32.
    ///
    /// # Errors
    /// If the key is absent, its type is no floating point type, a value is not finite, or the file cannot be read.
    pub fn read(&self, key: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let place = self.place(key)?;
        let (path, entry) = (|| self.files[place.file].0.clone(), &place.entry);
        let dtype = WeightType::from_name(&entry.dtype).ok_or_else(|| ModelError::DataType {
            path: path(),
            key: key.to_owned(),
            found: entry.dtype.clone(),
        })?;
        let (values, finite) = to_f32(dtype, &self.bytes(key)?);
        match finite {
            true => Ok((entry.shape.clone(), values)),
            false => Err(ModelError::NotFinite { path: path(), key: key.to_owned() }),
        }
    }

    fn place(&self, key: &str) -> Result<&Place, ModelError> {
        self.tensors.get(key).ok_or_else(|| ModelError::Keys {
            path: self.path.clone(),
            missing: vec![key.to_owned()],
            unknown: Vec::new(),
        })
    }
}

/// Opens one safetensors file and checks its header.
fn open_file(path: &Path) -> Result<(File, Header), ModelError> {
    let file = File::open(path).map_err(ModelError::io(path))?;
    let bytes = file.metadata().map_err(ModelError::io(path))?.len();
    let header = Header::read(&file, bytes);
    let header = header.map_err(|reason| ModelError::Safetensors { path: path.to_owned(), reason })?;
    Ok((file, header))
}

/// The `__metadata__` of a safetensors file; empty where it has none.
///
/// # Errors
/// If the file cannot be read or its header is damaged.
pub fn read_info(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    Ok(open_file(path)?.1.info)
}

/// Names of weights in the official layout, diffusers' and transformers'.
const OFFICIAL: [&str; 2] = ["diffusion_pytorch_model.safetensors", "model.safetensors"];

/// The weight files of a component's folder: the shards of the official index, or the official file; without those the
/// one index, the one file or the one set of shards there is, such as a variant's `model.fp16.safetensors`.
///
/// # Errors
/// If the folder holds no weights or several variants of them, or a shard is missing.
pub(crate) fn component_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let names = file_names(folder)?;
    let named = |name: &str| names.iter().any(|found| found == name).then(|| folder.join(name));
    if let Some(index) = OFFICIAL.iter().find_map(|name| named(&format!("{name}.index.json"))) {
        return indexed_files(folder, &index);
    }
    if let Some(file) = OFFICIAL.iter().find_map(|name| named(name)) {
        return Ok(vec![file]);
    }
    let indices: Vec<&String> = names.iter().filter(|name| is_index(name)).collect();
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    match (indices.as_slice(), files.as_slice()) {
        ([index], _) => indexed_files(folder, &folder.join(index)),
        ([], [file]) if shard_set(file).is_none() => Ok(vec![folder.join(file)]),
        ([], []) => {
            let missing =
                format!("{}/*.safetensors", folder.file_name().unwrap_or_default().to_string_lossy());
            let path = folder.parent().unwrap_or(folder).to_owned();
            Err(ModelError::NoModelFolder { path, missing })
        }
        _ => shards(folder, &files),
    }
}

/// Sorted names of the files in a folder; none where there is no folder.
fn file_names(folder: &Path) -> Result<Vec<String>, ModelError> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder))?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// `x.safetensors.index.json`, or a variant's `x.safetensors.index.fp16.json`.
fn is_index(name: &str) -> bool {
    name.contains(".safetensors.index.") && name.ends_with(".json")
}

fn indexed_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let config = |reason: String| ModelError::Config { path: index.to_owned(), reason };
    let text = bounded::read_text(index).map_err(ModelError::io(index))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| config(error.to_string()))?;
    let shards = json["weight_map"].as_object().ok_or_else(|| config("no object `weight_map`".into()))?;
    let named = |(key, name): (&String, &serde_json::Value)| match name.as_str() {
        Some(name) if is_file_name(name) => Ok(folder.join(name)),
        _ => Err(config(format!(
            "weight_map: {key:?} is in {name}, expected the name of a file beside the index"
        ))),
    };
    let mut files: Vec<PathBuf> = shards.iter().map(named).collect::<Result<_, _>>()?;
    files.sort();
    files.dedup();
    match files.iter().find(|file| !file.exists()) {
        Some(shard) => Err(ModelError::MissingShard { shard: shard.clone(), by: index.to_owned() }),
        None => Ok(files),
    }
}

/// Whether a name leads to no other folder.
fn is_file_name(name: &str) -> bool {
    !name.contains(['/', '\\', '\0']) && Path::new(name).file_name().is_some_and(|file| file == name)
}

/// Files named as all shards `x-00001-of-00003.safetensors` of one set.
fn shards(folder: &Path, files: &[&String]) -> Result<Vec<PathBuf>, ModelError> {
    let sets: Option<Vec<(&str, usize)>> = files.iter().map(|name| shard_set(name)).collect();
    let (stem, count) = match sets.as_deref() {
        Some([first, rest @ ..]) if rest.iter().all(|other| other == first) => *first,
        _ => {
            let files = files.iter().map(|name| (*name).clone()).collect();
            return Err(ModelError::Ambiguous { path: folder.to_owned(), files });
        }
    };
    let shard = |number| folder.join(format!("{stem}-{number:05}-of-{count:05}.safetensors"));
    let all: Vec<PathBuf> = (1..=count).map(shard).collect();
    match all.iter().find(|path| !path.exists()) {
        Some(missing) => Err(ModelError::MissingShard { shard: missing.clone(), by: folder.join(files[0]) }),
        None => Ok(all),
    }
}

/// Stem and number of shards of `stem-00001-of-00003.safetensors`.
fn shard_set(name: &str) -> Option<(&str, usize)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    number.parse::<usize>().ok()?;
    Some((stem, count.parse().ok()?))
}

/// Little-endian numbers as f32, and whether all are finite.
fn to_f32(dtype: WeightType, bytes: &[u8]) -> (Vec<f32>, bool) {
    let bits = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    match dtype {
        WeightType::F32 => convert(bytes, 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        WeightType::F16 => convert(bytes, 2, |pair| f16::from_bits(bits(pair)).to_f32()),
        WeightType::BF16 => convert(bytes, 2, |pair| bf16::from_bits(bits(pair)).to_f32()),
    }
}

/// Numbers converted and checked at once, in pieces that stay in the cache in between.
fn convert(bytes: &[u8], width: usize, number: impl Fn(&[u8]) -> f32 + Sync) -> (Vec<f32>, bool) {
    /// 64 KiB as f32.
    const PIECE: usize = 1 << 14;
    let mut values = vec![0.0; bytes.len() / width];
    let pieces = values.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE * width));
    let finite = pieces.map(|(values, bytes)| {
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(width)) {
            *value = number(bytes);
        }
        // Without an early end, so that the compiler makes vector instructions of it.
        values.iter().fold(true, |finite, value| finite & value.is_finite())
    });
    let finite = finite.reduce(|| true, |one, other| one & other);
    (values, finite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::save_tensors;

    fn file(folder: &Path, name: &str, keys: &[&str]) -> PathBuf {
        let path = folder.join(name);
        let tensors = keys.iter().map(|key| ((*key).to_owned(), vec![3], vec![1.0, -2.0, 3.5]));
        save_tensors(&path, tensors, WeightType::F32, &BTreeMap::new()).unwrap();
        path
    }

    #[test]
    fn a_value_that_is_not_finite_is_named_wherever_it_stands() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let count = 100_000; // more than one piece
        for dtype in [WeightType::F32, WeightType::F16, WeightType::BF16] {
            for (at, bad) in [(0, f32::NAN), (count / 2, f32::INFINITY), (count - 1, f32::NEG_INFINITY)] {
                let mut values: Vec<f32> = (0..count).map(|at| (at % 7) as f32).collect();
                let good = ("good".to_owned(), vec![count], values.clone());
                values[at] = bad;
                let tensors = [good.clone(), ("layer.weight".to_owned(), vec![count], values)];
                save_tensors(&path, tensors, dtype, &BTreeMap::new()).unwrap();
                let files = WeightFiles::open(&path).unwrap();
                assert_eq!(files.read("good").unwrap(), (good.1, good.2));
                let error = files.read("layer.weight").unwrap_err().to_string();
                let expected = "model.safetensors: tensor layer.weight holds a value that is not finite";
                assert!(error.contains(expected), "{error}");
            }
        }
    }

    #[test]
    fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), "model.safetensors", &["a"]);
        let files = WeightFiles::open(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
        let error = files.read("a").unwrap_err();
        assert!(matches!(&error, ModelError::Io { path: named, .. } if *named == path), "{error}");
    }

    #[test]
    fn a_tensor_in_two_shards_is_named_with_both() {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "model-00001-of-00002.safetensors", &["a", "b"]);
        file(folder.path(), "model-00002-of-00002.safetensors", &["b", "c"]);
        let error = WeightFiles::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("00001-of-00002") && error.contains("00002-of-00002"), "{error}");
        assert!(error.contains("both hold the tensor b\nhint: "), "{error}");
    }

    #[test]
    fn an_index_names_files_beside_it_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("transformer");
        file(folder.path(), "outside.safetensors", &["a"]);
        file(&inner, "inside.safetensors", &["a"]);
        let index = inner.join("model.safetensors.index.json");
        let open = |name: &str| {
            std::fs::write(&index, format!(r#"{{"weight_map": {{"a": {name}}}}}"#)).unwrap();
            WeightFiles::open(&inner).map_err(|error| error.to_string())
        };
        assert!(open(r#""inside.safetensors""#).unwrap().contains("a"));
        let absolute = format!("{:?}", folder.path().join("outside.safetensors"));
        let names =
            [r#""../outside.safetensors""#, &absolute, r#""..""#, r#""""#, r#""a\\b""#, r#""a\u0000b""#, "7"];
        for name in names {
            let error = open(name).unwrap_err();
            assert!(error.contains("index.json: weight_map: \"a\" is in "), "{error}");
            assert!(error.ends_with("expected the name of a file beside the index"), "{error}");
        }
        let missing = open(r#""gone.safetensors""#).unwrap_err();
        assert!(missing.contains("gone.safetensors: is missing, named by"), "{missing}");
        std::fs::write(&index, "[".repeat(100_000)).unwrap();
        assert!(WeightFiles::open(&inner).unwrap_err().to_string().contains("recursion limit exceeded"));
    }
}
