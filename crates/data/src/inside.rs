//! Whether a file that a data set names lies in the data set's folder: by its path, and with links followed.

use std::fs;
use std::path::{Component, Path};

use crate::DataError;

/// Whether a path, as written, is relative and leads to something below its base.
///
/// A backslash is refused: it is a separator on Windows and part of a name elsewhere, so the same data set would be
/// another one there.
pub(crate) fn is_below(path: &str) -> bool {
    if path.contains(['\\', '\0']) {
        return false;
    }
    let mut depth = 0_i64;
    let below = Path::new(path).components().all(|component| {
        depth += match component {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            Component::RootDir | Component::Prefix(_) => return false,
        };
        depth >= 0
    });
    below && depth > 0
}

/// Checks that a file lies in `base` when all links are followed.
///
/// # Errors
/// If it does not, or one of the two cannot be found.
pub fn check_inside(base: &Path, file: &Path) -> Result<(), DataError> {
    let real = |path: &Path| fs::canonicalize(path).map_err(DataError::io(path));
    let (root, target) = (real(base)?, real(file)?);
    match target.starts_with(&root) {
        true => Ok(()),
        false => Err(DataError::Outside { path: file.into(), target, base: base.into() }),
    }
}
