//! What can go wrong with metadata, pictures and folders of them.

use std::io;
use std::path::{Path, PathBuf};

use crate::image::{MAX_PIXELS, MAX_SIDE_PX, Size};
use crate::video::{MAX_BYTES, MAX_FRAMES};

/// Errors of reading and writing data sets. Where a way out is known, the message's last line is a `hint:`.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// A group that no concept of the bundled set has.
    #[error("no emoji group `{found}`, expected one of {}", expected.join(", "))]
    Group {
        /// The group asked for.
        found: String,
        /// The groups there are.
        expected: Vec<String>,
    },
    /// A provenance file that does not parse.
    #[error("{}: no valid provenance: {reason}\nhint: the file was changed by hand; generate the data set again", path.display())]
    Provenance {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        reason: String,
    },
    /// A metadata file of a format that is not read.
    #[error("{}: no metadata format: found extension `{found}`, expected csv, json or jsonl", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its extension.
        found: String,
    },
    /// A metadata or label file that breaks its format's rules.
    #[error("{}{}: {reason}", path.display(), at_row(*row))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The row, from 1, when the fault lies in one.
        row: Option<usize>,
        /// What is wrong, found against expected.
        reason: String,
    },
    /// A row without a column that is needed.
    #[error("{}, row {row}: column `{column}` is missing; found {}\nhint: {}", path.display(), names(found), column_hint(column))]
    MissingColumn {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column needed.
        column: String,
        /// The columns the row has.
        found: Vec<String>,
    },
    /// A value that is not what its column holds.
    #[error("{}, row {row}, column `{column}`: found `{found}`, expected {expected}\nhint: {hint}", path.display())]
    Value {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column.
        column: String,
        /// The value found.
        found: String,
        /// What the column holds.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },
    /// A row that names a file that is not there.
    #[error(
        "{}, row {row}, column `{column}`: found no file {}\nhint: files are looked for relative to the dataset base path",
        path.display(),
        file.display()
    )]
    MissingFile {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column that names the file.
        column: String,
        /// Where it was looked for.
        file: PathBuf,
    },
    /// A row that names a picture and a video, or nothing.
    #[error(
        "{}, row {row}: found {found} of `image` and `video`, expected one of them; found columns: {}\nhint: a row is about a \
         picture or a video; leave the other column empty",
        path.display(),
        names(columns)
    )]
    NotOneMedia {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// `both columns` or `neither`.
        found: &'static str,
        /// The columns the row has.
        columns: Vec<String>,
    },
    /// A row that names a video as a picture, or a picture as a video.
    #[error(
        "{}, row {row}, column `{column}`: found `{found}`, which belongs in the column `{expected}`\nhint: pictures stand in \
         the column `image`; animations, videos and folders of frames in the column `video`",
        path.display()
    )]
    OtherMedia {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The column the file is named in.
        column: &'static str,
        /// The file.
        found: String,
        /// The column it belongs in.
        expected: &'static str,
    },
    /// A row about a video where pictures are needed.
    #[error("{}, row {row}: found the video {}, expected a picture in the column `image`", path.display(), file.display())]
    NoPicture {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The video.
        file: PathBuf,
    },
    /// A file of a data set that is a link to somewhere else, or lies below one.
    #[error(
        "{}: leads by a link to {}, outside of the dataset base path {}\nhint: copy it below the dataset base path, or name \
         a folder above both as the base path",
        path.display(),
        target.display(),
        base.display()
    )]
    Outside {
        /// The file as it is named.
        path: PathBuf,
        /// Where it really is.
        target: PathBuf,
        /// The data set's folder.
        base: PathBuf,
    },
    /// A row of distillation data whose picture or video is not of the size it would be trained at.
    #[error(
        "{}, row {row}: {} is {found} px, but this run trains at {expected} px and would resize it; distillation needs the \
         teacher's own pixels\nhint: generate the data at {expected}, or pass --height {} --width {}",
        path.display(),
        file.display(),
        found.height,
        found.width
    )]
    WouldResize {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The picture or video.
        file: PathBuf,
        /// Its size.
        found: Size,
        /// The size of the run.
        expected: Size,
    },
    /// A row of distillation data whose video would lose frames.
    #[error(
        "{}, row {row}: {} has {found} frames, but this run trains on {expected} and would cut it; distillation needs all of \
         the teacher's frames\nhint: generate videos of {expected} frames, or pass their number as --num-frames",
        path.display(),
        file.display()
    )]
    WouldCut {
        /// The metadata file.
        path: PathBuf,
        /// The row, from 1, a header not counted.
        row: usize,
        /// The video.
        file: PathBuf,
        /// Its frames: a number, or more than one.
        found: String,
        /// The frames that would be trained on.
        expected: usize,
    },
    /// A picture too small for the family's division factor.
    #[error(
        "a picture of {found} px rounds down to nothing; expected at least {division} px on each side\nhint: give the height and the width to scale it to"
    )]
    TooSmall {
        /// The picture's size.
        found: Size,
        /// What sides are rounded down to a multiple of.
        division: usize,
    },
    /// A picture with too many pixels to be decoded safely.
    #[error(
        "{}: found a picture of {found} px, expected at most {MAX_SIDE_PX} px on each side and {MAX_PIXELS} px in \
         all\nhint: scale it down",
        path.display()
    )]
    TooLarge {
        /// The picture.
        path: PathBuf,
        /// Its size as its header states it.
        found: Size,
    },
    /// A picture so narrow that it would have to grow out of all bounds to cover its target.
    #[error(
        "a picture of {found} px scaled until it covers {target} px has more than {MAX_PIXELS} px\nhint: crop it to a \
         shape that is less narrow"
    )]
    TooNarrow {
        /// The picture's size.
        found: Size,
        /// The size it shall have.
        target: Size,
    },
    /// A container of videos that is not read or written.
    #[error("{}: no video format{purpose}: found extension `{found}`, expected {expected}", path.display())]
    VideoFormat {
        /// The file.
        path: PathBuf,
        /// ` to write`, or nothing.
        purpose: &'static str,
        /// Its extension.
        found: String,
        /// What there is.
        expected: &'static str,
    },
    /// A container that only ffmpeg reads or writes, where it is not installed.
    #[error(
        "{}: {container} needs the programs `ffmpeg` and `ffprobe`, which are not on the search path\nhint: install ffmpeg \
         (Debian: apt-get install ffmpeg; macOS: brew install ffmpeg), or use GIF, WebP or a folder of frames",
        path.display()
    )]
    NoFfmpeg {
        /// The video.
        path: PathBuf,
        /// Its extension.
        container: String,
    },
    /// A file that is no video, or a damaged one.
    #[error("{}: no readable video: {reason}", path.display())]
    Video {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A video whose frames are not of one size.
    #[error("{}: frame {frame} is {found} px, expected {expected} px as the first", path.display())]
    FrameSize {
        /// The video.
        path: PathBuf,
        /// The frame, from 1.
        frame: usize,
        /// Its size.
        found: Size,
        /// The size of the first frame.
        expected: Size,
    },
    /// A video with more frames than are read.
    #[error(
        "{}: the video is too long, expected less than {MAX_FRAMES} frames and at most {MAX_BYTES} bytes in memory\nhint: \
         cut it, scale it down or take fewer frames of it",
        path.display()
    )]
    VideoTooLong {
        /// The video.
        path: PathBuf,
    },
    /// A file that is no picture, or a damaged one.
    #[error("{}: no readable picture: {reason}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// The decoder's reason.
        reason: String,
    },
    /// An output folder that already holds something.
    #[error("{}: the folder is not empty\nhint: give another folder, or remove this one", path.display())]
    FolderTaken {
        /// The folder.
        path: PathBuf,
    },
}

impl DataError {
    /// For `map_err`: names the file in front of the system's reason.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |reason| Self::Io { path: path.to_path_buf(), reason }
    }

    /// An error that does not know where it happened, with the row in front.
    pub(crate) fn at_row(self, path: &Path, row: usize) -> Self {
        Self::Malformed { path: path.to_path_buf(), row: Some(row), reason: self.to_string() }
    }
}

fn at_row(row: Option<usize>) -> String {
    row.map(|row| format!(", row {row}")).unwrap_or_default()
}

fn names(columns: &[String]) -> String {
    if columns.is_empty() { "no columns".into() } else { columns.join(", ") }
}

/// The columns that only teacher data has are written by one command.
fn column_hint(column: &str) -> String {
    match column {
        "seed" | "rand_device" | "num_inference_steps" | "cfg_scale" => {
            "distillation needs the teacher's settings of every picture; `generate` writes them".into()
        }
        _ => format!("add a column `{column}`; names are compared letter by letter"),
    }
}
