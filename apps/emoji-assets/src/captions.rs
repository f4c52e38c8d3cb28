//! Labels of emoji in two languages, as the bundled captions file has them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::read::GzDecoder;
use serde::Deserialize;

/// What is known of one emoji, whatever its style.
pub(crate) struct Label {
    /// The English name.
    pub(crate) en: String,
    /// The Chinese name.
    pub(crate) zh: String,
    /// Unicode's group.
    pub(crate) group: String,
}

/// A row of the captions file. It has one per emoji and style, with equal labels.
#[derive(Deserialize)]
struct Row {
    hex: String,
    en: String,
    zh: String,
    group: Option<String>,
    skin: bool,
}

/// Reads all labels by code points, in their order, without skin-tone variants, flags and bare components.
pub(crate) fn read(path: &Path) -> Result<BTreeMap<String, Label>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut labels = BTreeMap::new();
    for (line, number) in BufReader::new(GzDecoder::new(file)).lines().zip(1..) {
        let at = || format!("{}, line {number}", path.display());
        let row: Row = serde_json::from_str(&line.with_context(at)?).with_context(at)?;
        let Some(group) = row.group.filter(|group| group != "flags" && !row.skin) else { continue };
        let label = Label { en: clean_english(&row.en), zh: clean_chinese(&row.zh), group };
        labels.entry(code_points(&row.hex)).or_insert(label);
    }
    Ok(labels)
}

/// Code points in one spelling: upper case, and without FE0F, which asks for a coloured glyph and which sources add or
/// leave out as they like.
pub(crate) fn code_points(name: &str) -> String {
    let upper = name.to_uppercase();
    upper.split('-').filter(|point| *point != "FE0F").collect::<Vec<_>>().join("-")
}

/// Straight quotes, no explanation in brackets: "O button (blood type)" is "O button", "Japanese “here” button" loses its
/// quotes.
fn clean_english(label: &str) -> String {
    let label = label.split(" (").next().unwrap_or(label);
    trim(&label.replace('’', "'").replace(['“', '”'], ""))
}

/// No spaces and quotes, which Chinese writing does not need here, and Chinese colons.
fn clean_chinese(label: &str) -> String {
    trim(&label.replace(": ", "：").replace(['“', '”', ' '], ""))
}

fn trim(label: &str) -> String {
    label.trim().trim_end_matches(['.', ',', ';', ':', '。', '，', '；', '：']).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_points_of_different_spellings_agree() {
        assert_eq!(code_points("2764-fe0f-200d-1f525"), code_points("2764-200D-1F525"));
        assert_eq!(code_points("1f600"), "1F600");
    }

    #[test]
    fn labels_lose_quotes_brackets_and_trailing_punctuation() {
        assert_eq!(clean_english("O button (blood type)"), "O button");
        assert_eq!(clean_english("Japanese “here” button"), "Japanese here button");
        assert_eq!(clean_english("woman’s hat."), "woman's hat");
        assert_eq!(clean_chinese("男人: 红发"), "男人：红发");
        assert_eq!(clean_chinese("O 型血。"), "O型血");
    }
}
