//! Joins pictures and labels by code points and writes the data set.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fewstep_data::atomic;
use fewstep_data::emoji::{CONCEPTS_FILE, Concept, EmojiSet, Style};
use fewstep_data::image::Picture;
use image::ExtendedColorType;
use image::codecs::webp::WebPEncoder;
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

use crate::captions::{self, code_points};
use crate::iconify::IconSet;

const CAPTIONS: &str = "captions.jsonl.gz";
const FLUENT_3D: &str = "fluent3d_64_webp_q90.zip";
const FLUENT_FLAT: &str = "iconify-json-fluent-emoji-flat-1.2.6.tgz";
const NOTO: &str = "iconify-json-noto-1.2.9.tgz";

/// The share of concepts with one style held out of training.
const HELD_OUT_SHARE: f64 = 0.06;

/// Writes `concepts.jsonl` and a zip of webp pictures for every style.
pub(crate) fn build(source: &Path, output: &Path) -> Result<()> {
    let solid = read_zip(&source.join(FLUENT_3D))?;
    let flat = IconSet::read(&source.join(FLUENT_FLAT))?;
    let noto = IconSet::read(&source.join(NOTO))?;
    let mut labels = captions::read(&source.join(CAPTIONS))?;
    labels.retain(|points, _| solid.contains_key(points) && flat.draws(points) && noto.draws(points));
    let concepts: Vec<Concept> = labels
        .into_iter()
        .map(|(hex, label)| Concept {
            held_out: held_out(&hex),
            hex,
            en: label.en,
            zh: label.zh,
            group: label.group,
        })
        .collect();
    write_concepts(output, &concepts)?;
    write_style(output, Style::Fluent3d, &concepts, |hex| Ok(solid[hex].clone()))?;
    write_style(output, Style::FluentFlat, &concepts, |hex| lossless(&flat.picture(hex)?))?;
    write_style(output, Style::Noto, &concepts, |hex| lossless(&noto.picture(hex)?))?;
    let set = EmojiSet::open(output)?;
    let (training, held_out) = (set.training().count(), set.held_out().count());
    println!("{} concepts: {training} pictures to train on, {held_out} held out", set.concepts().len());
    Ok(())
}

/// The style held out for a concept, if any: decided by a hash of its code points, so that it never changes when
/// other concepts come or go.
fn held_out(hex: &str) -> Option<Style> {
    let hash = Sha256::digest(hex);
    let draw = f64::from(u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])) / 2_f64.powi(32);
    (draw < HELD_OUT_SHARE).then(|| Style::ALL[usize::from(hash[4]) % Style::ALL.len()])
}

fn write_concepts(output: &Path, concepts: &[Concept]) -> Result<()> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    let mut lines = String::new();
    for concept in concepts {
        for label in [&concept.en, &concept.zh] {
            let other = seen.insert(label, &concept.hex);
            ensure!(
                other.is_none(),
                "{} and {} share the label `{label}`",
                concept.hex,
                other.unwrap_or_default()
            );
        }
        lines += &serde_json::to_string(concept)?;
        lines.push('\n');
    }
    let path = output.join(CONCEPTS_FILE);
    atomic::write(&path, lines.as_bytes()).with_context(|| path.display().to_string())
}

/// Webp files are compressed already, so they are only stored; a fixed date makes equal pictures an equal file.
fn write_style(
    output: &Path,
    style: Style,
    concepts: &[Concept],
    webp: impl Fn(&str) -> Result<Vec<u8>>,
) -> Result<()> {
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let options = stored.last_modified_time(DateTime::default());
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for concept in concepts {
        archive.start_file(format!("{}.webp", concept.hex), options)?;
        archive.write_all(&webp(&concept.hex)?)?;
    }
    let bytes = archive.finish()?.into_inner();
    let path = output.join(style.file_name());
    println!("{}: {} bytes", path.display(), bytes.len());
    atomic::write(&path, &bytes).with_context(|| path.display().to_string())
}

fn lossless(picture: &Picture) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (width, height) = (picture.width as u32, picture.height as u32);
    WebPEncoder::new_lossless(&mut bytes).encode(&picture.rgb, width, height, ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

/// All files of a zip by the code points in their names, unchanged.
fn read_zip(path: &Path) -> Result<HashMap<String, Vec<u8>>> {
    let mut archive = ZipArchive::new(File::open(path).with_context(|| path.display().to_string())?)?;
    let mut files = HashMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let points = code_points(entry.name().trim_end_matches(".webp"));
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(points, bytes);
    }
    Ok(files)
}
