//! What can go wrong between a repository and the model folder.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of finding and downloading model files. Where a way out is known, the message's last line is a `hint:`.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A text that names no files of a repository.
    #[error("{found:?}: {reason}\nhint: write OWNER/NAME:PATTERN, as in Qwen/Qwen-Image:vae/*.safetensors")]
    Origin {
        /// The text.
        found: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An environment variable with an unusable value.
    #[error("environment variable {name} is {found:?}, expected {expected}")]
    Setting {
        /// The variable.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Files are not there and must not be downloaded.
    #[error(
        "{model_id}:{pattern}: no such file in {} and downloading is off ({variable} is set)\nhint: unset {variable}, or \
         put the files there",
        folder.display()
    )]
    Offline {
        /// The repository.
        model_id: String,
        /// The pattern no local file matches.
        pattern: String,
        /// Where the files were looked for.
        folder: PathBuf,
        /// The environment variable that switched downloading off.
        variable: &'static str,
    },
    /// The server cannot be reached, or the connection broke.
    #[error(
        "{url}: {reason}\nhint: check the connection; HF_ENDPOINT and MODELSCOPE_ENDPOINT name other servers, and \
         FEWSTEP_SKIP_DOWNLOAD=true uses only files that are already there"
    )]
    Network {
        /// The address.
        url: String,
        /// The client's reason.
        reason: String,
    },
    /// The server does not have it (404).
    #[error(
        "{url}: not found (404)\nhint: check the spelling; a repository may be on the other service (FEWSTEP_DOWNLOAD_SOURCE)"
    )]
    NotFound {
        /// The address.
        url: String,
    },
    /// The server wants to know who asks (401, 403).
    #[error(
        "{url}: access denied ({status})\nhint: the repository does not exist, or it is private or gated: accept its terms \
         and set HF_TOKEN"
    )]
    Denied {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// Any other answer than the file.
    #[error("{url}: the server answered with status {status}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// A listing that cannot be understood.
    #[error("{url}: no valid list of files: {reason}")]
    Listing {
        /// The address.
        url: String,
        /// What is wrong, found against expected.
        reason: String,
    },
    /// A listed path that would leave the model folder.
    #[error("{url}: lists the file {path:?}, expected a path inside the repository")]
    UnsafePath {
        /// The address of the listing.
        url: String,
        /// The path.
        path: String,
    },
    /// A pattern that matches nothing in its repository.
    #[error("{model_id}:{pattern}: no file matches; the repository has {}", some(available))]
    NoMatch {
        /// The repository.
        model_id: String,
        /// The pattern.
        pattern: String,
        /// All files of the repository.
        available: Vec<String>,
    },
    /// The connection ended before the file did.
    #[error(
        "{url}: the connection ended after {found} of {expected} bytes\nhint: run the command again, it continues there"
    )]
    Truncated {
        /// The address.
        url: String,
        /// Bytes there are now.
        found: u64,
        /// Bytes of the file.
        expected: u64,
    },
    /// The server sent another part of the file than the one asked for, or more than the file.
    #[error("{url}: the server sent other bytes than {first} to {expected}")]
    Range {
        /// The address.
        url: String,
        /// The first byte asked for.
        first: u64,
        /// Bytes of the file.
        expected: u64,
    },
    /// A complete file with another checksum than listed; its partial file is removed.
    #[error(
        "{}: downloaded with SHA-256 {found}, expected {expected}\nhint: the bytes were damaged and are removed; run the \
         command again",
        path.display()
    )]
    Checksum {
        /// Where the file would be.
        path: PathBuf,
        /// The checksum of the bytes that came.
        found: String,
        /// The checksum in the listing.
        expected: String,
    },
    /// Another process holds the partial file.
    #[error("{}: another process is downloading this file\nhint: wait for it to end", path.display())]
    Busy {
        /// The partial file.
        path: PathBuf,
    },
    /// The disk is full.
    #[error("{}: the disk is full, {missing_bytes} bytes are still to be written\nhint: free some space and run the command again, it continues there", path.display())]
    DiskFull {
        /// The partial file.
        path: PathBuf,
        /// What the file still needs.
        missing_bytes: u64,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
}

impl HubError {
    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> HubError + '_ {
        move |reason| HubError::Io { path: path.to_owned(), reason }
    }

    /// Whether the same request may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            HubError::Network { .. } | HubError::Truncated { .. } | HubError::Range { .. } => true,
            HubError::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            _ => false,
        }
    }
}

/// Names at most a handful of files.
fn some(files: &[String]) -> String {
    const SHOWN: usize = 12;
    match files.len() {
        0 => "no files".into(),
        count if count > SHOWN => format!("{} and {} more", files[..SHOWN].join(", "), count - SHOWN),
        _ => files.join(", "),
    }
}
