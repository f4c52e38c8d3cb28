//! What is no video, or too much of one.

use std::time::{Duration, Instant};

use super::ffmpeg::Ffmpeg;
use super::*;

/// What is wrong with a file of this name and content, with its folder left out.
fn error(name: &str, content: impl AsRef<[u8]>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    error_of(&path)
}

fn error_of(path: &Path) -> String {
    let error = Video::load(path, Clip::WHOLE).unwrap_err().to_string();
    let at_header = Video::header(path, 1000).unwrap_err().to_string();
    assert_eq!(error, at_header, "the header is refused for the same reason");
    error.replace(&format!("{}/", path.parent().unwrap().display()), "")
}

#[test]
fn an_animation_cut_off_anywhere_is_an_error() {
    for name in ["opaque.gif", "holes.gif", "lossless.webp", "lossy.webp"] {
        let bytes = fs::read(data(name)).unwrap();
        let last = bytes.len() - 16;
        for length in (0..last).step_by(211).chain([last]) {
            let error = Video::decode(bytes[..length].to_vec(), Path::new(name), Clip::WHOLE).map(|_| length);
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: no readable video: ")), "{length}: {error}");
        }
    }
}

#[test]
fn a_file_of_another_kind_is_named() {
    for name in ["a.gif", "a.webp"] {
        let text = error(name, "no video");
        assert!(text.starts_with(&format!("{name}: no readable video: ")), "{text}");
        let picture = error(name, waves(1, 8, 8).frames()[0].to_png());
        assert_eq!(
            picture,
            format!("{name}: no readable video: found a picture, expected a GIF or WebP animation")
        );
    }
    assert!(
        error("a.txt", "x")
            .starts_with("a.txt: no video format: found extension `txt`, expected webp, gif, mp4")
    );
    let missing = Video::load(Path::new("nowhere/a.gif"), Clip::WHOLE).unwrap_err().to_string();
    assert!(missing.starts_with("nowhere/a.gif: No such file"), "{missing}");
}

#[test]
fn a_still_webp_is_a_video_of_one_frame() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.webp");
    let still = waves(1, 8, 8);
    let file = fs::File::create(&path).unwrap();
    let encoder = ::image::codecs::webp::WebPEncoder::new_lossless(file);
    encoder.encode(&still.frames()[0].rgb, 8, 8, ::image::ExtendedColorType::Rgb8).unwrap();
    assert_eq!(Video::load(&path, Clip::WHOLE).unwrap().frames(), still.frames());
}

/// The header of a GIF of this size without a palette, and what follows it.
fn gif(width: u16, height: u16, rest: &[u8]) -> Vec<u8> {
    [b"GIF89a", &width.to_le_bytes()[..], &height.to_le_bytes(), &[0x80, 0, 0, 0, 0, 0, 255, 255, 255], rest]
        .concat()
}

/// A frame of one pixel, and the end.
const FRAME: [u8; 16] = [0x2c, 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x44, 1, 0, b';'];

#[test]
fn a_gif_without_frames_or_of_no_size_is_an_error() {
    for (width, rest) in [(8, &b";"[..]), (8, b""), (0, &FRAME)] {
        let empty = error("a.gif", gif(width, 8, rest));
        assert!(empty.starts_with("a.gif: no readable video: "), "{empty}");
    }
}

#[test]
fn sizes_out_of_bounds_are_refused_by_the_header() {
    let error = error("a.gif", gif(u16::MAX, 8, &FRAME));
    assert!(error.starts_with("a.gif: found a picture of 65535x8 px, expected at most 16384 px"), "{error}");
}

#[test]
fn more_frames_than_are_read_are_refused() {
    let too_many = Clip { num_frames: MAX_FRAMES + 1, ..Clip::WHOLE };
    let error = Video::load(&data("folder"), too_many).unwrap_err().to_string();
    assert!(error.contains("the video is too long, expected less than 100000 frames"), "{error}");
}

#[test]
fn a_folder_without_pictures_and_one_of_differing_sizes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("frames");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("notes.txt"), "x").unwrap();
    assert_eq!(
        error_of(&path),
        "frames: no readable video: the folder has no pictures, expected frames as png, jpg, jpeg, webp"
    );
    for (name, width) in [("0.png", 8), ("1.png", 8), ("2.png", 6)] {
        waves(1, width, 8).frames()[0].save_png(&path.join(name)).unwrap();
    }
    assert_eq!(error_of(&path), "frames: frame 3 is 6x8 px, expected 8x8 px as the first");
    fs::write(path.join("1.png"), "x").unwrap();
    assert!(error_of(&path).starts_with("frames/1.png: no readable picture: "));
}

#[test]
fn without_ffmpeg_the_error_says_what_to_install() {
    let missing = Ffmpeg::find_in("".as_ref(), Path::new("a.mp4"), "mp4").err().unwrap();
    assert_eq!(
        missing.to_string(),
        "a.mp4: mp4 needs the programs `ffmpeg` and `ffprobe`, which are not on the search path\nhint: install ffmpeg \
         (Debian: apt-get install ffmpeg; macOS: brew install ffmpeg), or use GIF, WebP or a folder of frames"
    );
}

#[test]
fn what_ffmpeg_cannot_read_is_named() {
    if !has_ffmpeg("damaged mp4 files") {
        return;
    }
    let whole = fs::read(data("h264.mp4")).unwrap();
    let changed = |change: &dyn Fn(usize, u8) -> u8| {
        whole.iter().enumerate().map(|(at, byte)| change(at, *byte)).collect::<Vec<_>>()
    };
    for (what, content) in [
        ("text", b"no video at all, and long enough to be looked at".to_vec()),
        ("nothing", Vec::new()),
        ("cut off", whole[..whole.len() / 2].to_vec()),
        ("other bytes", changed(&|at, byte| if at > 64 { byte ^ 0x5a } else { byte })),
        ("a picture", waves(1, 8, 8).frames()[0].to_png()),
        // Readers that lead to other files.
        (
            "playlist",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n".to_vec(),
        ),
        ("list", b"ffconcat version 1.0\nfile 'other.mp4'\n".to_vec()),
    ] {
        let error = error("a.mp4", &content);
        assert!(error.starts_with("a.mp4: no readable video: ffmpeg"), "{what}: {error}");
    }
    assert!(error_of(Path::new("nowhere/a.mp4")).starts_with("a.mp4: No such file"));
}

#[test]
fn a_video_that_breaks_off_is_an_error_and_its_first_frames_are_not() {
    if !has_ffmpeg("an mkv that breaks off") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mkv");
    let video = waves(30, 64, 48);
    video.save(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    // Where a cluster of the container ends in the middle of a frame.
    fs::write(&path, &whole[..whole.len() * 2 / 3]).unwrap();
    let first = Video::load(&path, Clip { num_frames: 5, ..Clip::WHOLE }).unwrap();
    assert_eq!(first.frames(), &video.frames()[..5]);
    let error = error_of(&path);
    assert!(error.starts_with("a.mkv: no readable video: ffmpeg"), "{error}");
}

#[test]
fn names_are_no_options_and_no_patterns() {
    if !has_ffmpeg("odd names of files") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let video = waves(2, 8, 8);
    for name in
        ["-i.mkv", "a b'c\".mkv", "%03d.mkv", "http:x.mkv", "$(touch x).mkv", "猫|.mkv", "concat:a|b.mkv"]
    {
        let path = folder.path().join(name);
        video.save(&path).unwrap();
        assert_eq!(Video::load(&path, Clip::WHOLE).unwrap(), video, "{name}");
    }
    assert_eq!(ffmpeg::file_address(Path::new("-i.mkv")), "file:-i.mkv");
}

/// A program in ffmpeg's place.
#[cfg(unix)]
fn stand_in(folder: &Path, script: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let program = folder.join("program");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// What reading gives with these scripts as ffprobe and ffmpeg.
#[cfg(unix)]
fn read_with(probe: &str, script: &str) -> Result<Video, String> {
    let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let program = Ffmpeg {
        ffprobe: stand_in(first.path(), probe),
        ffmpeg: stand_in(second.path(), script),
        patience: Duration::from_millis(500),
    };
    let path = data("h264.mp4");
    let read = || {
        let frames = program.open(&path, 10)?;
        collect(&path, frames, Clip { num_frames: 10, ..Clip::WHOLE }, |_| Ok(None))
    };
    loop {
        match read().map_err(|error| error.to_string().replace(&path.display().to_string(), "a.mp4")) {
            // Another test's process began while a script was being written.
            Err(error) if error.contains("Text file busy") => {}
            read => return read,
        }
    }
}

#[cfg(unix)]
#[test]
fn a_program_that_says_nothing_is_given_up_and_ended() {
    let start = Instant::now();
    let silent = read_with("echo 25/1", "exec sleep 100").unwrap_err();
    assert_eq!(silent, "a.mp4: no readable video: ffmpeg gave nothing for 0.5 s");
    assert!(read_with("exec sleep 100", "true").unwrap_err().ends_with("ffmpeg gave nothing for 0.5 s"));
    // One that talks without end is ended when its frames are there.
    let frame = "printf 'P6\\n1 1\\n255\\nabc'";
    let video = read_with("echo 25/1", &format!("while :; do {frame}; done")).unwrap();
    assert_eq!((video.frames().len(), video.frames()[9].rgb.as_slice()), (10, b"abc".as_slice()));
    assert!(start.elapsed() < Duration::from_secs(50));
}

#[cfg(unix)]
#[test]
fn what_the_program_writes_is_checked() {
    let read = |script: &str| read_with("echo 0/0", script);
    let one = read("printf 'P6\\n1 1\\n255\\nabc'").unwrap();
    assert_eq!((one.frames().len(), one.frames_per_second()), (1, None));
    assert_eq!(read("true").unwrap_err(), "a.mp4: no readable video: it has no frames");
    for (script, expected) in [
        ("printf 'P6\\n1 2\\n255\\nabc'", "ffmpeg ended within a frame: "),
        ("printf 'P6\\n1 2\\n'", "ffmpeg ended within a frame: "),
        (
            "printf 'P6\\n0 2\\n255\\n'",
            "ffmpeg ended within a frame: found \"P6\\n0 2\\n255\\n\", expected a pnm header",
        ),
        ("yes", "ffmpeg ended within a frame: found \"y\\ny\\ny\\n\", expected a pnm header"),
        ("echo broken >&2; echo more >&2; exit 3", "ffmpeg: broken; more"),
        ("yes complaint >&2 & sleep 0.1; kill $!; exit 1", "ffmpeg: complaint; complaint"),
    ] {
        let found = read(script).unwrap_err();
        assert!(found.starts_with(&format!("a.mp4: no readable video: {expected}")), "{script}: {found}");
        assert!(found.len() < 5000);
    }
    let large = read("printf 'P6\\n16384 16384\\n255\\n'; exec sleep 100").unwrap_err();
    assert!(large.starts_with("a.mp4: found a picture of 16384x16384 px, expected at most"), "{large}");
    assert_eq!(
        read("printf 'P6\\n1 1\\n255\\nabcP6\\n2 1\\n255\\nabcdef'").unwrap_err(),
        "a.mp4: frame 2 is 2x1 px, expected 1x1 px as the first"
    );
    assert_eq!(read_with("true", "true").unwrap_err().rsplit(": ").next(), Some("it has no video track"));
}
