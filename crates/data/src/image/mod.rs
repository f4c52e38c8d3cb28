//! Pictures in memory: loading with PIL's mode conversions, pixel scaling, and DiffSynth's crop and resize.

mod resample;
mod size;
mod whole;

use std::io::{BufRead, BufReader, Cursor, Seek};
use std::path::Path;

use ::image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::{DataError, atomic, bounded};
pub use size::{Resize, Size};
use whole::has_broken_palette;
pub(crate) use whole::is_cut_off;

/// The largest side of a picture that is decoded. A file of a few bytes may claim any size.
pub const MAX_SIDE_PX: usize = 16_384;

/// The largest area of a picture that is decoded, in pixels: PIL's, which raises `DecompressionBombError` beyond.
pub const MAX_PIXELS: usize = 178_956_970;

/// The largest picture file: a picture of [`MAX_PIXELS`] with eight bytes a pixel that could not be compressed.
const MAX_FILE_BYTES: u64 = 8 * MAX_PIXELS as u64;

/// What a decoder may allocate besides the picture: rows, and profiles and texts, which png compresses.
const MAX_DECODER_BYTES: u64 = 32 << 20;

/// An 8-bit RGB picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Red, green, blue of each pixel, row by row: `3 * width * height` bytes.
    pub rgb: Vec<u8>,
}

/// How a real number becomes one of 256 levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest level, as diffusers does.
    Nearest,
    /// Towards zero, as DiffSynth-Studio does; half a level darker on average.
    Truncate,
}

impl Picture {
    /// Reads a png, jpeg or webp file, recognised by its content, as `PIL.Image.open(path).convert("RGB")` would.
    ///
    /// Transparency is dropped, not blended, 16-bit grey is cut off at 255, EXIF orientation is not applied, and of an
    /// animation the first picture is taken: all are PIL's habits. Jpeg decoders may differ by one level from PIL's.
    ///
    /// # Errors
    /// When the file is missing, no picture, damaged or cut off, or larger than [`MAX_SIDE_PX`] or [`MAX_PIXELS`].
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = bounded::read(path, MAX_FILE_BYTES).map_err(DataError::io(path))?;
        Self::decode(&bytes, path)
    }

    /// As [`Self::load`], from the bytes of a file; `path` only names it in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, DataError> {
        let broken = |reason: ::image::ImageError| DataError::Picture {
            path: path.into(),
            reason: reason.to_string(),
        };
        let decoder = limited_decoder(Cursor::new(bytes), path)?;
        let refused = |reason: &str| DataError::Picture { path: path.into(), reason: reason.into() };
        if is_cut_off(bytes) {
            return Err(refused("the file is cut off"));
        }
        if has_broken_palette(bytes) {
            return Err(refused("its palette ends within a colour"));
        }
        Ok(convert(DynamicImage::from_decoder(decoder).map_err(broken)?))
    }

    /// The size of a picture file, from its header alone.
    ///
    /// # Errors
    /// As [`Self::load`], except that damage behind the header goes unnoticed.
    pub fn size_of(path: &Path) -> Result<Size, DataError> {
        let file = bounded::open(path, MAX_FILE_BYTES).map_err(DataError::io(path))?;
        Ok(dimensions(limited_decoder(BufReader::new(file), path)?.as_ref()))
    }

    /// As [`Self::size_of`], from the bytes of a file; `path` only names it in errors.
    ///
    /// # Errors
    /// As [`Self::size_of`].
    pub fn size_in(bytes: &[u8], path: &Path) -> Result<Size, DataError> {
        Ok(dimensions(limited_decoder(Cursor::new(bytes), path)?.as_ref()))
    }

    /// The picture's size.
    pub fn size(&self) -> Size {
        Size { height: self.height, width: self.width }
    }

    /// The picture as a png file's bytes.
    ///
    /// # Panics
    /// When `rgb` does not have `3 * width * height` bytes.
    pub fn to_png(&self) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let (width, height) = (self.width as u32, self.height as u32);
        ::image::write_buffer_with_format(
            &mut bytes,
            &self.rgb,
            width,
            height,
            ColorType::Rgb8,
            ImageFormat::Png,
        )
        .expect("a picture in memory is a valid png, and writing to memory cannot fail");
        bytes.into_inner()
    }

    /// Writes the picture as png, atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_png(&self, path: &Path) -> Result<(), DataError> {
        atomic::write(path, &self.to_png()).map_err(DataError::io(path))
    }

    /// The picture as real numbers in [-1, 1], in channel, row, column order.
    pub fn to_pixels(&self) -> Vec<f32> {
        // One multiplication and one subtraction in f32, so that the numbers are the peer's to the bit.
        let scaled = |&level: &u8| f32::from(level) * (2.0 / 255.0) - 1.0;
        (0..3).flat_map(|channel| self.rgb.iter().skip(channel).step_by(3).map(scaled)).collect()
    }

    /// The picture of real numbers in [-1, 1] in channel, row, column order; values outside are cut off.
    ///
    /// # Panics
    /// When there are not `3 * width * height` of them.
    pub fn from_pixels(pixels: &[f32], width: usize, height: usize, rounding: Rounding) -> Self {
        let area = width * height;
        assert_eq!(
            pixels.len(),
            3 * area,
            "found {} pixel values, expected 3 x {height} x {width}",
            pixels.len()
        );
        let level = |value: f32| match rounding {
            Rounding::Nearest => ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8,
            Rounding::Truncate => ((value + 1.0) * 127.5).clamp(0.0, 255.0) as u8,
        };
        let rgb =
            (0..area).flat_map(|at| [0, 1, 2].map(|channel| level(pixels[channel * area + at]))).collect();
        Self { width, height, rgb }
    }

    /// The picture scaled until it covers `target` and cut to it in the middle, as DiffSynth's `ImageCropAndResize` does.
    ///
    /// Scaling is PIL's antialiased bilinear filter, bit for bit.
    pub fn crop_and_resize(&self, target: Size) -> Self {
        resample::bilinear(self, self.size().covering(target)).crop_centre(target)
    }

    fn crop_centre(&self, target: Size) -> Self {
        let offset = |whole: usize, part: usize| ((whole - part) as f64 / 2.0).round_ties_even() as usize;
        let (top, left) = (offset(self.height, target.height), offset(self.width, target.width));
        let rows = self.rgb.chunks_exact(3 * self.width).skip(top).take(target.height);
        let rgb = rows.flat_map(|row| &row[3 * left..3 * (left + target.width)]).copied().collect();
        Self { width: target.width, height: target.height, rgb }
    }
}

/// A decoder that has been asked for the picture's size and found it acceptable, before any pixel is decoded.
fn limited_decoder<'a>(
    reader: impl BufRead + Seek + 'a,
    path: &Path,
) -> Result<Box<dyn ImageDecoder + 'a>, DataError> {
    let broken =
        |reason: ::image::ImageError| DataError::Picture { path: path.into(), reason: reason.to_string() };
    let mut reader = ImageReader::new(reader).with_guessed_format().map_err(DataError::io(path))?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(broken)?;
    let found = dimensions(&decoder);
    if found.width.max(found.height) > MAX_SIDE_PX || found.width * found.height > MAX_PIXELS {
        return Err(DataError::TooLarge { path: path.into(), found });
    }
    Ok(Box::new(decoder))
}

fn dimensions(decoder: &(impl ImageDecoder + ?Sized)) -> Size {
    let (width, height) = decoder.dimensions();
    Size { height: height as usize, width: width as usize }
}

/// PIL's `convert("RGB")`.
pub(crate) fn convert(image: DynamicImage) -> Picture {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let high = |sample: u16| (sample >> 8) as u8;
    let rgb = match image {
        DynamicImage::ImageRgb8(pixels) => pixels.into_raw(),
        DynamicImage::ImageRgba8(pixels) => pixels.pixels().flat_map(|p| [p[0], p[1], p[2]]).collect(),
        DynamicImage::ImageLuma8(pixels) => pixels.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(pixels) => pixels.pixels().flat_map(|p| [p[0]; 3]).collect(),
        // PIL keeps 16-bit grey in its own mode and cuts it off when converting; with alpha or colour it keeps the high byte.
        DynamicImage::ImageLuma16(pixels) => pixels.pixels().flat_map(|p| [p[0].min(255) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(pixels) => pixels.pixels().flat_map(|p| [high(p[0]); 3]).collect(),
        DynamicImage::ImageRgb16(pixels) => pixels.pixels().flat_map(|p| p.0.map(high)).collect(),
        DynamicImage::ImageRgba16(pixels) => {
            pixels.pixels().flat_map(|p| [p[0], p[1], p[2]].map(high)).collect()
        }
        other => other.into_rgb8().into_raw(),
    };
    Picture { width, height, rgb }
}

#[cfg(test)]
mod tests;
