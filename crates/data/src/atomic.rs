//! Files that are either the old one or the new one, and folders that are complete or absent, whatever happens while
//! they are written.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::explained;

/// Replaces the file at `path` by `bytes`; see [`write_with`].
///
/// # Errors
/// As [`write_with`].
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_sized(path, bytes.len() as u64, |file| file.write_all(bytes))
}

/// Replaces the file at `path` by what `fill` writes, creating missing folders.
///
/// The bytes go to a temporary file beside the target, are synced to the disk and then renamed, and the folder is
/// synced too, so a crash or a full disk leaves the old file.
///
/// # Errors
/// Whatever `fill` or the file system reports. The temporary file is gone by then.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    replace(path, fill).map_err(|error| explained(error, None))
}

/// As [`write_with`], for a file of so many bytes, which the error names where there is no room for them.
///
/// # Errors
/// As [`write_with`].
pub fn write_sized(
    path: &Path,
    bytes: u64,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    replace(path, fill).map_err(|error| explained(error, Some(bytes)))
}

/// As [`write_with`], for a file that another program makes: `make` is given the temporary path, where nothing is yet.
///
/// # Errors
/// As [`write_with`].
pub fn write_beside(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    replace_by(path, make).map_err(|error| explained(error, None))
}

fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    replace_by(path, |temporary| fill(&mut File::create_new(temporary)?))
}

fn replace_by(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    create_folder(folder_of(path))?;
    let temporary = Temporary::beside(path)?;
    make(&temporary.0)?;
    rename(&temporary.0, path)
}

/// Moves a complete file to `path`, in the same folder, replacing what is there; both the bytes and the name are on
/// the disk afterwards.
///
/// # Errors
/// Whatever the file system reports.
pub fn rename(complete: &Path, path: &Path) -> io::Result<()> {
    File::options().append(true).open(complete)?.sync_all()?; // Windows syncs only what may be written
    fs::rename(complete, path)?;
    sync_folder(folder_of(path))
}

/// Creates a folder and those above it that are missing, each durably.
fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder_of(folder);
    create_folder(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => sync_folder(above),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Replaces the file at `target` by the bytes of `source`; see [`write_with`].
///
/// # Errors
/// As [`write_with`].
pub fn copy(source: &Path, target: &Path) -> io::Result<()> {
    let mut source = File::open(source)?;
    let bytes = source.metadata()?.len();
    write_sized(target, bytes, |file| io::copy(&mut source, file).map(|_| ()))
}

/// Removes a folder with all that is in it. Under its own name it is there as a whole or not at all: what a killed
/// process leaves has a hidden one.
///
/// # Errors
/// Whatever the file system reports.
pub fn remove_folder(folder: &Path) -> io::Result<()> {
    let hidden = hidden(folder, "old.part")?;
    remove_if_there(&hidden)?;
    fs::rename(folder, &hidden)?;
    fs::remove_dir_all(hidden)
}

/// Removes what killed processes left unfinished in a folder and in those below it. Nobody else may be writing there.
///
/// # Errors
/// Whatever the file system reports.
pub fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, is_folder) = (entry.path(), entry.file_type()?.is_dir());
        match (is_unfinished(&entry.file_name().to_string_lossy()), is_folder) {
            (true, true) => fs::remove_dir_all(path)?,
            (true, false) => fs::remove_file(path)?,
            (false, true) => remove_unfinished(&path)?,
            (false, false) => {}
        }
    }
    Ok(())
}

/// Whether files and folders in the making have such names.
pub fn is_unfinished(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".part")
}

/// The path beside another that has its name between a dot and `.end`.
fn hidden(path: &Path, end: &str) -> io::Result<PathBuf> {
    let mut hidden = OsString::from(".");
    hidden.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    hidden.push(format!(".{end}"));
    Ok(folder_of(path).join(hidden))
}

fn remove_if_there(folder: &Path) -> io::Result<()> {
    if folder.exists() { fs::remove_dir_all(folder) } else { Ok(()) }
}

/// A folder in the making, under a hidden name beside its own.
///
/// It gets its name by [`NewFolder::publish`] or [`NewFolder::replace`]; dropped before that, it is removed.
#[derive(Debug)]
pub struct NewFolder {
    part: PathBuf,
    path: PathBuf,
}

impl NewFolder {
    /// Begins the folder that shall be at `path`, creating missing parents. What a killed run left under the hidden
    /// name is removed.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn begin(path: &Path) -> io::Result<Self> {
        let part = hidden(path, "part")?;
        remove_if_there(&part)?;
        create_folder(&part)?;
        Ok(Self { part, path: path.to_owned() })
    }

    /// Where to write its files.
    pub fn part(&self) -> &Path {
        &self.part
    }

    /// Gives the folder its name, durably. Nothing but an empty folder may be there.
    ///
    /// # Errors
    /// Whatever the file system reports; the folder in the making is removed then.
    pub fn publish(self) -> io::Result<()> {
        sync_folder(&self.part)?;
        fs::rename(&self.part, &self.path)?;
        sync_folder(folder_of(&self.path))
    }

    /// Gives the folder its name, durably, in place of the one that has it, which is removed. A crash between the two
    /// renames leaves neither under that name.
    ///
    /// # Errors
    /// Whatever the file system reports; the older folder is still there then.
    pub fn replace(self) -> io::Result<()> {
        let path = self.path.clone();
        if !path.exists() {
            return self.publish();
        }
        let old = hidden(&path, "old.part")?;
        remove_if_there(&old)?;
        fs::rename(&path, &old)?;
        if let Err(error) = self.publish() {
            fs::rename(&old, &path)?;
            return Err(error);
        }
        fs::remove_dir_all(old)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // Nothing can be done about a folder that cannot be removed, and after a success there is none.
        let _ = fs::remove_dir_all(&self.part);
    }
}

/// A temporary path whose file is removed when the value goes; after the rename there is nothing left to remove.
struct Temporary(PathBuf);

impl Temporary {
    fn beside(target: &Path) -> io::Result<Self> {
        /// Told apart from other threads by this number and from other processes by the process id.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        Ok(Self(hidden(target, &format!("{}.{unique}.part", std::process::id()))?))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing can be done about a file that cannot be removed, and after a success there is none.
        let _ = fs::remove_file(&self.0);
    }
}

/// A rename is on the disk only once its folder is.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Folders cannot be opened for syncing elsewhere.
#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn write_replaces_the_old_file_and_creates_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/file.txt");
        write(&path, b"old").unwrap();
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(path.parent().unwrap()), ["file.txt"]);
    }

    #[test]
    fn a_failing_writer_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.txt");
        write(&path, b"old").unwrap();
        let failed = write_with(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["file.txt"]);
    }

    /// Refuses whatever comes after so many bytes, as a full disk does.
    struct Disk<'a> {
        file: &'a mut File,
        room: usize,
    }

    impl Write for Disk<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.room);
            if fits == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= fits;
            self.file.write(&bytes[..fits])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.file.flush()
        }
    }

    #[test]
    fn a_disk_that_is_full_after_any_number_of_bytes_leaves_the_old_file_and_says_what_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.bin");
        let new: Vec<u8> = (0..=255).collect();
        write(&path, b"old").unwrap();
        for room in 0..new.len() {
            let full = write_sized(&path, 256, |file| Disk { file, room }.write_all(&new)).unwrap_err();
            assert_eq!(full.kind(), io::ErrorKind::StorageFull);
            let message = full.to_string();
            let expected =
                "256 bytes are needed; what was complete before is untouched\nhint: free some space";
            assert!(message.contains(expected), "{message}");
            assert_eq!(fs::read(&path).unwrap(), b"old", "{room}");
            assert_eq!(names(folder.path()), ["file.bin"], "{room}");
        }
        write_sized(&path, 256, |file| Disk { file, room: new.len() }.write_all(&new)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), new);
    }

    #[test]
    fn a_failing_writer_leaves_no_file_where_there_was_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.txt");
        write_with(&path, |_| Err(io::ErrorKind::Other.into())).unwrap_err();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_target_that_is_a_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("taken")).unwrap();
        fs::write(folder.path().join("taken/x"), b"x").unwrap();
        write(&folder.path().join("taken"), b"y").unwrap_err();
        assert_eq!(names(folder.path()), ["taken"]);
    }

    #[test]
    fn a_new_folder_appears_when_it_is_published_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/model");
        let made = NewFolder::begin(&path).unwrap();
        write(&made.part().join("file.txt"), b"new").unwrap();
        assert!(!path.exists());
        made.publish().unwrap();
        assert_eq!(fs::read(path.join("file.txt")).unwrap(), b"new");
        assert_eq!(names(path.parent().unwrap()), ["model"]);
    }

    #[test]
    fn a_folder_takes_the_place_of_an_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        for content in ["old", "new"] {
            let made = NewFolder::begin(&path).unwrap();
            write(&made.part().join(content), b"x").unwrap();
            made.replace().unwrap();
            assert_eq!(names(&path), [content]);
        }
        assert_eq!(names(folder.path()), ["model"]);
        remove_folder(&path).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn what_is_unfinished_is_removed_at_every_depth_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for unfinished in ["deep/.x.bin.17.0.part", ".step.part/weights", "deep/.model.old.part/y"] {
            write(&at(unfinished), b"x").unwrap();
        }
        for kept in ["deep/x.part", "deep/.hidden", "deep/x.bin"] {
            write(&at(kept), b"x").unwrap();
        }
        remove_unfinished(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["deep"]);
        let mut kept = names(&at("deep"));
        kept.sort();
        assert_eq!(kept, [".hidden", "x.bin", "x.part"]);
    }

    #[test]
    fn a_folder_given_up_or_left_by_a_killed_run_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::mem::forget(NewFolder::begin(&path).unwrap());
        assert_eq!(names(folder.path()), [".model.part"]);
        fs::write(folder.path().join(".model.part/half"), b"x").unwrap();
        let again = NewFolder::begin(&path).unwrap();
        assert!(names(again.part()).is_empty());
        drop(again);
        assert!(names(folder.path()).is_empty());
    }
}
