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

fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let folder = folder_of(path);
    fs::create_dir_all(folder)?;
    let temporary = Temporary::beside(folder, path)?;
    let mut file = File::create_new(&temporary.0)?;
    fill(&mut file)?;
    drop(file);
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

/// A folder in the making, under a hidden name beside its own.
///
/// It gets its name by [`NewFolder::publish`]; dropped before that, it is removed.
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
        let mut hidden = OsString::from(".");
        hidden.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
        hidden.push(".part");
        let part = folder_of(path).join(hidden);
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        fs::create_dir_all(&part)?;
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
    fn beside(folder: &Path, target: &Path) -> io::Result<Self> {
        /// Told apart from other threads by this number and from other processes by the process id.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.{unique}.part", std::process::id()));
        Ok(Self(folder.join(hidden)))
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
