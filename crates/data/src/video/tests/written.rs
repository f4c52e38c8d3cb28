//! What is written is read back.

use super::*;

fn peak_signal_to_noise_db(found: &Picture, expected: &Picture) -> f64 {
    let square = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b)).powi(2);
    let sum: f64 = found.rgb.iter().zip(&expected.rgb).map(square).sum();
    10.0 * (255.0_f64.powi(2) * found.rgb.len() as f64 / sum.max(1e-9)).log10()
}

fn saved(video: &Video, name: &str) -> (tempfile::TempDir, Video) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new").join(name);
    video.save(&path).unwrap();
    let names: Vec<_> =
        fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [name], "nothing else is left");
    let read = Video::load(&path, Clip::WHOLE).unwrap();
    (folder, read)
}

#[test]
fn a_webp_keeps_every_pixel_and_the_rate() {
    for (frames, width, height) in [(1, 1, 1), (5, 17, 9), (33, 64, 48)] {
        let video = waves(frames, width, height);
        let (_folder, read) = saved(&video, "a.webp");
        assert_eq!(read.frames(), video.frames(), "{frames} frames of {width}x{height} px");
        // A millisecond is the unit of a frame's time.
        assert!((read.frames_per_second().unwrap() - 16.0).abs() <= 16.0 * 16.0 / 2000.0);
    }
    // Noise, which does not pack.
    let noise = (0..3 * 32 * 32_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let video = Video::new(vec![Picture { width: 32, height: 32, rgb: noise }; 2], None);
    assert_eq!(saved(&video, "a.webp").1.frames(), video.frames());
}

#[test]
fn a_folder_keeps_every_pixel_and_replaces_an_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("frames");
    for count in [12, 3] {
        let video = waves(count, 17, 9);
        video.save(&path).unwrap();
        assert_eq!(Video::load(&path, Clip::WHOLE).unwrap().frames(), video.frames());
    }
}

#[test]
fn a_gif_keeps_few_colours_and_comes_near_to_many() {
    let few = waves(5, 16, 5);
    let (_folder, read) = saved(&few, "a.gif");
    assert_eq!(read.frames(), few.frames(), "80 pixels have no more than 256 colours");
    assert!((read.frames_per_second().unwrap() - 16.0).abs() < 0.5, "{read:?}");
    let many = waves(4, 96, 64);
    let (_folder, read) = saved(&many, "a.gif");
    let found = peak_signal_to_noise_db(&read.stacked(), &many.stacked());
    // 24.6 with colours sought from all pixels, 21.2 from a tenth.
    assert!(found > 24.0, "{found} dB");
}

#[test]
fn frame_times_of_whole_units_do_not_drift() {
    let video = Video::new(waves(48, 2, 2).frames().to_vec(), Some(24.0));
    for name in ["a.gif", "a.webp"] {
        let (_folder, read) = saved(&video, name);
        assert_eq!(read.frames_per_second(), Some(24.0), "48 frames take 2 s in {name}");
    }
}

#[test]
fn ffmpeg_writes_mkv_without_loss_and_mp4_with_little() {
    if !has_ffmpeg("writing mkv and mp4") {
        return;
    }
    for (width, height) in [(64, 48), (33, 21)] {
        let video = waves(9, width, height);
        let (_folder, read) = saved(&video, "a.mkv");
        assert_eq!(read, video);
        let (_folder, read) = saved(&video, "a.mp4");
        let found = peak_signal_to_noise_db(&read.stacked(), &video.stacked());
        assert!(found > 30.0, "{found} dB at {width}x{height} px");
        assert_eq!(read.frames_per_second(), Some(16.0));
    }
}

#[test]
fn a_failing_ffmpeg_leaves_the_old_file_and_says_why() {
    if !has_ffmpeg("a failing ffmpeg") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mkv");
    fs::write(&path, "old").unwrap();
    let program = ffmpeg::Ffmpeg::find(&path, "mkv").unwrap();
    let error = program.write(&waves(2, 8, 8), &path, 16.0, &["-c:v", "no_such_encoder", "-f", "matroska"]);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("ffmpeg: ") && error.contains("no_such_encoder"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_container_that_is_not_written_is_named() {
    let error = waves(1, 8, 8).save(Path::new("a.webm")).unwrap_err().to_string();
    assert!(
        error.starts_with("a.webm: no video format to write: found extension `webm`, expected webp"),
        "{error}"
    );
    assert!(!Path::new("a.webm").exists());
}
