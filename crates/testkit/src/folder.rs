//! Whole folders: copied, or read to be compared.

#![allow(clippy::unwrap_used)] // For tests only: a failure ends the test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Copies the files that `keep` accepts, folders included.
///
/// # Panics
/// If a file cannot be read or written.
pub fn copy_folder(source: &Path, target: &Path, keep: &dyn Fn(&Path) -> bool) {
    fs::create_dir_all(target).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let copy = target.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &copy, keep);
        } else if keep(&path) {
            fs::copy(&path, copy).unwrap();
        }
    }
}

/// Every file below a folder with its bytes, by its path in it.
///
/// # Panics
/// If a file cannot be read.
pub fn folder_files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}
