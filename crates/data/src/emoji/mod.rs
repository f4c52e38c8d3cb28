//! The bundled data set: emoji in three drawing styles with captions in two languages.
//!
//! A folder holds `concepts.jsonl`, one [`Concept`] a line, and for each [`Style`] a zip file with one picture per concept.
//! `apps/emoji-assets` builds it. Some concepts have one style that is held out of training: the model sees the concept
//! in the other styles only, so that style and concept have to be put together anew.

mod training_folder;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use serde::{Deserialize, Serialize};
use zip::ZipArchive;

use crate::image::Picture;
use crate::{DataError, bounded};

/// The side of every picture of the set.
pub const SIDE_PX: usize = 64;

/// The largest file of a picture: its pixels without compression, and room for headers.
const MAX_PICTURE_BYTES: u64 = (4 * SIDE_PX * SIDE_PX + 4096) as u64;

/// The file of labels inside the set's folder.
pub const CONCEPTS_FILE: &str = "concepts.jsonl";

/// A drawing style.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// Microsoft's Fluent emoji as rendered solids.
    #[serde(rename = "fluent-3d")]
    Fluent3d,
    /// Microsoft's Fluent emoji as flat vector drawings.
    FluentFlat,
    /// Google's Noto emoji, vector drawings with gradients.
    Noto,
}

/// A caption's language.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Language {
    /// English.
    English,
    /// Chinese, simplified.
    Chinese,
}

/// What is drawn, in every style.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Concept {
    /// Code points in upper-case hexadecimal joined by `-`, without the variation selector FE0F.
    pub hex: String,
    /// The English label.
    pub en: String,
    /// The Chinese label.
    pub zh: String,
    /// Unicode's group, such as `food & drink`.
    pub group: String,
    /// The style that is never trained on, for a few concepts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<Style>,
}

/// The whole set in memory.
pub struct EmojiSet {
    concepts: Vec<Concept>,
    /// In the concepts' order, within each in the order of [`Style::ALL`].
    pictures: Vec<Picture>,
}

/// One picture of the set and what is known of it.
#[derive(Clone, Debug)]
pub struct Item<'a> {
    /// The picture, [`SIDE_PX`] squared.
    pub picture: &'a Picture,
    /// The English caption.
    pub caption_en: String,
    /// The Chinese caption.
    pub caption_zh: String,
    /// The concept's place in [`EmojiSet::concepts`].
    pub concept: usize,
    /// The style it is drawn in.
    pub style: Style,
    /// Whether it is kept from training.
    pub held_out: bool,
}

impl Style {
    /// Every style, in the set's order.
    pub const ALL: [Self; 3] = [Self::Fluent3d, Self::FluentFlat, Self::Noto];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fluent3d => "fluent-3d",
            Self::FluentFlat => "fluent-flat",
            Self::Noto => "noto",
        }
    }

    /// The file of this style's pictures inside the set's folder: a zip of webp files named by [`Concept::hex`].
    pub fn file_name(self) -> String {
        format!("{}.zip", self.name())
    }

    /// A caption: a phrase that asks for this style, and a label.
    pub fn caption(self, language: Language, label: &str) -> String {
        let phrase = match (self, language) {
            (Self::Fluent3d, Language::English) => "3d emoji of ",
            (Self::FluentFlat, Language::English) => "flat emoji of ",
            (Self::Noto, Language::English) => "noto emoji of ",
            (Self::Fluent3d, Language::Chinese) => "立体表情：",
            (Self::FluentFlat, Language::Chinese) => "扁平表情：",
            (Self::Noto, Language::Chinese) => "诺托表情：",
        };
        format!("{phrase}{label}")
    }
}

impl Concept {
    /// The label in a language.
    pub fn label(&self, language: Language) -> &str {
        match language {
            Language::English => &self.en,
            Language::Chinese => &self.zh,
        }
    }
}

impl Item<'_> {
    /// The caption in a language.
    pub fn caption(&self, language: Language) -> &str {
        match language {
            Language::English => &self.caption_en,
            Language::Chinese => &self.caption_zh,
        }
    }
}

impl EmojiSet {
    /// Reads and decodes the set in a folder.
    ///
    /// # Errors
    /// When a file is missing or damaged, a concept lacks a picture, or a picture is not [`SIDE_PX`] squared.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let concepts = read_concepts(&folder.join(CONCEPTS_FILE))?;
        let mut by_style = Vec::new();
        for style in Style::ALL {
            by_style.push(read_pictures(&folder.join(style.file_name()), &concepts)?.into_iter());
        }
        let pictures =
            concepts.iter().flat_map(|_| by_style.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>());
        Ok(Self { pictures: pictures.collect(), concepts })
    }

    /// What is drawn, in the order of code points.
    pub fn concepts(&self) -> &[Concept] {
        &self.concepts
    }

    /// Every picture, concept by concept.
    pub fn items(&self) -> impl Iterator<Item = Item<'_>> {
        let styles = self
            .concepts
            .iter()
            .enumerate()
            .flat_map(|(at, concept)| Style::ALL.map(|style| (at, concept, style)));
        styles.zip(&self.pictures).map(|((at, concept, style), picture)| Item {
            picture,
            caption_en: style.caption(Language::English, &concept.en),
            caption_zh: style.caption(Language::Chinese, &concept.zh),
            concept: at,
            style,
            held_out: concept.held_out == Some(style),
        })
    }

    /// The pictures to train on.
    pub fn training(&self) -> impl Iterator<Item = Item<'_>> {
        self.items().filter(|item| !item.held_out)
    }

    /// The pictures kept for evaluation.
    pub fn held_out(&self) -> impl Iterator<Item = Item<'_>> {
        self.items().filter(|item| item.held_out)
    }
}

fn read_concepts(path: &Path) -> Result<Vec<Concept>, DataError> {
    let text = bounded::read_text(path).map_err(DataError::io(path))?;
    text.lines()
        .zip(1..)
        .map(|(line, row)| concept(line).map_err(|reason| malformed(path, Some(row), reason)))
        .collect()
}

fn concept(line: &str) -> Result<Concept, String> {
    let concept: Concept = serde_json::from_str(line).map_err(|fault| fault.to_string())?;
    // It becomes part of file names.
    let plain = |byte: u8| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte) || byte == b'-';
    match !concept.hex.is_empty() && concept.hex.bytes().all(plain) {
        true => Ok(concept),
        false => Err(format!("hex is {:?}, expected code points such as 1F34E-200D", concept.hex)),
    }
}

/// One picture for each concept, in the concepts' order. What else an archive holds is not read.
fn read_pictures(path: &Path, concepts: &[Concept]) -> Result<Vec<Picture>, DataError> {
    let file = File::open(path).map_err(DataError::io(path))?;
    let archive = ZipArchive::new(BufReader::new(file));
    let mut archive = archive.map_err(|fault| malformed(path, None, fault.to_string()))?;
    concepts.iter().zip(1..).map(|(concept, row)| read_picture(path, &mut archive, (concept, row))).collect()
}

fn read_picture(
    path: &Path,
    archive: &mut ZipArchive<impl Read + Seek>,
    (concept, row): (&Concept, usize),
) -> Result<Picture, DataError> {
    let name = format!("{}.webp", concept.hex);
    let fault = |reason: String| malformed(path, Some(row), format!("picture {name}: {reason}"));
    let entry = archive.by_name(&name).map_err(|error| fault(error.to_string()))?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells an entry that unpacks to more than it says.
    entry.take(MAX_PICTURE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| fault(error.to_string()))?;
    if bytes.len() as u64 > MAX_PICTURE_BYTES {
        return Err(fault(format!("unpacks to more than {MAX_PICTURE_BYTES} bytes")));
    }
    let picture = Picture::decode(&bytes, &path.join(&name))?;
    match (picture.width, picture.height) {
        (SIDE_PX, SIDE_PX) => Ok(picture),
        _ => Err(fault(format!("found {} px, expected {SIDE_PX}x{SIDE_PX}", picture.size()))),
    }
}

fn malformed(path: &Path, row: Option<usize>, reason: String) -> DataError {
    DataError::Malformed { path: path.into(), row, reason }
}

#[cfg(test)]
mod tests;
