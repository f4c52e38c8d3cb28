//! Which files of which repository are wanted: `owner/name:pattern`.

use std::path::{Component, Path};

use glob::{MatchOptions, Pattern};

use crate::HubError;

/// `*` and `?` stay inside one folder, as in the file system, `**` crosses folders.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Files of one repository.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// `owner/name`.
    pub model_id: String,
    /// As it was written; empty for all files.
    pub pattern: String,
    /// Whether it is an error when nothing matches.
    pub need: Need,
    matcher: Pattern,
}

/// What it means when no file matches a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// An error.
    Required,
    /// Nothing: the files are fetched where a repository has them.
    IfThere,
}

impl Origin {
    /// Reads `owner/name:pattern` as DiffSynth-Studio's `model_id_with_origin_paths` writes it; the files are
    /// required. A pattern that ends with `/` means everything in that folder; without a pattern, everything.
    ///
    /// # Errors
    /// If the text has no owner or name, or the pattern is malformed.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let (model_id, pattern) = text.trim().split_once(':').unwrap_or((text.trim(), ""));
        Self::new(model_id, pattern, Need::Required)
    }

    /// Files of `model_id` that match `pattern`; see [`Origin::parse`].
    ///
    /// # Errors
    /// As [`Origin::parse`].
    pub fn new(model_id: &str, pattern: &str, need: Need) -> Result<Self, HubError> {
        let error = |reason: String| HubError::Origin { found: format!("{model_id}:{pattern}"), reason };
        let parts: Vec<&str> = model_id.split('/').collect();
        if parts.len() != 2 || !parts.iter().all(|part| is_name(part)) {
            return Err(error(format!("found the repository {model_id:?}, expected owner/name")));
        }
        let everything = pattern.is_empty() || pattern.ends_with('/');
        let glob = if everything { format!("{pattern}**") } else { pattern.to_owned() };
        let matcher = Pattern::new(&glob).map_err(|reason| error(reason.to_string()))?;
        Ok(Self { model_id: model_id.into(), pattern: pattern.into(), need, matcher })
    }

    /// Whether a file, given by its path in the repository, is one of these.
    pub fn matches(&self, path: &str) -> bool {
        self.matcher.matches_with(path, MATCHING)
    }
}

/// Letters, digits and `.`, `_`, `-`: what both services allow, and nothing that an address or a folder reads
/// in another way.
fn is_name(part: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !part.is_empty() && part != "." && part != ".." && part.bytes().all(allowed)
}

/// Whether a path of a listing stays inside its repository's folder.
pub(crate) fn is_inside(path: &str) -> bool {
    let plain = |part: Component| matches!(part, Component::Normal(_));
    !path.is_empty() && !path.contains('\\') && Path::new(path).components().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        Origin::parse(&format!("a/b:{pattern}")).unwrap().matches(path)
    }

    #[test]
    fn a_star_stays_in_its_folder_and_a_question_mark_is_one_character() {
        assert!(matches("transformer/model*.safetensors", "transformer/model-00001-of-00002.safetensors"));
        assert!(!matches("transformer/model*.safetensors", "transformer/old/model.safetensors"));
        assert!(!matches("*.safetensors", "vae/model.safetensors"));
        assert!(matches("v?e/config.json", "vae/config.json"));
        assert!(!matches("v?e/config.json", "vaae/config.json"));
        assert!(matches("model-0000[1-2].bin", "model-00002.bin"));
        assert!(!matches("model-0000[1-2].bin", "model-00003.bin"));
    }

    #[test]
    fn a_folder_means_everything_in_it_and_nothing_means_everything() {
        assert!(matches("tokenizer/", "tokenizer/merges.txt"));
        assert!(matches("tokenizer/", "tokenizer/deeper/merges.txt"));
        assert!(!matches("tokenizer/", "tokenizer_2/merges.txt"));
        assert!(matches("", "README.md") && matches("", "vae/config.json"));
        assert!(Origin::parse("a/b").unwrap().matches("vae/config.json"));
    }

    #[test]
    fn texts_without_owner_or_name_are_refused() {
        for text in ["", ":x", "a", "a:x", "a/b/c:x", "a/..:x", "/b:x", "a/b c:x", "a/b:[x"] {
            let error = Origin::parse(text).expect_err(text).to_string();
            assert!(error.contains("hint: write OWNER/NAME:PATTERN"), "{text}: {error}");
        }
    }

    #[test]
    fn paths_that_leave_the_folder_are_told_apart() {
        assert!(is_inside("vae/config.json"));
        for path in ["", "/etc/passwd", "../x", "vae/../../x", "./x", "C:\\x"] {
            assert!(!is_inside(path), "{path}");
        }
    }
}
