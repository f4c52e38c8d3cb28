//! The flags that say which model: a folder, weight files, or files to download.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use fewstep_hub::{Need, Origin};
use fewstep_models::ModelSource;

use crate::download::{fetch, missing};
use crate::progress::{Progress, Terminal};

/// Which model a subcommand works with.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelArgs {
    /// Model folder in the official layout
    #[arg(
        long,
        required_unless_present_any = ["model_paths", "model_id_with_origin_paths"],
        conflicts_with_all = ["model_paths", "model_id_with_origin_paths"]
    )]
    pub model: Option<PathBuf>,
    /// Weight files, a JSON list with one entry per component: a path, or a list of the paths of its shards
    #[arg(long, value_name = "JSON")]
    pub model_paths: Option<String>,
    /// Weight files to download, OWNER/NAME:PATTERN, separated by commas; configs and tokenizer come along. Files that
    /// are there already are used. See `download`
    #[arg(long, value_name = "LIST")]
    pub model_id_with_origin_paths: Option<String>,
    /// Folder of the tokenizer's files [default: tokenizer/ of the model folder]
    #[arg(long, value_name = "DIR")]
    pub tokenizer_path: Option<PathBuf>,
}

impl ModelArgs {
    /// Finds the files, downloading what is missing.
    ///
    /// # Errors
    /// If the flags name no model, files cannot be downloaded, or weights are of no known component.
    pub fn resolve(&self, progress: &dyn Progress) -> Result<ModelSource> {
        let source = match &self.model {
            Some(folder) => ModelSource::from(folder),
            None => ModelSource::from_files(&self.files(progress)?)?,
        };
        Ok(match &self.tokenizer_path {
            Some(folder) => source.with_tokenizer(folder.clone()),
            None => source,
        })
    }

    /// Finds the files without downloading any.
    ///
    /// # Errors
    /// As [`ModelArgs::resolve`]; of files to download only the list is asked for.
    pub fn preview(&self) -> Result<Preview> {
        let missing = match &self.model_id_with_origin_paths {
            Some(list) => missing(&parse_origins(list)?)?,
            None => Vec::new(),
        };
        // Where nothing is missing, nothing is downloaded.
        let source = missing.is_empty().then(|| self.resolve(&Terminal::new(true))).transpose()?;
        Ok(Preview { source, missing })
    }

    /// The weight files of each component, those that were given before those that were downloaded.
    fn files(&self, progress: &dyn Progress) -> Result<Vec<Vec<PathBuf>>> {
        let mut groups = match &self.model_paths {
            Some(json) => parse_model_paths(json)?,
            None => Vec::new(),
        };
        if let Some(list) = &self.model_id_with_origin_paths {
            let origins = parse_origins(list)?;
            let given = origins.iter().filter(|origin| origin.need == Need::Required).count();
            groups.extend(fetch(&origins, None, progress)?.into_iter().take(given).map(weights));
        }
        groups.retain(|group| !group.is_empty());
        if groups.is_empty() {
            bail!("no model\nhint: give --model, --model-paths or --model-id-with-origin-paths");
        }
        Ok(groups)
    }
}

/// What is there of a model.
#[derive(Default)]
pub struct Preview {
    /// The model, where all of it is there.
    pub source: Option<ModelSource>,
    /// Files that are to be downloaded, with the bytes that are missing.
    pub missing: Vec<(PathBuf, u64)>,
}

/// A JSON list of paths and lists of paths.
fn parse_model_paths(json: &str) -> Result<Vec<Vec<PathBuf>>> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Entry {
        File(PathBuf),
        Shards(Vec<PathBuf>),
    }
    let entries: Vec<Entry> = serde_json::from_str(json).with_context(|| {
        format!(r#"--model-paths {json:?}, expected a JSON list as in ["a.safetensors", ["b-1.safetensors", "b-2.safetensors"]]"#)
    })?;
    let group = |entry| match entry {
        Entry::File(path) => vec![path],
        Entry::Shards(paths) => paths,
    };
    Ok(entries.into_iter().map(group).collect())
}

/// The weight files among downloaded ones: a pattern may bring others along.
fn weights(files: Vec<PathBuf>) -> Vec<PathBuf> {
    files.into_iter().filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect()
}

/// The origins of a comma-separated list, then those of the small files that loading them needs.
pub(crate) fn parse_origins(list: &str) -> Result<Vec<Origin>> {
    let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let mut origins: Vec<Origin> = entries.map(Origin::parse).collect::<Result<_, _>>()?;
    let mut companions: Vec<Origin> = Vec::new();
    for origin in &origins {
        for pattern in ModelSource::companions(&origin.pattern) {
            let companion = Origin::new(&origin.model_id, &pattern, Need::IfThere)?;
            if !companions.contains(&companion) {
                companions.push(companion);
            }
        }
    }
    origins.extend(companions);
    Ok(origins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_paths_are_files_and_nested_shards() {
        let groups =
            parse_model_paths(r#"["t.safetensors", ["e-1.safetensors", "e-2.safetensors"]]"#).unwrap();
        let expected: [Vec<PathBuf>; 2] =
            [vec!["t.safetensors".into()], vec!["e-1.safetensors".into(), "e-2.safetensors".into()]];
        assert_eq!(groups, expected);
        for wrong in ["t.safetensors", "{}", "[1]", r#"[[["deep"]]]"#] {
            let error = format!("{:#}", parse_model_paths(wrong).unwrap_err());
            assert!(error.contains("--model-paths") && error.contains("JSON list"), "{error}");
        }
    }

    #[test]
    fn origins_bring_the_small_files_of_their_repositories_once() {
        let list = "Qwen/Qwen-Image:transformer/d*.safetensors, Qwen/Qwen-Image:vae/d.safetensors,";
        let origins = parse_origins(list).unwrap();
        let text = |need| {
            let wanted = origins.iter().filter(move |origin| origin.need == need);
            wanted.map(|origin| format!("{}:{}", origin.model_id, origin.pattern)).collect::<Vec<_>>()
        };
        assert_eq!(
            text(Need::Required),
            ["Qwen/Qwen-Image:transformer/d*.safetensors", "Qwen/Qwen-Image:vae/d.safetensors"]
        );
        let companions = text(Need::IfThere);
        for name in
            ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/*", "tokenizer*/*"]
        {
            let found = companions.iter().filter(|text| **text == format!("Qwen/Qwen-Image:{name}")).count();
            assert_eq!(found, 1, "{name} in {companions:?}");
        }
    }
}
