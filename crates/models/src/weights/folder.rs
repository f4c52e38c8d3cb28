//! Whole component folders: copied file by file, or written as shards with their index.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::TensorEntry;
use super::write::{Source, write_streamed};
use crate::ModelError;

/// Copies the files that `keep` accepts, folders included, byte for byte. A target inside the source is no part of
/// what is copied.
pub(crate) fn copy_tree(
    source: &Path,
    target: &Path,
    keep: &dyn Fn(&Path) -> bool,
) -> Result<(), ModelError> {
    let entries = fs::read_dir(source).map_err(ModelError::io(source))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>();
    let paths = paths.map_err(ModelError::io(source))?;
    fs::create_dir_all(target).map_err(ModelError::io(target))?;
    for path in paths.iter().filter(|path| !target.starts_with(path)) {
        let copy = target.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_tree(path, &copy, keep)?;
        } else if keep(path) {
            fewstep_data::atomic::copy(path, &copy).map_err(ModelError::io(path))?;
        }
    }
    Ok(())
}

/// Whether a file holds weights or is the index of such files.
pub(crate) fn is_weights(path: &Path) -> bool {
    let name = path.to_string_lossy();
    name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
}

/// Where and how the tensors of one component are written.
pub(crate) struct Shards<'a> {
    /// The component's folder.
    pub(crate) folder: &'a Path,
    /// Start of the files' names, such as `diffusion_pytorch_model`.
    pub(crate) name: &'a str,
    /// A file ends before it outgrows this; a larger tensor has a file of its own.
    pub(crate) max_bytes: usize,
    /// The metadata of every file.
    pub(crate) info: &'a BTreeMap<String, String>,
}

/// Writes tensors as one file, or as shards with an index where one file would be too large; `data` makes each
/// tensor's bytes when its turn has come.
pub(crate) fn write_shards<'a>(
    shards: &Shards<'_>,
    entries: &[TensorEntry],
    data: Source<'_, 'a>,
) -> Result<(), ModelError> {
    let parts = split(entries, shards.max_bytes);
    let mut weight_map = BTreeMap::new();
    for (index, part) in parts.iter().enumerate() {
        let file = match parts.len() {
            1 => format!("{}.safetensors", shards.name),
            count => format!("{}-{:05}-of-{count:05}.safetensors", shards.name, index + 1),
        };
        write_streamed(&shards.folder.join(&file), part, shards.info, data)?;
        weight_map.extend(part.iter().map(|entry| (entry.key.as_str(), file.clone())));
    }
    if parts.len() == 1 {
        return Ok(());
    }
    let total_size: usize = entries.iter().map(|entry| entry.bytes).sum();
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    let text = serde_json::to_string_pretty(&index).expect("plain values always serialise");
    let path = shards.folder.join(format!("{}.safetensors.index.json", shards.name));
    fewstep_data::atomic::write(&path, text.as_bytes()).map_err(ModelError::io(&path))
}

/// Runs of tensors that fit into one file each; at least one run.
fn split(entries: &[TensorEntry], max_bytes: usize) -> Vec<&[TensorEntry]> {
    let (mut parts, mut start, mut size) = (Vec::new(), 0, 0);
    for (index, entry) in entries.iter().enumerate() {
        if size + entry.bytes > max_bytes && index > start {
            parts.push(&entries[start..index]);
            (start, size) = (index, 0);
        }
        size += entry.bytes;
    }
    parts.push(&entries[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn entry(key: &str, bytes: usize) -> TensorEntry {
        TensorEntry { key: key.into(), dtype: "F32".into(), shape: vec![bytes / 4], bytes }
    }

    #[test]
    fn a_shard_ends_before_it_outgrows_its_limit() {
        let entries = [entry("a", 8), entry("b", 8), entry("c", 24), entry("d", 4), entry("e", 12)];
        let sizes = |limit| split(&entries, limit).iter().map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(sizes(16), [2, 1, 2]);
        assert_eq!(sizes(56), [5]);
        assert_eq!(sizes(1), [1, 1, 1, 1, 1]);
    }

    #[test]
    fn shards_are_read_back_through_their_index() {
        let folder = tempfile::tempdir().unwrap();
        let entries = [entry("a", 8), entry("b", 8), entry("c", 24)];
        let info = BTreeMap::from([("origin".to_owned(), "test".to_owned())]);
        let shards = Shards { folder: folder.path(), name: "model", max_bytes: 16, info: &info };
        let values = |entry: &TensorEntry| vec![f32::from(entry.key.as_bytes()[0]); entry.bytes / 4];
        let bytes = |entry: &TensorEntry| values(entry).iter().flat_map(|v| v.to_le_bytes()).collect();
        write_shards(&shards, &entries, &mut |entry| Ok(Cow::Owned(bytes(entry)))).unwrap();
        let files = crate::WeightFiles::open(folder.path()).unwrap();
        assert_eq!(files.entries(), entries);
        for entry in &entries {
            assert_eq!(files.read(&entry.key).unwrap(), (entry.shape.clone(), values(entry)));
        }
        let second = folder.path().join("model-00002-of-00002.safetensors");
        assert_eq!(crate::read_info(&second).unwrap()["origin"], "test");
        let index = fs::read_to_string(folder.path().join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 40);
    }
}
