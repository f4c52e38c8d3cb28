//! Weight files: memory-mapped safetensors, single or sharded, read into modules and written from them.

mod files;
mod fill;
mod write;

pub(crate) use files::component_files;
pub use files::{WeightFiles, read_info, weights_hash};
pub(crate) use fill::{initialize, load};
pub use write::{WeightType, save_tensors};
pub(crate) use write::{collect, values, write};

/// How a module's parameter names and the keys of its weight files correspond.
///
/// Both lists belong to a family. A name is turned into a key by replacing the first rule whose left
/// side occurs in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyMap {
    /// Prefix of every key in the files, such as `model.`.
    pub(crate) prefix: &'static str,
    /// `(in the module's name, in the file's key)`.
    pub(crate) rules: &'static [(&'static str, &'static str)],
    /// Prefixes of keys the files may hold and the model does not use.
    pub(crate) ignored: &'static [&'static str],
}

impl KeyMap {
    /// The file's key of a parameter's name.
    pub(crate) fn key(&self, name: &str) -> String {
        let rule = self.rules.iter().find(|(ours, _)| name.contains(ours));
        let renamed = rule.map_or_else(|| name.to_owned(), |(ours, theirs)| name.replacen(ours, theirs, 1));
        format!("{}{renamed}", self.prefix)
    }
}
