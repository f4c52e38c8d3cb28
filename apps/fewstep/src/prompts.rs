//! Prompts from files: plain text with one per line, or metadata with more than the prompt in a row.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use fewstep_data::bounded;
use fewstep_data::metadata::{Metadata, Row};

/// A prompt and what its file says about drawing it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptRow {
    /// What to draw; may be empty.
    pub prompt: String,
    /// Column `negative_prompt`.
    pub negative_prompt: Option<String>,
    /// Column `seed`.
    pub seed: Option<u64>,
}

/// Reads a text file, one prompt per line, or a metadata file with a column `prompt`.
///
/// Of a metadata file's other columns only `seed` and `negative_prompt` are read: `num_inference_steps` and
/// `cfg_scale` are the student's in the files that `generate` writes, and the size belongs to the whole data set.
///
/// # Errors
/// If the file cannot be read, a seed is no integer, or there is no prompt.
pub fn read_prompts(path: &Path) -> Result<Vec<PromptRow>> {
    let prompts = if path.extension().is_some_and(|extension| extension == "txt") {
        let text = bounded::read_text(path).with_context(|| path.display().to_string())?;
        text.lines().map(|line| PromptRow { prompt: line.to_owned(), ..PromptRow::default() }).collect()
    } else {
        Metadata::read(path)?.rows.iter().map(prompt_row).collect::<Result<Vec<PromptRow>>>()?
    };
    ensure!(!prompts.is_empty(), "{}: no prompts", path.display());
    Ok(prompts)
}

fn prompt_row(row: &Row) -> Result<PromptRow> {
    Ok(PromptRow {
        prompt: row.text("prompt")?.to_owned(),
        negative_prompt: row.get("negative_prompt").map(str::to_owned),
        seed: row.get("seed").map(|_| row.integer("seed")).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_brings_its_seed_and_negative_prompt_and_a_line_only_its_prompt() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let read = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("written");
            read_prompts(&path)
        };
        let row = |prompt: &str, negative: Option<&str>, seed| PromptRow {
            prompt: prompt.into(),
            negative_prompt: negative.map(str::to_owned),
            seed,
        };
        let csv =
            "\u{feff}seed,prompt,negative_prompt,cfg_scale\r\n7,\"a, b\",,4\r\n8,\"two\nlines\",dark,4\r\n";
        let expected = [row("a, b", Some(""), Some(7)), row("two\nlines", Some("dark"), Some(8))];
        assert_eq!(read("rows.csv", csv).expect("reads"), expected);
        let lines = read("lines.txt", "one\n\nthree\n").expect("reads");
        assert_eq!(lines, [row("one", None, None), row("", None, None), row("three", None, None)]);
        let said = read("bad.csv", "prompt,seed\na,-1\n").expect_err("a negative seed").to_string();
        assert!(said.contains("row 1") && said.contains("seed"), "{said}");
    }
}
