//! Reading: which file holds which key, checked and memory-mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{ModelError, ModelSource};

/// The tensors of one weight file or of all shards of one component.
pub struct WeightFiles {
    path: PathBuf,
    maps: Vec<(PathBuf, Mmap)>,
    /// Key → index into `maps`.
    keys: BTreeMap<String, usize>,
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
        write!(f, "WeightFiles({}, {} tensors)", self.path.display(), self.keys.len())
    }
}

impl WeightFiles {
    /// Opens a safetensors file, or the shards of a component's folder.
    ///
    /// # Errors
    /// If there is no such file, a shard named by an index is missing, or a header is damaged.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let mut opened = Self { path: path.to_owned(), maps: Vec::new(), keys: BTreeMap::new() };
        opened.add_all(path)?;
        Ok(opened)
    }

    /// Opens the files or folders that together hold one component.
    ///
    /// # Errors
    /// As [`WeightFiles::open`], or if there are none.
    pub(crate) fn open_all(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let first = paths.first().cloned().unwrap_or_default();
        let mut opened = Self { path: first, maps: Vec::new(), keys: BTreeMap::new() };
        for path in paths {
            opened.add_all(path)?;
        }
        Ok(opened)
    }

    fn add_all(&mut self, path: &Path) -> Result<(), ModelError> {
        let files = if path.is_dir() { component_files(path)? } else { vec![path.to_owned()] };
        files.into_iter().try_for_each(|file| self.add(file))
    }

    fn add(&mut self, path: PathBuf) -> Result<(), ModelError> {
        let map = map_file(&path)?;
        let tensors = parse(&path, &map)?;
        for key in tensors.names() {
            self.keys.insert(key.to_owned(), self.maps.len());
        }
        self.maps.push((path, map));
        Ok(())
    }

    /// The path that was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order they were opened.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.maps.iter().map(|(path, _)| path.clone()).collect()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// Whether a key is present.
    pub fn contains(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// What the headers say of every tensor, in the order of the keys.
    ///
    /// # Errors
    /// If a header is damaged.
    pub fn entries(&self) -> Result<Vec<TensorEntry>, ModelError> {
        let mut entries = Vec::with_capacity(self.keys.len());
        for (path, map) in &self.maps {
            for (key, view) in parse(path, map)?.iter() {
                let (dtype, shape) = (format!("{:?}", view.dtype()), view.shape().to_vec());
                entries.push(TensorEntry { key: key.to_owned(), dtype, shape, bytes: view.data().len() });
            }
        }
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    /// A tensor's bytes as they stand in the file, little-endian.
    ///
    /// # Errors
    /// If the key is absent.
    pub(crate) fn bytes(&self, key: &str) -> Result<&[u8], ModelError> {
        Ok(self.view(key)?.1.data())
    }

    /// The number type of a tensor as files spell it.
    ///
    /// # Errors
    /// If the key is absent.
    pub(crate) fn type_name(&self, key: &str) -> Result<String, ModelError> {
        Ok(format!("{:?}", self.view(key)?.1.dtype()))
    }

    /// Lets go of the memory that reading a tensor's pages took; they are read from the file again when needed.
    pub(crate) fn forget(&self, key: &str) {
        #[cfg(unix)]
        if let (Some(index), Ok(bytes)) = (self.keys.get(key), self.bytes(key)) {
            let map = &self.maps[*index].1;
            let offset = bytes.as_ptr() as usize - map.as_ptr() as usize;
            // SAFETY: the map is a read-only one of a file, so its pages come back with what they held.
            #[allow(unsafe_code)]
            let advised =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, bytes.len()) };
            // Only a hint: where the system does not take it, the memory goes when the file is closed.
            drop(advised);
        }
    }

    /// Shape and values of a tensor, as f32.
    ///
    /// # Errors
    /// If the key is absent or its type is no floating point type.
    pub fn read(&self, key: &str) -> Result<(Vec<usize>, Vec<f32>), ModelError> {
        let (path, view) = self.view(key)?;
        let values = to_f32(view.dtype(), view.data()).ok_or_else(|| ModelError::DataType {
            path: path.to_owned(),
            key: key.to_owned(),
            found: format!("{:?}", view.dtype()),
        })?;
        Ok((view.shape().to_vec(), values))
    }

    /// A tensor and the file it is in.
    fn view(&self, key: &str) -> Result<(&Path, TensorView<'_>), ModelError> {
        let missing = || ModelError::Keys {
            path: self.path.clone(),
            missing: vec![key.to_owned()],
            unknown: Vec::new(),
        };
        let (path, map) = &self.maps[*self.keys.get(key).ok_or_else(missing)?];
        Ok((path, parse(path, map)?.tensor(key).map_err(|_| missing())?))
    }
}

/// The `__metadata__` of a safetensors file; empty where it has none.
///
/// # Errors
/// If the file cannot be read or its header is damaged.
pub fn read_info(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let map = map_file(path)?;
    let (_, header) = SafeTensors::read_metadata(&map).map_err(|error| damaged(path, &error))?;
    Ok(header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// SHA-256 over the weight files of a model: component names, file names and bytes. Where the files lie does not
/// enter.
///
/// # Errors
/// If a file cannot be read.
pub fn weights_hash(source: &ModelSource) -> Result<String, ModelError> {
    let mut hash = Sha256::new();
    for (name, path) in source.weight_files()? {
        hash.update(name.as_bytes());
        hash_file(&path, &mut hash)?;
    }
    Ok(hex(hash.finalize().as_slice()))
}

/// SHA-256 of one file.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn file_hash(path: &Path) -> Result<String, ModelError> {
    let mut hash = Sha256::new();
    hash_file(path, &mut hash)?;
    Ok(hex(hash.finalize().as_slice()))
}

/// Read and not mapped: the pages of a map count as memory of the process until it is closed.
fn hash_file(path: &Path, hash: &mut Sha256) -> Result<(), ModelError> {
    let mut file = File::open(path).map_err(ModelError::io(path))?;
    std::io::copy(&mut file, hash).map_err(ModelError::io(path))?;
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
    let text = std::fs::read_to_string(index).map_err(ModelError::io(index))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| config(error.to_string()))?;
    let shards = json["weight_map"].as_object().ok_or_else(|| config("no object `weight_map`".into()))?;
    let mut files: Vec<PathBuf> =
        shards.values().filter_map(|name| Some(folder.join(name.as_str()?))).collect();
    files.sort();
    files.dedup();
    match files.iter().find(|file| !file.exists()) {
        Some(shard) => Err(ModelError::MissingShard { shard: shard.clone(), by: index.to_owned() }),
        None => Ok(files),
    }
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

fn map_file(path: &Path) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(ModelError::io(path))?;
    // SAFETY: the map is read-only; like every user of memory-mapped weights we rely on nobody
    // truncating the file while the process reads it.
    #[allow(unsafe_code)]
    unsafe { Mmap::map(&file) }.map_err(ModelError::io(path))
}

fn parse<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>, ModelError> {
    SafeTensors::deserialize(map).map_err(|error| damaged(path, &error))
}

fn damaged(path: &Path, error: &safetensors::SafeTensorError) -> ModelError {
    ModelError::Safetensors { path: path.to_owned(), reason: error.to_string() }
}

/// Little-endian numbers of a floating point type as f32; `None` for other types.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match dtype {
        Dtype::F32 => {
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::F16 => Some(pairs().map(|bits| f16::from_bits(bits).to_f32()).collect()),
        Dtype::BF16 => Some(pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
        _ => None,
    }
}
