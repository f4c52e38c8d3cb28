//! A video as a folder of pictures, one for each frame.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Frame, Frames, MAX_FRAMES, Video, extension};
use crate::DataError;
use crate::atomic::NewFolder;
use crate::image::Picture;

/// What frames are recognised by; other files are not looked at.
const EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// The pictures of a folder in natural order: `2.png` before `10.png`. Hidden files and other kinds are left out.
///
/// # Errors
/// When the folder cannot be read, or has more than [`MAX_FRAMES`] entries.
pub(crate) fn frame_files(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let entries = fs::read_dir(folder).map_err(DataError::io(folder))?;
    let (mut files, mut seen) = (Vec::new(), 0);
    for entry in entries {
        let name = entry.map_err(DataError::io(folder))?.file_name();
        seen += 1;
        if seen > MAX_FRAMES {
            return Err(DataError::VideoTooLong { path: folder.into() });
        }
        let path = folder.join(&name);
        let is_hidden = name.to_string_lossy().starts_with('.');
        if !is_hidden && EXTENSIONS.contains(&extension(&path).as_str()) {
            files.push(path);
        }
    }
    alphanumeric_sort::sort_path_slice(&mut files);
    Ok(files)
}

pub(super) fn open(folder: &Path) -> Result<Frames, DataError> {
    let files = frame_files(folder)?;
    if files.is_empty() {
        let reason = format!("the folder has no pictures, expected frames as {}", EXTENSIONS.join(", "));
        return Err(DataError::Video { path: folder.into(), reason });
    }
    let frames = files.into_iter().map(|file| Ok(Frame { picture: Picture::load(&file)?, shown: None }));
    Ok(Frames { pictures: Box::new(frames), rate: None })
}

/// Writes the frames as png files whose names count from 0.
pub(super) fn write(video: &Video, path: &Path) -> io::Result<()> {
    let folder = NewFolder::begin(path)?;
    for (at, frame) in video.frames().iter().enumerate() {
        crate::atomic::write(&folder.part().join(format!("{at:06}.png")), &frame.to_png())?;
    }
    folder.replace()
}
