//! Reading against the peers' frames, round trips, and what is refused.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use fewstep_testkit::golden;

use super::*;

mod refused;
mod written;

/// Set where a missing ffmpeg is a failure, as in .ci/run.
const REQUIRED: &str = "FEWSTEP_REQUIRE_FFMPEG";

/// Whether ffmpeg is installed. Where it is not, says past the tests' capture what is not tested.
///
/// # Panics
/// If it is not and [`REQUIRED`] is set.
fn has_ffmpeg(tested: &str) -> bool {
    let found = ffmpeg::Ffmpeg::find(Path::new("test"), "mp4");
    if let Err(missing) = &found {
        assert!(std::env::var_os(REQUIRED).is_none(), "{missing}; {REQUIRED} is set");
        writeln!(std::io::stderr(), "NOT TESTED: {tested}; ffmpeg is not installed").unwrap();
    }
    found.is_ok()
}

fn data(name: &str) -> PathBuf {
    golden("data/video").join(name)
}

/// What the peers take of the file, below each other (goldens/make/videos.py).
fn of_peer(name: &str) -> Picture {
    Picture::load(&data(&format!("{name}.png"))).unwrap()
}

/// The clip and scaling of goldens/make/videos.py.
const CLIP: Clip = Clip { num_frames: 9, division: 4, remainder: 1 };
const FIT: Resize = Resize::Exact { height: 32, width: 24 };

/// The largest difference of a level.
fn difference(found: &Picture, expected: &Picture) -> u8 {
    assert_eq!(found.size(), expected.size());
    found.rgb.iter().zip(&expected.rgb).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// Smooth colours that move.
fn waves(frames: usize, width: usize, height: usize) -> Video {
    let level = |at: usize| (127.0 + 120.0 * (at as f64 / 23.0).sin()) as u8;
    let frame = |number: usize| Picture {
        width,
        height,
        rgb: (0..width * height)
            .flat_map(|at| [1, 2, 3].map(|shift| level(at % width + shift * (at / width) + 5 * number)))
            .collect(),
    };
    Video::new((0..frames).map(frame).collect(), Some(16.0))
}

#[test]
fn animations_and_folders_are_read_as_by_the_peers() {
    for (name, tolerance) in [
        ("opaque.gif", 0),
        // Opaque pixels that are blended come out a level darker at most, where libwebp copies them. Ours replace.
        ("lossless.webp", 1),
        ("holes.webp", 0),
        // Colours of halved resolution are interpolated in another order than by libwebp.
        ("lossy.webp", 1),
        ("folder", 0),
    ] {
        let found = difference(&Video::load(&data(name), Clip::WHOLE).unwrap().stacked(), &of_peer(name));
        assert!(found <= tolerance, "{name}: differs by {found}, expected at most {tolerance}");
    }
}

/// The peer shows the palette's colour of what is transparent there, which no viewer does.
#[test]
fn where_a_gif_shows_nothing_it_is_black_and_elsewhere_as_by_the_peer() {
    let found = Video::load(&data("holes.gif"), Clip::WHOLE).unwrap();
    let expected = of_peer("holes.gif");
    let (mut black, stacked) = (0, found.stacked());
    for (at, (pixel, peer)) in stacked.rgb.chunks(3).zip(expected.rgb.chunks(3)).enumerate() {
        let (frame, row, column) = (at / 48 / 32, at / 48 % 32, at % 48);
        let is_hole = (column as f64 - 4.0 - 3.0 * frame as f64).hypot(row as f64 - 12.0) < 5.0;
        assert_eq!(pixel, if is_hole { &[0; 3] } else { peer }, "frame {frame}, row {row}, column {column}");
        black += usize::from(is_hole);
    }
    assert!(black > 200, "{black}");
}

#[test]
fn a_clip_of_an_animation_is_cut_and_scaled_as_by_the_peer() {
    let clip = Video::load_resized(&data("opaque.gif"), CLIP, FIT).unwrap();
    assert_eq!(clip.stacked(), of_peer("opaque.gif.clip"));
}

/// Of different versions of ffmpeg: the peer's brings its own.
#[test]
fn what_ffmpeg_reads_is_cut_and_scaled_as_by_the_peer() {
    if !has_ffmpeg("reading mp4, webm, avi and mkv") {
        return;
    }
    for name in ["h264.mp4", "vp9.webm", "mpeg4.avi"] {
        let whole = Video::load(&data(name), Clip::WHOLE).unwrap();
        let found = difference(&whole.stacked(), &of_peer(name));
        eprintln!("{name}: {found}");
        assert!(found <= 2, "{name}: differs by {found}");
        assert_eq!(whole.frames_per_second(), Some(12.5), "{name}");
        let clip = Video::load_resized(&data(name), CLIP, FIT).unwrap();
        let found = difference(&clip.stacked(), &of_peer(&format!("{name}.clip")));
        assert!(found <= 2, "{name}: differs by {found}");
    }
}

/// Frames are repeated where a file has none for their time. The peer takes the same, but only as many as are stored.
#[test]
fn a_file_of_uneven_rate_is_read_at_an_even_one() {
    if !has_ffmpeg("a video of uneven rate") {
        return;
    }
    let clip = Video::load(&data("uneven.mkv"), Clip { num_frames: 7, ..Clip::WHOLE }).unwrap();
    assert!(difference(&clip.stacked(), &of_peer("uneven.mkv")) <= 2);
    assert_eq!(Video::header(&data("uneven.mkv"), 1000).unwrap().num_frames, 21);
}

#[test]
fn the_header_tells_size_number_and_rate() {
    let expected = |num_frames, frames_per_second| Header {
        size: Size { height: 32, width: 48 },
        num_frames,
        frames_per_second,
    };
    assert_eq!(Video::header(&data("opaque.gif"), 100).unwrap(), expected(7, Some(12.5)));
    assert_eq!(Video::header(&data("opaque.gif"), 3).unwrap(), expected(3, Some(12.5)));
    assert_eq!(Video::header(&data("lossy.webp"), 100).unwrap(), expected(12, Some(12.5)));
    assert_eq!(Video::header(&data("folder"), 100).unwrap(), expected(6, None));
    if has_ffmpeg("the header of an mp4") {
        assert_eq!(Video::header(&data("h264.mp4"), 100).unwrap(), expected(12, Some(12.5)));
        assert_eq!(Video::header(&data("h264.mp4"), 5).unwrap(), expected(5, Some(12.5)));
    }
}

#[test]
fn frames_of_a_folder_are_in_natural_order() {
    let folder = tempfile::tempdir().unwrap();
    let video = waves(12, 8, 4);
    for (at, frame) in video.frames().iter().enumerate() {
        frame.save_png(&folder.path().join(format!("{}.png", at + 1))).unwrap();
    }
    for other in ["notes.txt", ".0.png"] {
        fs::write(folder.path().join(other), "x").unwrap();
    }
    assert_eq!(Video::load(folder.path(), Clip::WHOLE).unwrap().frames(), video.frames());
}

#[test]
fn stacked_pixels_are_those_of_the_frames_channel_by_channel() {
    let video = waves(3, 4, 2);
    let stacked = video.stacked();
    assert_eq!((stacked.width, stacked.height), (4, 6));
    let (pixels, third) = (stacked.to_pixels(), video.frames()[2].to_pixels());
    // [channel, frame, row, column] of the whole against [channel, row, column] of the third.
    assert_eq!(pixels[24 + 2 * 8..24 + 3 * 8], third[8..16]);
    assert_eq!(Video::from_stacked(&stacked, 3, Some(16.0)), video);
}
