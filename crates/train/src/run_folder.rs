//! The output folder of a run: its resolved recipe, and the rules that one folder holds one run and that one process at
//! a time works in it.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use fewstep_data::atomic;
use fewstep_data::disk::explained;

use crate::TrainError;
use crate::recipe::Recipe;

const RECIPE: &str = "run.toml";
const LOCK: &str = ".lock";

/// A run's folder while this process works in it.
///
/// The lock is the operating system's on an open file, so it ends with the process, however that ends.
pub(crate) struct RunFolder {
    path: PathBuf,
    /// The highest folder that had to be made.
    made: Option<PathBuf>,
    _lock: File,
}

impl RunFolder {
    /// Takes the recipe's folder, which is created where it is absent, and removes what killed runs left unfinished.
    ///
    /// Where the run is given up before [`RunFolder::write_recipe`], a folder made here is removed again.
    ///
    /// # Errors
    /// If it holds another run or foreign files, or another process works in it.
    pub(crate) fn claim(recipe: &Recipe) -> Result<Self, TrainError> {
        let path = recipe.output_path.clone();
        check(recipe)?;
        let absent = path.ancestors().take_while(|folder| !folder.exists() && **folder != *"").last();
        let made = absent.map(Path::to_owned);
        fs::create_dir_all(&path).map_err(TrainError::io(&path))?;
        let claimed = Self { _lock: lock(&path)?, path, made };
        check(recipe)?; // what came about before the lock was held
        atomic::remove_unfinished(&claimed.path).map_err(TrainError::io(&claimed.path))?;
        Ok(claimed)
    }

    /// Writes the resolved recipe, which makes the folder this run's.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write_recipe(&self, recipe: &Recipe, version: &str) -> Result<(), TrainError> {
        let path = self.path.join(RECIPE);
        let text =
            format!("# written by {version}; `fewstep train --config` takes this file\n{}", recipe.to_toml());
        atomic::write(&path, text.as_bytes()).map_err(TrainError::io(&path))
    }

    /// The folder for what is encoded and does not fit into memory.
    pub(crate) fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }

    /// Removes it where it is no longer of use.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub(crate) fn remove_cache(&self) -> Result<(), TrainError> {
        let cache = self.cache();
        if cache.exists() { atomic::remove_folder(&cache).map_err(TrainError::io(&cache)) } else { Ok(()) }
    }

    /// Removes the lock's file and the folders that were made, as far as they are empty.
    fn undo(&self) -> std::io::Result<()> {
        fs::remove_file(self.path.join(LOCK))?;
        let Some(made) = &self.made else { return Ok(()) };
        self.path.ancestors().take_while(|folder| folder.starts_with(made)).try_for_each(fs::remove_dir)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.path.join(RECIPE).exists() {
            // A folder that stays is no harm.
            let _ = self.undo();
        }
    }
}

/// Checks that the recipe's folder is empty, absent, or holds this very run.
pub(crate) fn check(recipe: &Recipe) -> Result<(), TrainError> {
    let folder = &recipe.output_path;
    let path = folder.join(RECIPE);
    if path.exists() {
        let differences = recipe.differences(&Recipe::read(&path)?);
        return match differences.is_empty() {
            true => Ok(()),
            false => Err(TrainError::ForeignRun { path: folder.clone(), differences }),
        };
    }
    let foreign = |name: &str| name != LOCK && !atomic::is_unfinished(name);
    let mut names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    match names.any(|name| foreign(&name.to_string_lossy())) {
        true => Err(TrainError::NoRun { path: folder.clone() }),
        false => Ok(()),
    }
}

/// Locks a folder for this process, whose number is left in the lock's file for the message to others.
fn lock(folder: &Path) -> Result<File, TrainError> {
    let path = folder.join(LOCK);
    let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = open.map_err(TrainError::io(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let process = fs::read_to_string(&path).unwrap_or_default();
            return Err(TrainError::Busy { path: folder.to_owned(), process });
        }
        // Some network file systems have no locks; training there is as safe as it was.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
        Err(TryLockError::Error(error)) => return Err(TrainError::io(&path)(error)),
    }
    let number = std::process::id().to_string();
    let written = file.set_len(0).and_then(|()| file.write_all(number.as_bytes()));
    written.map_err(|error| TrainError::io(&path)(explained(error, None)))?;
    Ok(file)
}
