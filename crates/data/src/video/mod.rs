//! Videos in memory: reading animations, folders of frames and what ffmpeg reads, cut and scaled as DiffSynth-Studio
//! does, and writing them. Sound is left out.
//!
//! A container is told by the extension of its name: `gif` and `webp` are read here, [`FFMPEG_EXTENSIONS`] by the program
//! ffmpeg in a process of its own, and a folder holds pictures in the natural order of their names.

mod animation;
mod clip;
mod ffmpeg;
mod folder;
mod write;

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use crate::DataError;
use crate::image::{Picture, Resize, Size};
pub use clip::Clip;
pub(crate) use folder::frame_files;

/// The most frames of a video, an hour and more at 24 per second. A file of a few bytes may repeat one without end.
pub const MAX_FRAMES: usize = 100_000;

/// The most that the frames of one video may take in memory, after they were scaled: 776 frames of 1280x720 px.
pub const MAX_BYTES: usize = 2 << 30;

/// Containers that are read through ffmpeg: DiffSynth-Studio's.
pub const FFMPEG_EXTENSIONS: [&str; 7] = ["mp4", "webm", "mov", "mkv", "avi", "wmv", "flv"];

/// Pictures of one size, one after the other; at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct Video {
    frames: Vec<Picture>,
    frames_per_second: Option<f64>,
}

/// What a video file holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Header {
    /// The size of its frames.
    pub size: Size,
    /// Its frames, or the number at which counting ended.
    pub num_frames: usize,
    /// Its frame rate; a folder has none.
    pub frames_per_second: Option<f64>,
}

impl Video {
    /// A video of these frames; `frames_per_second` is above 0, and `None` where nobody knows it.
    ///
    /// # Panics
    /// When there is no frame, or one is not of the first one's size.
    pub fn new(frames: Vec<Picture>, frames_per_second: Option<f64>) -> Self {
        let size = frames.first().expect("a video has at least one frame").size();
        for frame in &frames {
            assert_eq!(frame.size(), size, "frames of one video have one size");
        }
        Self { frames, frames_per_second }
    }

    /// Reads the frames of a clip, each as `PIL.Image.convert("RGB")` gives it.
    ///
    /// # Errors
    /// When the video is missing, damaged, cut off, without frames or with frames of different sizes, exceeds the bounds of
    /// a picture, [`MAX_FRAMES`] or [`MAX_BYTES`], or needs ffmpeg where that is not installed.
    pub fn load(path: &Path, clip: Clip) -> Result<Self, DataError> {
        collect(path, Frames::open(path, clip.num_frames)?, clip, |_| Ok(None))
    }

    /// As [`Self::load`], with every frame scaled and cut as [`Picture::crop_and_resize`] does while the next ones are still
    /// unread: only scaled frames are kept.
    ///
    /// # Errors
    /// As [`Self::load`] and [`Resize::target_size`].
    pub fn load_resized(path: &Path, clip: Clip, resize: Resize) -> Result<Self, DataError> {
        let target = |size| resize.target_size(size).map(Some);
        collect(path, Frames::open(path, clip.num_frames)?, clip, target)
    }

    /// As [`Self::load`], from the bytes of a GIF or WebP file; `path` only names it in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn decode(bytes: Vec<u8>, path: &Path, clip: Clip) -> Result<Self, DataError> {
        collect(path, animation::decode(bytes, path)?, clip, |_| Ok(None))
    }

    /// Size, rate and number of frames. They are counted by decoding, as far as `most`: a header may say anything.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn header(path: &Path, most: usize) -> Result<Header, DataError> {
        let (mut counted, mut frames) = (Counted::default(), Frames::open(path, most.min(MAX_FRAMES))?);
        for frame in frames.pictures.by_ref().take(most) {
            counted.add(path, &frame?)?;
        }
        let size = counted.size.ok_or_else(|| no_frames(path))?;
        let frames_per_second = frames.rate.or(counted.rate());
        Ok(Header { size, num_frames: counted.frames, frames_per_second })
    }

    /// Its frames, all of one size.
    pub fn frames(&self) -> &[Picture] {
        &self.frames
    }

    /// The size of its frames.
    pub fn size(&self) -> Size {
        self.frames[0].size()
    }

    /// Its frame rate, where that is known.
    pub fn frames_per_second(&self) -> Option<f64> {
        self.frames_per_second
    }

    /// The frames below each other, the first on top: `num_frames * height` rows.
    ///
    /// Its [`Picture::to_pixels`] are `[3, num_frames * height, width]`, which is in memory `[3, num_frames, height, width]`.
    pub fn stacked(&self) -> Picture {
        let Size { height, width } = self.size();
        let rgb = self.frames.iter().flat_map(|frame| &frame.rgb).copied().collect();
        Picture { width, height: height * self.frames.len(), rgb }
    }

    /// The inverse of [`Self::stacked`].
    ///
    /// # Panics
    /// When there is no frame, or the rows are no multiple of their number.
    pub fn from_stacked(stacked: &Picture, num_frames: usize, frames_per_second: Option<f64>) -> Self {
        let (width, rows) = (stacked.width, stacked.height);
        assert!(num_frames > 0 && rows % num_frames == 0, "found {rows} rows for {num_frames} frames");
        let height = rows / num_frames;
        let frame = |rgb: &[u8]| Picture { width, height, rgb: rgb.to_vec() };
        Self::new(stacked.rgb.chunks_exact(3 * width * height).map(frame).collect(), frames_per_second)
    }
}

/// The frames of a file, decoded one by one as they are asked for.
struct Frames {
    pictures: Box<dyn Iterator<Item = Result<Frame, DataError>>>,
    /// The rate, where the container tells it for all frames.
    rate: Option<f64>,
}

struct Frame {
    picture: Picture,
    /// How long it is shown, where the container tells it for each frame.
    shown: Option<Duration>,
}

impl Frames {
    /// Opens a video of which at most `most` frames are wanted.
    fn open(path: &Path, most: usize) -> Result<Self, DataError> {
        if most > MAX_FRAMES {
            return Err(DataError::VideoTooLong { path: path.into() });
        }
        if path.is_dir() {
            return folder::open(path);
        }
        match extension(path).as_str() {
            "gif" | "webp" => animation::open(path),
            found if FFMPEG_EXTENSIONS.contains(&found) => {
                ffmpeg::Ffmpeg::find(path, found)?.open(path, most)
            }
            found => Err(DataError::VideoFormat {
                path: path.into(),
                purpose: "",
                found: found.into(),
                expected: "webp, gif, mp4, webm, mov, mkv, avi, wmv, flv or a folder of frames",
            }),
        }
    }
}

/// The extension in small letters.
pub(crate) fn extension(path: &Path) -> String {
    path.extension().and_then(OsStr::to_str).unwrap_or_default().to_lowercase()
}

/// What was seen of a video so far.
#[derive(Default)]
struct Counted {
    size: Option<Size>,
    frames: usize,
    shown: Option<Duration>,
}

impl Counted {
    fn add(&mut self, path: &Path, frame: &Frame) -> Result<(), DataError> {
        let found = frame.picture.size();
        if found.height == 0 || found.width == 0 {
            return Err(no_frames(path));
        }
        let expected = *self.size.get_or_insert(found);
        self.frames += 1;
        if self.frames >= MAX_FRAMES {
            return Err(DataError::VideoTooLong { path: path.into() });
        }
        if found != expected {
            return Err(DataError::FrameSize { path: path.into(), frame: self.frames, found, expected });
        }
        let before = self.shown.unwrap_or_default();
        self.shown = frame.shown.map(|own| before + own);
        Ok(())
    }

    /// The mean rate. A format that counts in hundredths of a second spreads others over the frames.
    fn rate(&self) -> Option<f64> {
        let shown = self.shown.filter(|shown| !shown.is_zero())?;
        Some(self.frames as f64 * 1e9 / shown.as_nanos() as f64)
    }
}

/// The frames of a clip, scaled to what `target` says of their size.
fn collect(
    path: &Path,
    frames: Frames,
    clip: Clip,
    target: impl Fn(Size) -> Result<Option<Size>, DataError>,
) -> Result<Video, DataError> {
    let (mut counted, mut kept) = (Counted::default(), Vec::new());
    let mut goal = None;
    for frame in frames.pictures.take(clip.num_frames) {
        let frame = frame?;
        counted.add(path, &frame)?;
        if counted.frames == 1 {
            goal = target(frame.picture.size())?;
        }
        let size = goal.unwrap_or(frame.picture.size());
        if counted.frames > MAX_BYTES / (3 * size.height * size.width).max(1) {
            return Err(DataError::VideoTooLong { path: path.into() });
        }
        kept.push(match goal {
            Some(size) => frame.picture.crop_and_resize(size),
            None => frame.picture,
        });
    }
    if kept.is_empty() {
        return Err(no_frames(path));
    }
    kept.truncate(clip.frames_of(kept.len()));
    Ok(Video::new(kept, frames.rate.or(counted.rate())))
}

fn no_frames(path: &Path) -> DataError {
    DataError::Video { path: path.into(), reason: "it has no frames".into() }
}

#[cfg(test)]
mod tests;
