//! Which size a picture is trained at.

use std::fmt;

use super::MAX_PIXELS;
use crate::DataError;

/// A picture's size in pixels; shown as width x height.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl Size {
    /// The size in the same proportions that just covers `target`.
    pub(super) fn covering(self, target: Size) -> Size {
        let by_width = target.width as f64 / self.width as f64;
        let by_height = target.height as f64 / self.height as f64;
        let scaled = |side: usize| (side as f64 * by_width.max(by_height)).round_ties_even() as usize;
        Size { height: scaled(self.height), width: scaled(self.width) }
    }
}

/// The rule that gives every picture its training size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// All pictures to one size.
    Exact {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Each picture at its own size, shrunk to at most `max_pixels` and rounded down to multiples of `division`.
    MaxPixels {
        /// The largest area in pixels; smaller pictures are not enlarged.
        max_pixels: usize,
        /// What both sides must be multiples of: the family's division factor.
        division: usize,
    },
}

impl Resize {
    /// The training size of a picture, as DiffSynth's `ImageCropAndResize.get_height_width` computes it.
    ///
    /// # Errors
    /// When a side rounds down to nothing, or the picture is so narrow that scaled to cover its target it would have
    /// more than [`MAX_PIXELS`].
    pub fn target_size(self, picture: Size) -> Result<Size, DataError> {
        let (max_pixels, division) = match self {
            Self::Exact { height, width } => return coverable(picture, Size { height, width }),
            Self::MaxPixels { max_pixels, division } => (max_pixels, division),
        };
        let area = picture.height * picture.width;
        let shrink = if area > max_pixels { (area as f64 / max_pixels as f64).sqrt() } else { 1.0 };
        let rounded = |side: usize| (side as f64 / shrink) as usize / division * division;
        let target = Size { height: rounded(picture.height), width: rounded(picture.width) };
        if target.height == 0 || target.width == 0 {
            return Err(DataError::TooSmall { found: picture, division });
        }
        Ok(target)
    }
}

/// The target, where covering it takes no picture out of all bounds.
fn coverable(picture: Size, target: Size) -> Result<Size, DataError> {
    let covering = picture.covering(target);
    match covering.height.checked_mul(covering.width) {
        Some(area) if area <= MAX_PIXELS => Ok(target),
        _ => Err(DataError::TooNarrow { found: picture, target }),
    }
}
