//! Why something could not be written, in words that say what to do.

use std::io::{Error, ErrorKind};

/// The same error with what it means for files written by [`crate::atomic`] or added to, where the disk or its owner refuses them;
/// other errors stay as they are. `needed_bytes` is the size of the whole file, where it is known.
pub fn explained(error: Error, needed_bytes: Option<u64>) -> Error {
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space and run the command again",
        ErrorKind::FileTooLarge => {
            "raise the limit on the size of files (ulimit -f) and run the command again"
        }
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
            "make the folder writable, or give another one, and run the command again"
        }
        _ => return error,
    };
    let needed = needed_bytes.map(|bytes| format!("; {bytes} bytes are needed")).unwrap_or_default();
    let kept = "what was complete before is untouched";
    Error::new(error.kind(), format!("{error}{needed}; {kept}\nhint: {hint}"))
}
