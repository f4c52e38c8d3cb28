//! Files read whole, never further than a file of their kind goes: what a path names may be a device without end, or a
//! download that went wrong.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The largest configuration, recipe or vocabulary; the published ones have a few megabytes.
pub const MAX_TEXT_BYTES: u64 = 64 << 20;

/// A whole file of at most `limit` bytes.
///
/// # Errors
/// If the file cannot be read or is longer.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than allowed tells a device without end, which says that it has no bytes.
    open(path, limit)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

/// Opens a file that says it has at most `limit` bytes.
///
/// # Errors
/// If it cannot be opened or is longer.
pub fn open(path: &Path, limit: u64) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.len() > limit { Err(too_large(limit)) } else { Ok(file) }
}

fn too_large(limit: u64) -> io::Error {
    let reason = format!("the file is too large, expected at most {limit} bytes");
    io::Error::new(io::ErrorKind::FileTooLarge, reason)
}

/// A whole text of at most [`MAX_TEXT_BYTES`].
///
/// # Errors
/// If the file cannot be read, is longer, or is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    let not_utf8 = |fault| io::Error::new(io::ErrorKind::InvalidData, format!("not UTF-8: {fault}"));
    String::from_utf8(read(path, MAX_TEXT_BYTES)?).map_err(|fault| not_utf8(fault.utf8_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_largest_size_is_read_and_one_byte_more_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err();
        assert_eq!(error.to_string(), "the file is too large, expected at most 4 bytes");
        std::fs::write(&path, [b'a', 0xff]).unwrap();
        assert!(read_text(&path).unwrap_err().to_string().starts_with("not UTF-8: "));
    }

    #[cfg(unix)]
    #[test]
    fn a_device_without_end_is_not_read_to_its_end() {
        assert_eq!(read(Path::new("/dev/zero"), 1000).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        // A sparse file is not read at all.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(read_text(&path).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
