//! Writing videos: lossless WebP for data sets, GIF and mp4 to look at, mkv and folders of frames for other programs.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use ::image::codecs::gif::{GifEncoder, Repeat};
use ::image::codecs::webp::WebPEncoder;
use ::image::{Delay, DynamicImage, ExtendedColorType, ImageError, RgbImage};

use super::ffmpeg::Ffmpeg;
use super::{Video, extension, folder};
use crate::image::{MAX_SIDE_PX, Picture, Size};
use crate::{DataError, atomic};

/// The rate of a video that has none: what published video models are trained on.
const USUAL_FRAMES_PER_SECOND: f64 = 16.0;

/// Pixels from which the palette of a GIF's frame is sought.
const GIF_PALETTE_PIXELS: usize = 40_000;

impl Video {
    /// Writes the video, atomically, as the extension says:
    ///
    /// | extension | what it is | for |
    /// |---|---|---|
    /// | `webp` | lossless animation; the same pixels are read back | data sets, browsers |
    /// | none | a folder of png files; replaces one that is there | other programs |
    /// | `mkv` | lossless FFV1, through ffmpeg | DiffSynth-Studio, which takes one frame of a WebP |
    /// | `gif` | a palette of 256 colours for each frame | looking at it anywhere |
    /// | `mp4` | H.264, through ffmpeg | looking at it |
    ///
    /// # Errors
    /// When the extension is another one, the file cannot be written, or ffmpeg is needed and not installed.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        let written = match extension(path).as_str() {
            "" => folder::write(self, path),
            "webp" => webp(self).and_then(|bytes| atomic::write(path, &bytes)),
            "gif" => atomic::write_with(path, |file| gif(self, file)),
            "mkv" => Ffmpeg::find(path, "mkv")?.write(self, path, self.rate(), &MKV),
            "mp4" => Ffmpeg::find(path, "mp4")?.write(self, path, self.rate(), &mp4(self.size())),
            found => {
                return Err(DataError::VideoFormat {
                    path: path.into(),
                    purpose: " to write",
                    found: found.into(),
                    expected: "webp, gif, mkv, mp4 or none, for a folder of frames",
                });
            }
        };
        written.map_err(DataError::io(path))
    }

    fn rate(&self) -> f64 {
        self.frames_per_second.unwrap_or(USUAL_FRAMES_PER_SECOND)
    }

    /// How long each frame is shown, in units of which a second has so many, without drifting from the rate.
    fn durations(&self, units_per_second: f64) -> impl Iterator<Item = u32> {
        let rate = self.rate();
        let end = move |frame: usize| (frame as f64 * units_per_second / rate).round() as u64;
        (0..self.frames.len()).map(move |frame| (end(frame + 1) - end(frame)).min(u64::from(u16::MAX)) as u32)
    }
}

/// Loses nothing: FFV1 has red, green and blue of 8 bits only beside a fourth byte.
const MKV: [&str; 6] = ["-c:v", "ffv1", "-pix_fmt", "bgr0", "-f", "matroska"];

/// What every player shows, with few losses. Its halved colours need even sides; others keep all of theirs, which some
/// players do not show.
fn mp4(size: Size) -> Vec<&'static str> {
    let is_even = size.height.is_multiple_of(2) && size.width.is_multiple_of(2);
    let pixels = if is_even { "yuv420p" } else { "yuv444p" };
    let colours = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"];
    let encoder = ["-c:v", "libx264", "-crf", "17", "-pix_fmt", pixels];
    let filter = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-color_range", "tv"];
    let container = ["-movflags", "+faststart", "-f", "mp4"];
    [&encoder[..], &filter, &colours, &container].concat()
}

fn gif(video: &Video, file: &mut File) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let size = video.frames()[0].size();
    // 1 looks at every pixel, 10 at a tenth of them.
    let speed = (size.height * size.width / GIF_PALETTE_PIXELS).clamp(1, 10);
    let mut encoder = GifEncoder::new_with_speed(&mut file, speed as i32);
    encoder.set_repeat(Repeat::Infinite).map_err(as_io)?;
    for (frame, hundredths) in video.frames().iter().zip(video.durations(100.0)) {
        let delay = Delay::from_numer_denom_ms(10 * hundredths, 1);
        let pixels = DynamicImage::ImageRgb8(rgb_image(frame)).into_rgba8();
        encoder.encode_frame(::image::Frame::from_parts(pixels, 0, 0, delay)).map_err(as_io)?;
    }
    drop(encoder); // writes the end
    file.flush()
}

fn rgb_image(picture: &Picture) -> RgbImage {
    RgbImage::from_raw(picture.width as u32, picture.height as u32, picture.rgb.clone())
        .expect("a picture has three bytes a pixel")
}

/// An animation of losslessly packed frames that replace each other: the container of the WebP specification (RFC 9649)
/// around what the encoder makes of each frame.
fn webp(video: &Video) -> io::Result<Vec<u8>> {
    /// Bit of the feature flags that tells of an animation.
    const IS_ANIMATION: u8 = 0b10;
    /// Bit of a frame's flags: it replaces what was there and is not blended with it.
    const REPLACES: u8 = 0b10;
    let Size { height, width } = video.size();
    if height.max(width) > MAX_SIDE_PX {
        let reason =
            format!("found frames of {width}x{height} px, WebP has at most {MAX_SIDE_PX} px on each side");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let sides = [three_bytes(width as u32 - 1), three_bytes(height as u32 - 1)].concat();
    let mut chunks = b"WEBP".to_vec();
    chunk(&mut chunks, b"VP8X", &[&[IS_ANIMATION, 0, 0, 0], &sides]);
    // Background and number of loops: none and without end.
    chunk(&mut chunks, b"ANIM", &[&[0; 6]]);
    for (frame, millis) in video.frames().iter().zip(video.durations(1000.0)) {
        let place = [0; 6];
        chunk(&mut chunks, b"ANMF", &[&place, &sides, &three_bytes(millis), &[REPLACES], &packed(frame)?]);
    }
    let mut file = Vec::with_capacity(8 + chunks.len());
    let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, "a WebP file has at most 4 GiB");
    file.extend(b"RIFF");
    file.extend(u32::try_from(chunks.len()).map_err(|_| too_large())?.to_le_bytes());
    file.extend(chunks);
    Ok(file)
}

/// The chunk with a frame's pixels, out of the file that the encoder makes of it.
fn packed(frame: &Picture) -> io::Result<Vec<u8>> {
    const FILE_HEADER_BYTES: usize = 12;
    let mut file = Vec::new();
    let (width, height) = (frame.width as u32, frame.height as u32);
    let encoder = WebPEncoder::new_lossless(&mut file);
    encoder.encode(&frame.rgb, width, height, ExtendedColorType::Rgb8).map_err(as_io)?;
    Ok(file.split_off(FILE_HEADER_BYTES))
}

/// Appends a chunk: its name, its length, and its data to a full pair of bytes.
fn chunk(file: &mut Vec<u8>, name: &[u8; 4], data: &[&[u8]]) {
    let bytes: usize = data.iter().map(|part| part.len()).sum();
    file.extend(name);
    file.extend((bytes as u32).to_le_bytes());
    data.iter().for_each(|part| file.extend(*part));
    file.extend((bytes % 2 == 1).then_some(0));
}

fn three_bytes(number: u32) -> [u8; 3] {
    let [a, b, c, _] = number.to_le_bytes();
    [a, b, c]
}

fn as_io(fault: ImageError) -> io::Error {
    match fault {
        ImageError::IoError(fault) => fault,
        other => io::Error::other(other),
    }
}
