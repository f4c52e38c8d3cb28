use std::fs;
use std::path::PathBuf;

use fewstep_testkit::{Golden, assert_close, golden};
use serde_json::Value;

use super::*;
use crate::metadata::Metadata;
use crate::refuse_changes;
use crate::video::Clip;

fn data(name: &str) -> PathBuf {
    golden("data").join(name)
}

fn golden_rows() -> Vec<Value> {
    serde_json::from_slice(&fs::read(data("data.json")).unwrap()).unwrap()
}

fn number(row: &Value, key: &str) -> Option<usize> {
    row[key].as_u64().map(|number| number as usize)
}

fn pair(row: &Value) -> [Picture; 2] {
    ["input", "output"].map(|key| Picture::load(&data(row[key].as_str().unwrap())).unwrap())
}

fn striped(width: usize, height: usize) -> Picture {
    let rgb = (0..3 * width * height).map(|at| (at * 37 % 256) as u8).collect();
    Picture { width, height, rgb }
}

/// A data set of one picture of 30x20 px.
fn one_picture() -> (tempfile::TempDir, Metadata) {
    let folder = tempfile::tempdir().unwrap();
    striped(30, 20).save_png(&folder.path().join("a.png")).unwrap();
    let path = folder.path().join("metadata.csv");
    fs::write(&path, "image,prompt\na.png,a cat\n").unwrap();
    (folder, Metadata::read(&path).unwrap())
}

#[test]
fn crop_and_resize_equals_the_peer_bit_for_bit() {
    let rows: Vec<_> = golden_rows().into_iter().filter(|row| row["mode"].is_null()).collect();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let resize = match number(&row, "max_pixels") {
            Some(max_pixels) => Resize::MaxPixels { max_pixels, division: 16 },
            None => Resize::Exact {
                height: number(&row, "height").unwrap(),
                width: number(&row, "width").unwrap(),
            },
        };
        let [input, output] = pair(&row);
        let target = resize.target_size(input.size()).unwrap();
        assert_eq!(target, output.size(), "{row}");
        assert!(input.crop_and_resize(target) == output, "{row}: pixels differ");
    }
}

#[test]
fn every_mode_is_converted_as_by_the_peer() {
    let rows: Vec<_> = golden_rows().into_iter().filter(|row| !row["mode"].is_null()).collect();
    assert_eq!(rows.len(), 7);
    for row in rows {
        let [input, output] = pair(&row);
        assert!(input == output, "{row}: pixels differ");
    }
}

#[test]
fn jpegs_are_decoded_as_by_the_peer_up_to_a_few_levels() {
    for name in ["444", "420"] {
        let [found, expected] =
            ["jpg", "png"].map(|end| Picture::load(&data(&format!("jpeg_{name}.{end}"))).unwrap());
        let differences: Vec<u8> = found.rgb.iter().zip(&expected.rgb).map(|(a, b)| a.abs_diff(*b)).collect();
        let count = differences.iter().filter(|difference| **difference > 0).count();
        eprintln!("{name}: max {:?}, {count} of {}", differences.iter().max(), differences.len());
    }
}

#[test]
fn pixels_equal_the_peer_bit_for_bit() {
    let goldens = Golden::open(data("data.safetensors"));
    let pixels = Picture::load(&data("pixels.png")).unwrap().to_pixels();
    assert_close(&pixels, &goldens.f32s("pixels_f32"), 0.0);
}

#[test]
fn truncating_equals_the_peer_bit_for_bit() {
    let goldens = Golden::open(data("data.safetensors"));
    let picture = Picture::from_pixels(&goldens.f32s("to_image_in"), 16, 16, Rounding::Truncate);
    let expected: Vec<u8> = goldens.i64s("to_image_u8").into_iter().map(|level| level as u8).collect();
    assert_eq!(picture.rgb, expected);
}

#[test]
fn nearest_rounding_takes_every_level_back_to_itself() {
    let picture = striped(16, 16);
    assert_eq!(Picture::from_pixels(&picture.to_pixels(), 16, 16, Rounding::Nearest), picture);
    let beyond = Picture::from_pixels(&[-3.0, 0.1, 3.0], 1, 1, Rounding::Nearest);
    assert_eq!(beyond.rgb, [0, 140, 255]);
}

#[test]
fn a_saved_picture_is_loaded_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/picture.png");
    let picture = striped(17, 9);
    picture.save_png(&path).unwrap();
    assert_eq!(Picture::load(&path).unwrap(), picture);
    assert_eq!(Picture::size_of(&path).unwrap(), Size { height: 9, width: 17 });
}

#[test]
fn a_picture_of_its_target_size_is_left_alone() {
    let picture = striped(13, 7);
    assert_eq!(picture.crop_and_resize(picture.size()), picture);
}

#[test]
fn a_picture_smaller_than_the_division_factor_is_refused() {
    let resize = Resize::MaxPixels { max_pixels: 4096, division: 16 };
    let error = resize.target_size(Size { height: 40, width: 15 }).unwrap_err().to_string();
    assert_eq!(
        error,
        "a picture of 15x40 px rounds down to nothing; expected at least 16 px on each side\n\
         hint: give the height and the width to scale it to"
    );
}

#[test]
fn a_picture_that_claims_a_huge_size_is_refused_before_decoding() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("huge.png");
    let mut bytes = striped(4, 4).to_png();
    bytes[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    fs::write(&path, with_header_checksum(bytes)).unwrap();
    let error = Picture::load(&path).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "{}: found a picture of 65536x65536 px, expected at most 16384 px on each side and 178956970 px in all\n\
             hint: scale it down",
            path.display()
        )
    );
}

/// With the checksum of its header chunk, so that only its content is wrong.
fn with_header_checksum(mut png: Vec<u8>) -> Vec<u8> {
    let crc = crc(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    png
}

/// Png's CRC-32.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 },
        )
    })
}

#[test]
fn a_palette_that_ends_within_a_colour_is_refused() {
    let png = fs::read(data("mode_P.png")).unwrap();
    let at = png.windows(4).position(|kind| kind == b"PLTE").unwrap();
    let length = u32::from_be_bytes(png[at - 4..at].try_into().unwrap());
    let end = at + 4 + length as usize;
    let chunk = &png[at..end - 1];
    let (shorter, checksum) = ((length - 1).to_be_bytes(), crc(chunk).to_be_bytes());
    let broken = [&png[..at - 4], &shorter, chunk, &checksum, &png[end + 4..]].concat();
    let error = Picture::decode(&broken, Path::new("a.png")).unwrap_err().to_string();
    assert!(error.starts_with("a.png: no readable picture: its palette ends within a colour"), "{error}");
}

#[test]
fn a_file_that_is_no_picture_or_a_truncated_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    fs::write(&path, "no picture").unwrap();
    let text = Picture::load(&path).unwrap_err().to_string();
    assert!(text.starts_with(&format!("{}: no readable picture: ", path.display())), "{text}");
    let png = striped(32, 32).to_png();
    fs::write(&path, &png[..png.len() / 2]).unwrap();
    let text = Picture::load(&path).unwrap_err().to_string();
    assert!(text.starts_with(&format!("{}: no readable picture: ", path.display())), "{text}");
}

#[test]
fn distillation_refuses_a_picture_that_would_be_resized() {
    let (folder, metadata) = one_picture();
    let error = refuse_changes(
        &metadata.rows[0],
        folder.path(),
        Resize::Exact { height: 64, width: 48 },
        Clip::WHOLE,
    )
    .unwrap_err();
    let at = folder.path().display();
    assert_eq!(
        error.to_string(),
        format!(
            "{at}/metadata.csv, row 1: {at}/a.png is 30x20 px, but this run trains at 48x64 px and would resize it; \
             distillation needs the teacher's own pixels\n\
             hint: generate the data at 48x64, or pass --height 20 --width 30"
        )
    );
    refuse_changes(&metadata.rows[0], folder.path(), Resize::Exact { height: 20, width: 30 }, Clip::WHOLE)
        .unwrap();
}

#[test]
fn distillation_refuses_a_picture_that_would_be_rounded_down() {
    let (folder, metadata) = one_picture();
    let dynamic = |division| Resize::MaxPixels { max_pixels: 1 << 20, division };
    refuse_changes(&metadata.rows[0], folder.path(), dynamic(16), Clip::WHOLE).unwrap_err();
    refuse_changes(&metadata.rows[0], folder.path(), dynamic(10), Clip::WHOLE).unwrap();
    let error =
        refuse_changes(&metadata.rows[0], folder.path(), dynamic(32), Clip::WHOLE).unwrap_err().to_string();
    assert!(error.contains("metadata.csv, row 1: a picture of 30x20 px rounds down to nothing"), "{error}");
}

/// PIL's reading is in a file beside; the decoders of jpeg may differ by little (goldens/make/odd_pictures.py).
#[test]
fn pictures_that_readers_disagree_on_are_read_as_by_pil() {
    for (name, tolerance) in [
        ("cmyk.jpg", 3),
        ("turned.jpg", 1),
        ("grey.jpg", 1),
        ("progressive.jpg", 1),
        ("frames.webp", 0),
        ("frames.png", 0),
    ] {
        let path = data("odd").join(name);
        let (found, expected) = (
            Picture::load(&path).unwrap(),
            Picture::load(&data("odd").join(format!("{name}.rgb.png"))).unwrap(),
        );
        assert_eq!(found.size(), expected.size(), "{name}");
        assert_eq!(Picture::size_of(&path).unwrap(), expected.size(), "{name}");
        let largest = found.rgb.iter().zip(&expected.rgb).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(largest <= Some(tolerance), "{name}: differs by {largest:?}, expected at most {tolerance}");
    }
}

#[test]
fn a_picture_cut_off_anywhere_is_an_error() {
    for name in ["odd/turned.jpg", "odd/progressive.jpg", "odd/grey.jpg", "odd/frames.webp", "mode_P.png"] {
        let bytes = fs::read(data(name)).unwrap();
        Picture::decode(&bytes, Path::new(name)).unwrap();
        // Readers need not look at a few bytes at the end: a checksum, or half of a marker.
        for length in (0..bytes.len() - 16).step_by(7) {
            let error = Picture::decode(&bytes[..length], Path::new(name)).map(|_| length).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{name}: no readable picture: ")), "{error}");
        }
    }
}

#[test]
fn a_strip_that_would_cover_its_target_by_growing_out_of_bounds_is_refused() {
    let target = Resize::Exact { height: 1024, width: 1024 };
    let error = target.target_size(Size { height: 1, width: 16_384 }).unwrap_err().to_string();
    assert_eq!(
        error,
        "a picture of 16384x1 px scaled until it covers 1024x1024 px has more than 178956970 px\n\
         hint: crop it to a shape that is less narrow"
    );
    assert_eq!(
        target.target_size(Size { height: 64, width: 4096 }).unwrap(),
        Size { height: 1024, width: 1024 }
    );
}
