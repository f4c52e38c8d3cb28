//! GIF and WebP files, their frames composed as viewers show them.

use std::io::Cursor;
use std::path::Path;

use ::image::codecs::gif::GifDecoder;
use ::image::codecs::webp::WebPDecoder;
use ::image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageResult, Limits};

use super::{Frame, Frames};
use crate::image::{MAX_PIXELS, Picture, convert, is_cut_off};
use crate::{DataError, bounded};

/// The largest animation file; it is read whole.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// What a decoder of GIF may allocate: a frame and what it is composed to, 4 bytes a pixel each.
const MAX_DECODER_BYTES: u64 = 12 * MAX_PIXELS as u64;

/// Opens a file that is recognised by its content.
pub(super) fn open(path: &Path) -> Result<Frames, DataError> {
    decode(bounded::read(path, MAX_FILE_BYTES).map_err(DataError::io(path))?, path)
}

/// As [`open`], from the bytes of a file.
pub(super) fn decode(bytes: Vec<u8>, path: &Path) -> Result<Frames, DataError> {
    let unreadable = |reason: String| DataError::Video { path: path.into(), reason };
    // Checks the bounds of the size; every frame is as large.
    Picture::size_in(&bytes, path).map_err(|fault| match fault {
        DataError::Picture { reason, .. } => unreadable(reason),
        other => other,
    })?;
    if is_cut_off(&bytes) {
        return Err(unreadable("the file is cut off".into()));
    }
    let frames = match ::image::guess_format(&bytes) {
        Ok(ImageFormat::Gif) => gif(bytes),
        Ok(ImageFormat::WebP) => webp(bytes),
        _ => return Err(unreadable("found a picture, expected a GIF or WebP animation".into())),
    };
    let broken =
        |path: &Path, fault: ImageError| DataError::Video { path: path.into(), reason: fault.to_string() };
    let (frames, path) = (frames.map_err(|fault| broken(path, fault))?, path.to_path_buf());
    let pictures = frames.map(move |frame| frame.map_err(|fault| broken(&path, fault)));
    Ok(Frames { pictures: Box::new(pictures), rate: None })
}

type Decoded = Box<dyn Iterator<Item = ImageResult<Frame>>>;

fn gif(bytes: Vec<u8>) -> ImageResult<Decoded> {
    let mut decoder = GifDecoder::new(Cursor::new(bytes))?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    decoder.set_limits(limits)?;
    Ok(composed(decoder))
}

fn webp(bytes: Vec<u8>) -> ImageResult<Decoded> {
    let decoder = WebPDecoder::new(Cursor::new(bytes))?;
    if decoder.has_animation() {
        return Ok(composed(decoder));
    }
    let picture = convert(DynamicImage::from_decoder(decoder)?);
    Ok(Box::new(std::iter::once(Ok(Frame { picture, shown: None }))))
}

fn composed(decoder: impl AnimationDecoder<'static>) -> Decoded {
    Box::new(decoder.into_frames().map(|frame| {
        let frame = frame?;
        let shown = Some(frame.delay().into());
        Ok(Frame { picture: convert(DynamicImage::ImageRgba8(frame.into_buffer())), shown })
    }))
}
