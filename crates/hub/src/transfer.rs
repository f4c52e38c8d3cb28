//! One file from its address to its place: resumed, checked, renamed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::HubError;
use crate::http::Client;
use crate::listing::RemoteFile;
use crate::plan::PART;

/// Failures in a row, without a byte between them, after which a download is given up.
const ATTEMPTS: u32 = 5;
const BUFFER_BYTES: usize = 1 << 18;

/// What happens during a download.
#[derive(Debug)]
pub enum Event<'a> {
    /// A file begins.
    File(&'a Path),
    /// So many more bytes arrived.
    Received(u64),
    /// A connection broke and is tried again.
    Retrying(&'a HubError),
}

/// One file that is not there yet.
pub(crate) struct Transfer<'a> {
    pub(crate) client: &'a Client,
    pub(crate) url: &'a str,
    pub(crate) remote: &'a RemoteFile,
    /// Where the complete file goes.
    pub(crate) path: &'a Path,
    pub(crate) retry_wait: Duration,
}

/// Where a file is kept until it is complete.
pub(crate) fn part_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PART);
    name.into()
}

impl Transfer<'_> {
    /// Fetches the file, continuing a partial one.
    pub(crate) fn run(&self, on: &mut dyn FnMut(Event)) -> Result<(), HubError> {
        let path = part_path(self.path);
        let mut part = open(&path)?;
        on(Event::File(self.path));
        self.fetch(&mut part, &path, on)?;
        self.check(&path)?;
        fewstep_data::atomic::rename(&path, self.path).map_err(HubError::io(self.path))
    }

    /// Appends to the partial file until it is complete, over as many connections as it takes.
    fn fetch(&self, part: &mut File, path: &Path, on: &mut dyn FnMut(Event)) -> Result<(), HubError> {
        let mut failures = 0;
        loop {
            let before = length(part, path)?;
            let Err(error) = self.attempt(part, path, on) else { return Ok(()) };
            failures = if length(part, path)? > before { 1 } else { failures + 1 };
            if !error.is_transient() || failures == ATTEMPTS {
                return Err(error);
            }
            on(Event::Retrying(&error));
            std::thread::sleep(self.retry_wait * 2_u32.pow(failures - 1));
        }
    }

    /// One connection: appends what is missing.
    fn attempt(&self, part: &mut File, path: &Path, on: &mut dyn FnMut(Event)) -> Result<(), HubError> {
        let expected = self.remote.size_bytes;
        let mut have = length(part, path)?;
        if have > expected {
            have = restart(part, path)?;
        }
        if have == expected {
            return Ok(());
        }
        let response = self.client.get(self.url, (have > 0).then_some([have, expected - 1]))?;
        if response.first_byte == 0 && have > 0 {
            have = restart(part, path)?; // the server sends the whole file
        }
        if response.first_byte != have {
            return Err(self.wrong_range(have));
        }
        self.append(response.into_reader(), part, path, on)
    }

    fn append(
        &self,
        mut body: impl Read,
        part: &mut File,
        path: &Path,
        on: &mut dyn FnMut(Event),
    ) -> Result<(), HubError> {
        let expected = self.remote.size_bytes;
        let mut have = length(part, path)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) if have == expected => return Ok(()),
                Ok(count) if count > 0 => count,
                _ => return Err(HubError::Truncated { url: self.url.into(), found: have, expected }),
            };
            if have + count as u64 > expected {
                restart(part, path)?;
                return Err(self.wrong_range(have));
            }
            part.write_all(&buffer[..count]).map_err(|reason| match reason.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    HubError::DiskFull { path: path.into(), missing_bytes: expected - have }
                }
                _ => HubError::Io { path: path.into(), reason },
            })?;
            have += count as u64;
            on(Event::Received(count as u64));
        }
    }

    fn wrong_range(&self, first: u64) -> HubError {
        HubError::Range { url: self.url.into(), first, expected: self.remote.size_bytes }
    }

    /// Compares the checksum, reading the file once more: what counts is what is on the disk. Damaged files are
    /// removed, for they cannot be continued.
    fn check(&self, path: &Path) -> Result<(), HubError> {
        let Some(expected) = &self.remote.sha256 else { return Ok(()) };
        let mut hash = Sha256::new();
        let mut file = File::open(path).map_err(HubError::io(path))?;
        io::copy(&mut file, &mut hash).map_err(HubError::io(path))?;
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found == *expected {
            return Ok(());
        }
        std::fs::remove_file(path).map_err(HubError::io(path))?;
        Err(HubError::Checksum { path: self.path.into(), found, expected: expected.clone() })
    }
}

/// Opens a partial file for appending and keeps other processes from doing the same.
fn open(path: &Path) -> Result<File, HubError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(HubError::io(folder))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(HubError::io(path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(HubError::Busy { path: path.into() }),
        // Some network file systems have no locks; then nobody is kept out.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

fn length(part: &File, path: &Path) -> Result<u64, HubError> {
    Ok(part.metadata().map_err(HubError::io(path))?.len())
}

/// Empties a partial file; returns its length.
fn restart(part: &mut File, path: &Path) -> Result<u64, HubError> {
    part.set_len(0).and_then(|()| part.rewind()).map_err(HubError::io(path))?;
    Ok(0)
}
