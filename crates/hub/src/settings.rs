//! Where to download from and to: environment variables, DiffSynth-Studio's and the services' own.
//!
//! | what | variables, the first that is set wins |
//! |---|---|
//! | model folder | `FEWSTEP_MODEL_BASE_PATH`, `DIFFSYNTH_MODEL_BASE_PATH` |
//! | service | `FEWSTEP_DOWNLOAD_SOURCE`, `DIFFSYNTH_DOWNLOAD_SOURCE` |
//! | only local files | `FEWSTEP_SKIP_DOWNLOAD`, `DIFFSYNTH_SKIP_DOWNLOAD`, `HF_HUB_OFFLINE` |
//! | address of Hugging Face | `FEWSTEP_HF_ENDPOINT`, `HF_ENDPOINT` |
//! | address of ModelScope | `FEWSTEP_MODELSCOPE_ENDPOINT`, `MODELSCOPE_ENDPOINT`, `MODELSCOPE_DOMAIN` (without scheme) |
//! | access to private repositories of Hugging Face | `FEWSTEP_HF_TOKEN`, `HF_TOKEN` |

use std::path::PathBuf;
use std::time::Duration;

use crate::HubError;

const BASE_PATH: &[&str] = &["FEWSTEP_MODEL_BASE_PATH", "DIFFSYNTH_MODEL_BASE_PATH"];
const SOURCE: &[&str] = &["FEWSTEP_DOWNLOAD_SOURCE", "DIFFSYNTH_DOWNLOAD_SOURCE"];
/// The last two are switches of their own: each turns downloading off, the first decides where it is set.
const SKIP: &[&str] = &["DIFFSYNTH_SKIP_DOWNLOAD", "HF_HUB_OFFLINE"];
const OUR_SKIP: &str = "FEWSTEP_SKIP_DOWNLOAD";
const HF_ENDPOINT: &[&str] = &["FEWSTEP_HF_ENDPOINT", "HF_ENDPOINT"];
const HF_TOKEN: &[&str] = &["FEWSTEP_HF_TOKEN", "HF_TOKEN"];
const MODELSCOPE_ENDPOINT: &[&str] =
    &["FEWSTEP_MODELSCOPE_ENDPOINT", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"];

/// DiffSynth-Studio's folder of models, relative to the working directory.
const DEFAULT_BASE_PATH: &str = "./models";

/// A service that holds model files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Hugging Face and its mirrors.
    HuggingFace,
    /// ModelScope.
    ModelScope,
}

impl Source {
    /// `huggingface` or `modelscope`, in any case; `None` for other names.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "huggingface" => Some(Source::HuggingFace),
            "modelscope" => Some(Source::ModelScope),
            _ => None,
        }
    }
}

/// How downloads are done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The service.
    pub source: Source,
    /// The service's address, such as `https://host`, without a slash at the end.
    pub endpoint: String,
    /// Sent to the service's own host, never to the hosts it redirects to.
    pub token: Option<String>,
    /// Files land in `<base_folder>/<owner>/<name>/`.
    pub base_folder: PathBuf,
    /// The environment variable that forbids downloading, if one does.
    pub offline: Option<&'static str>,
    /// Wait before a broken download is continued; doubles with each failure in a row.
    pub retry_wait: Duration,
}

impl Settings {
    /// What the environment says; `source` wins over it. Without either the service is ModelScope, as in
    /// DiffSynth-Studio.
    ///
    /// # Errors
    /// If a variable has an unusable value.
    pub fn from_env(source: Option<Source>) -> Result<Self, HubError> {
        Self::from_variables(source, &|name| std::env::var(name).ok())
    }

    fn from_variables(
        source: Option<Source>,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, HubError> {
        let first = |names: &[&'static str]| {
            names.iter().find_map(|name| Some((*name, variable(name).filter(|value| !value.is_empty())?)))
        };
        let source = match (source, first(SOURCE)) {
            (Some(source), _) => source,
            (None, Some((name, found))) => Source::from_name(&found).ok_or(HubError::Setting {
                name,
                found,
                expected: "huggingface or modelscope",
            })?,
            (None, None) => Source::ModelScope,
        };
        let value = |names| first(names).map(|(_, value)| value);
        Ok(Self {
            source,
            endpoint: endpoint(source, &first),
            token: if source == Source::HuggingFace { value(HF_TOKEN) } else { None },
            base_folder: value(BASE_PATH).map_or_else(|| DEFAULT_BASE_PATH.into(), PathBuf::from),
            offline: offline(&first)?,
            retry_wait: Duration::from_secs(1),
        })
    }
}

/// Name and value of the first variable of a list that is set.
type First<'a> = dyn Fn(&[&'static str]) -> Option<(&'static str, String)> + 'a;

fn endpoint(source: Source, first: &First) -> String {
    let (names, default) = match source {
        Source::HuggingFace => (HF_ENDPOINT, "https://huggingface.co"),
        Source::ModelScope => (MODELSCOPE_ENDPOINT, "https://www.modelscope.cn"),
    };
    let address = match first(names) {
        Some((_, value)) if value.contains("://") => value,
        Some((_, domain)) => format!("https://{domain}"),
        None => default.into(),
    };
    address.trim_end_matches('/').to_owned()
}

fn offline(first: &First) -> Result<Option<&'static str>, HubError> {
    let is_on = |name: &'static str| match first(&[name]) {
        Some((name, value)) => switch(name, value).map(Some),
        None => Ok(None),
    };
    if let Some(decided) = is_on(OUR_SKIP)? {
        return Ok(decided.then_some(OUR_SKIP));
    }
    for &name in SKIP {
        if is_on(name)? == Some(true) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn switch(name: &'static str, found: String) -> Result<bool, HubError> {
    match found.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(HubError::Setting { name, found, expected: "true or false" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Settings::from_variables(None, &find)
    }

    #[test]
    fn without_variables_files_come_from_modelscope_into_models() {
        let settings = settings(&[("HF_TOKEN", "secret"), ("DIFFSYNTH_SKIP_DOWNLOAD", "")]).unwrap();
        assert_eq!(settings.source, Source::ModelScope);
        assert_eq!(settings.endpoint, "https://www.modelscope.cn");
        assert_eq!(settings.base_folder, PathBuf::from("./models"));
        assert_eq!((settings.offline, settings.token), (None, None));
    }

    #[test]
    fn the_peers_variables_are_read_and_ours_win() {
        let peers = [
            ("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace"),
            ("DIFFSYNTH_MODEL_BASE_PATH", "/theirs"),
            ("HF_ENDPOINT", "https://mirror.example/"),
            ("HF_TOKEN", "secret"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        let theirs = settings(&peers).unwrap();
        assert_eq!(theirs.source, Source::HuggingFace);
        assert_eq!(theirs.endpoint, "https://mirror.example");
        assert_eq!(theirs.base_folder, PathBuf::from("/theirs"));
        assert_eq!(theirs.token.as_deref(), Some("secret"));
        assert_eq!(theirs.offline, Some("HF_HUB_OFFLINE"));

        let ours = [
            ("FEWSTEP_DOWNLOAD_SOURCE", "modelscope"),
            ("FEWSTEP_MODEL_BASE_PATH", "/ours"),
            ("FEWSTEP_SKIP_DOWNLOAD", "false"),
            ("MODELSCOPE_DOMAIN", "www.modelscope.ai"),
        ];
        let ours = settings(&[&ours[..], &peers[..]].concat()).unwrap();
        assert_eq!(ours.source, Source::ModelScope);
        assert_eq!(ours.endpoint, "https://www.modelscope.ai");
        assert_eq!(ours.base_folder, PathBuf::from("/ours"));
        assert_eq!(ours.offline, None);
    }

    #[test]
    fn either_peers_switch_turns_downloading_off() {
        let both = settings(&[("DIFFSYNTH_SKIP_DOWNLOAD", "False"), ("HF_HUB_OFFLINE", "on")]).unwrap();
        assert_eq!(both.offline, Some("HF_HUB_OFFLINE"));
    }

    #[test]
    fn unusable_values_are_errors_that_name_the_variable() {
        for (name, value) in [("DIFFSYNTH_DOWNLOAD_SOURCE", "ftp"), ("FEWSTEP_SKIP_DOWNLOAD", "perhaps")] {
            let error = settings(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }
}
