//! Weight files: safetensors, single or sharded, read into modules and written from them.

mod files;
mod fill;
mod folder;
mod hash;
mod header;
mod narrow;
mod numbers;
mod original;
mod shapes;
mod write;

pub(crate) use files::component_files;
pub use files::{TensorEntry, WeightFiles, read_info};
pub(crate) use fill::{initialize, load, unfilled};
pub(crate) use folder::{Shards, copy_tree, is_weights, write_shards};
pub(crate) use hash::file_hash;
pub use hash::weights_hash;
pub use numbers::{Numbers, read_numbers, save_numbers};
pub(crate) use original::{Made, Rule};
pub use shapes::TensorShapes;
pub(crate) use shapes::{compare, expected};
pub(crate) use write::{RawTensor, carry_ignored, collect_component, values, write};
pub use write::{WeightType, save_streamed, save_tensors};

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
    /// Other spellings: `(prefix of a key in some files, the prefix meant)`, the first that fits counts.
    pub(crate) aliases: &'static [(&'static str, &'static str)],
    /// Other spellings inside a key: `(part of a key in some files, the part meant)`, all of which are replaced, once each
    /// and in their order. No key in the spelling of [`KeyMap::key`] has any of the left sides.
    pub(crate) respelled: &'static [(&'static str, &'static str)],
    /// Prefixes of keys the files may hold and the model does not use.
    pub(crate) ignored: &'static [&'static str],
}

impl KeyMap {
    /// Keys equal names.
    pub(crate) const PLAIN: KeyMap =
        KeyMap { prefix: "", rules: &[], aliases: &[], respelled: &[], ignored: &[] };

    /// The file's key of a parameter's name.
    pub(crate) fn key(&self, name: &str) -> String {
        let rule = self.rules.iter().find(|(ours, _)| name.contains(ours));
        let renamed = rule.map_or_else(|| name.to_owned(), |(ours, theirs)| name.replacen(ours, theirs, 1));
        format!("{}{renamed}", self.prefix)
    }

    /// A file's key in the spelling of [`KeyMap::key`].
    pub(crate) fn canonical(&self, key: &str) -> String {
        let alias = self.aliases.iter().find_map(|(from, to)| Some((key.strip_prefix(from)?, to)));
        let key = alias.map_or_else(|| key.to_owned(), |(rest, to)| format!("{to}{rest}"));
        self.respelled.iter().fold(key, |key, (from, to)| match key.contains(from) {
            true => key.replacen(from, to, 1),
            false => key,
        })
    }

    /// A key of [`KeyMap::key`] in the other spelling: the first alias that fits, otherwise the first part that does.
    pub(crate) fn respelled_back(&self, key: &str) -> String {
        let alias = self.aliases.iter().find_map(|(theirs, ours)| Some((theirs, key.strip_prefix(ours)?)));
        if let Some((theirs, rest)) = alias {
            return format!("{theirs}{rest}");
        }
        let rule = self.respelled.iter().find(|(_, ours)| key.contains(ours));
        rule.map_or_else(|| key.to_owned(), |(theirs, ours)| key.replacen(ours, theirs, 1))
    }

    /// Whether the model has no use for a key in that spelling.
    pub(crate) fn ignores(&self, key: &str) -> bool {
        self.ignored.iter().any(|prefix| key.starts_with(prefix))
    }
}
