//! How large a picture or a video is.

use std::fmt;

use fewstep_data::image::Size;

/// Size of what is drawn: of a picture, or of each of a video's frames.
///
/// Latents and pixels of a video are stacked along the height, `[B, C, F · H, W]`, which is in memory what
/// `[B, C, F, H, W]` is: noise, samplers, methods and files see one tall picture. Only a family takes frames apart, and is
/// told their number wherever it has to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Frames; 1 is a picture.
    pub frames: usize,
    /// Height of a frame in pixels.
    pub height: usize,
    /// Width of a frame in pixels.
    pub width: usize,
}

impl Extent {
    /// A video of frames of a size.
    pub fn of_frames(size: Size, frames: usize) -> Self {
        Self { frames, height: size.height, width: size.width }
    }

    /// The number of frames as files have it: nothing for a picture.
    pub fn num_frames(self) -> Option<usize> {
        (self.frames != 1).then_some(self.frames)
    }

    /// The size of a frame.
    pub fn size(self) -> Size {
        Size { height: self.height, width: self.width }
    }
}

impl fmt::Display for Extent {
    /// Width x height, and of a video its frames.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.size())?;
        if self.frames == 1 { Ok(()) } else { write!(f, "x{}", self.frames) }
    }
}

impl From<Size> for Extent {
    /// A picture.
    fn from(size: Size) -> Self {
        Self::of_frames(size, 1)
    }
}

impl From<[usize; 2]> for Extent {
    /// A picture of `[height, width]` px.
    fn from([height, width]: [usize; 2]) -> Self {
        Self { frames: 1, height, width }
    }
}
