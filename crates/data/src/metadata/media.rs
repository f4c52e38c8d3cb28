//! Whether a row is about a picture or a video, and the file that it names.

use std::path::{Path, PathBuf};

use super::{Kind, Row};
use crate::DataError;
use crate::inside::check_inside;
use crate::video::{self, FFMPEG_EXTENSIONS, MAX_FRAMES};

/// What a row is about; each has a column of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    /// A picture, in the column `image`.
    Image,
    /// A video, in the column `video`.
    Video,
}

impl Media {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Image, Self::Video];

    /// The column that names its file.
    pub fn column(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Video => "video",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Image => Self::Video,
            Self::Video => Self::Image,
        }
    }

    /// What a file of this name is, where the name alone tells; a WebP may be either.
    fn of_name(file: &str) -> Option<Self> {
        match video::extension(Path::new(file)).as_str() {
            "gif" => Some(Self::Video),
            "png" | "jpg" | "jpeg" => Some(Self::Image),
            other => FFMPEG_EXTENSIONS.contains(&other).then_some(Self::Video),
        }
    }
}

const NUM_FRAMES: Kind = Kind {
    expected: "an integer from 1 to 99999",
    hint: "it is the number of frames that are taken of the row's video",
};
const ONE_FRAME: Kind =
    Kind { expected: "1, for a picture", hint: "leave it empty, or name a video in the column `video`" };

impl Row {
    /// The row's picture or video and its path as written, relative to the data set's base folder.
    ///
    /// # Errors
    /// When the row names none or both, or a picture as video or the other way round, and as [`Self::relative_path`].
    pub fn media(&self) -> Result<(Media, &str), DataError> {
        let named: Vec<Media> =
            Media::ALL.into_iter().filter(|media| self.get(media.column()).is_some()).collect();
        let filled = |media: &&Media| self.get(media.column()) != Some("");
        let media = match (&named[..], &named.iter().filter(filled).collect::<Vec<_>>()[..]) {
            // The only column says what is wrong with its value, were it empty.
            ([only], _) => *only,
            (_, [only]) => **only,
            _ => return Err(self.not_one_media(named.iter().any(|media| filled(&media)))),
        };
        let file = self.relative_path(media.column())?;
        match Media::of_name(file) {
            Some(found) if found != media => Err(self.other_media(media, file)),
            _ => Ok((media, file)),
        }
    }

    /// The file of the row's picture or video, below `base`; for a video that is a folder, the folder.
    ///
    /// # Errors
    /// As [`Self::media`], and when there is no such file, or a link leads out of `base` to it or to a frame.
    pub fn media_file(&self, base: &Path) -> Result<(Media, PathBuf), DataError> {
        let (media, name) = self.media()?;
        let file = base.join(name);
        let inside =
            |file: &Path| check_inside(base, file).map_err(|fault| fault.at_row(self.path(), self.number));
        if file.is_dir() {
            inside(&file)?;
            if media == Media::Image {
                return Err(self.other_media(media, name));
            }
            video::frame_files(&file)?.iter().try_for_each(|frame| inside(frame))?;
            return Ok((media, file));
        }
        if file.is_file() {
            inside(&file)?;
            return Ok((media, file));
        }
        let (path, column) = (self.path().into(), media.column().into());
        Err(DataError::MissingFile { path, row: self.number, column, file })
    }

    /// The file of the row's picture, where a video is of no use.
    ///
    /// # Errors
    /// As [`Self::media_file`], and when the row is about a video.
    pub fn image_file(&self, base: &Path) -> Result<PathBuf, DataError> {
        match self.media_file(base)? {
            (Media::Image, file) => Ok(file),
            (Media::Video, file) => {
                Err(DataError::NoPicture { path: self.path().into(), row: self.number, file })
            }
        }
    }

    /// The column `num_frames`, which may be missing or empty: how many frames are taken of the row's video.
    ///
    /// # Errors
    /// When it holds no number of frames, or one other than 1 for a picture.
    pub fn num_frames(&self) -> Result<Option<usize>, DataError> {
        const COLUMN: &str = "num_frames";
        let Some(found) = self.get(COLUMN).filter(|found| !found.is_empty()) else { return Ok(None) };
        let frames = self.count(COLUMN, MAX_FRAMES - 1, NUM_FRAMES)?;
        match frames != 1 && self.media()?.0 == Media::Image {
            true => Err(self.wrong(COLUMN, found, ONE_FRAME)),
            false => Ok(Some(frames)),
        }
    }

    fn not_one_media(&self, both: bool) -> DataError {
        let found = if both { "both columns" } else { "neither" };
        DataError::NotOneMedia { path: self.path().into(), row: self.number, found, columns: self.columns() }
    }

    fn other_media(&self, media: Media, file: &str) -> DataError {
        DataError::OtherMedia {
            path: self.path().into(),
            row: self.number,
            column: media.column(),
            found: file.into(),
            expected: media.other().column(),
        }
    }
}
