//! Small files that ask for much memory get none: the peak of what is allocated while they are read.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use fewstep_data::image::Picture;
use fewstep_data::metadata::Metadata;
use fewstep_data::video::{Clip, Video};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Bytes that a bomb unpacks to.
const UNPACKED: usize = 300 << 20;

/// What a reader gives, and the megabytes that were allocated at once beyond what there was before.
fn peak_mb<T>(read: impl FnOnce() -> T) -> (T, f32) {
    let before = MEMORY.current_usage_as_mb();
    MEMORY.reset_peak_usage();
    let result = read();
    (result, MEMORY.peak_usage_as_mb() - before)
}

/// The tests share one count, so they run one at a time.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// zlib data of so many zeros.
fn packed_zeros(count: usize) -> Vec<u8> {
    let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    let piece = vec![0; 1 << 20];
    for _ in 0..count >> 20 {
        packer.write_all(&piece).unwrap();
    }
    packer.finish().unwrap()
}

/// A grey png of this size with these chunks between header and end.
fn png(side_px: u32, chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let header = [&side_px.to_be_bytes()[..], &side_px.to_be_bytes(), &[8, 0, 0, 0, 0]].concat();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let (first, last): (&[u8], &[u8]) = (&header, &[]);
    for (name, data) in [(b"IHDR", first)].iter().chain(chunks).chain(&[(b"IEND", last)]) {
        let mut crc = flate2::Crc::new();
        crc.update(&[name.as_slice(), data].concat());
        file.extend((data.len() as u32).to_be_bytes());
        file.extend([name.as_slice(), data, &crc.sum().to_be_bytes()].concat());
    }
    file
}

fn decode(file: &[u8]) -> Result<Picture, String> {
    Picture::decode(file, Path::new("a.png")).map_err(|error| error.to_string())
}

#[test]
fn a_png_that_unpacks_to_more_than_its_pixels_takes_the_memory_of_its_pixels() {
    let _alone = alone();
    let file = png(16, &[(b"IDAT", &packed_zeros(UNPACKED))]);
    let (picture, peak) = peak_mb(|| decode(&file).map(|picture| picture.size()));
    assert!(peak < 2.0, "{peak} MB, {picture:?}");
}

#[test]
fn a_profile_or_text_that_unpacks_without_end_is_cut() {
    let _alone = alone();
    let (zeros, pixels) = (packed_zeros(UNPACKED), packed_zeros(1 << 20));
    for name in [b"iCCP", b"zTXt"] {
        let file = png(16, &[(name, &[b"name\0\0", zeros.as_slice()].concat()), (b"IDAT", &pixels)]);
        let (picture, peak) = peak_mb(|| decode(&file).map(|picture| picture.size()));
        assert!(peak < 80.0, "{name:?}: {peak} MB, {picture:?}");
    }
}

#[test]
fn sizes_that_only_a_header_claims_are_refused_without_memory() {
    let _alone = alone();
    for side_px in [u32::MAX >> 1, 1 << 20, 16_000] {
        let file = png(side_px, &[(b"IDAT", &[])]);
        let (picture, peak) = peak_mb(|| decode(&file));
        assert!(picture.is_err() && peak < 1.0, "{side_px} px: {peak} MB");
    }
    // A webp of 16384x16384 px in its lossless form, and a jpeg of 65535x65535 px.
    let webp = [b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f".as_slice(), &[0xff; 4], &[0; 6]].concat();
    let frame = [0xff, 0xd8, 0xff, 0xc0, 0, 11, 8, 0xff, 0xff, 0xff, 0xff, 1, 1, 0x11, 0];
    let scan = [0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0, 0xff, 0xd9];
    for file in [webp, [frame.as_slice(), &scan].concat()] {
        let (picture, peak) = peak_mb(|| decode(&file));
        assert!(picture.is_err() && peak < 1.0, "{picture:?}: {peak} MB");
    }
}

#[test]
fn metadata_takes_memory_in_proportion_to_its_file() {
    let _alone = alone();
    let parse = |name: &str, text: String| {
        let megabytes = text.len() as f32 / (1 << 20) as f32;
        let read = || Metadata::parse(Path::new(name), text.into_bytes()).map(|read| read.rows.len());
        let (read, peak) = peak_mb(read);
        (read.map_err(|error| error.to_string()), peak / megabytes)
    };
    let (read, factor) = parse("m.csv", format!("image{}\n", ",x".repeat(2_000_000)));
    assert!(read.is_err() && factor < 20.0, "{factor} times the file");
    let (read, factor) = parse("m.json", format!("[{}1]", "[],".repeat(2_000_000)));
    assert!(read.is_err() && factor < 5.0, "{factor} times the file");
    let row = "{\"image\": \"images/000000.png\", \"prompt\": \"a photo of a cat on a red sofa\"},";
    let (read, factor) = parse("m.json", format!("[{}{{}}]", row.repeat(20_000)));
    assert_eq!(read, Ok(20_001));
    assert!(factor < 10.0, "{factor} times the file");
}

/// A GIF of this size in two colours and so many frames of one pixel.
fn gif(side_px: u16, frames: usize) -> Vec<u8> {
    let frame = [0x2c, 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x44, 1, 0];
    let side = side_px.to_le_bytes();
    let header = [b"GIF89a", &side[..], &side, &[0x80, 0, 0, 0, 0, 0, 255, 255, 255]].concat();
    [header, frame.repeat(frames), vec![b';']].concat()
}

fn frames(file: &[u8], num_frames: usize) -> Result<usize, String> {
    let video = Video::decode(file.to_vec(), Path::new("a.gif"), Clip { num_frames, ..Clip::WHOLE });
    video.map(|video| video.frames().len()).map_err(|error| error.to_string())
}

#[test]
fn frames_without_end_are_refused_and_the_first_ones_take_their_own_memory() {
    let _alone = alone();
    let file = gif(1, 300_000);
    let (read, peak) = peak_mb(|| frames(&file, 100_000));
    assert!(read.unwrap_err().contains("a.gif: the video is too long, expected less than 100000 frames"));
    assert!(peak < 30.0, "{peak} MB");
    // 9 MB a frame, composed by 4 bytes a pixel; the file itself is copied.
    let file = gif(1732, 1000);
    let (read, peak) = peak_mb(|| frames(&file, 3));
    assert_eq!(read, Ok(3));
    assert!(peak < 70.0, "{peak} MB");
}

#[test]
fn an_animation_of_a_size_that_only_its_header_claims_is_refused_without_memory() {
    let _alone = alone();
    let canvas = [2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let webp = [b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0".as_slice(), &canvas, &[0; 6]].concat();
    for file in [gif(u16::MAX, 1), gif(16_000, 1), webp] {
        let (read, peak) = peak_mb(|| frames(&file, 5));
        assert!(read.is_err() && peak < 1.0, "{read:?}: {peak} MB");
    }
}
