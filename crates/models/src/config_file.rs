//! The JSON files of a model folder: configs of components, and the small files beside them.

use std::path::{Path, PathBuf};

use fewstep_data::bounded;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::kind_of;
use crate::{ModelError, ModelSource};

/// One JSON file of a model folder.
pub(crate) struct ConfigFile {
    path: PathBuf,
    /// What it holds.
    pub(crate) json: Value,
}

impl ConfigFile {
    /// A component's `config.json`; the published one where weights of its size were given without.
    ///
    /// # Errors
    /// If there is none, and the weights are of another size, or it is damaged.
    pub(crate) fn of_component(source: &ModelSource, component: &'static str) -> Result<Self, ModelError> {
        match source.config(component) {
            Ok(path) => Self::read(path),
            Err(without @ ModelError::NotBeside { .. }) => {
                let kind = kind_of(source)?;
                let files = source.weights(component).ok();
                let json = files.and_then(|files| kind.published_config(component, &files)).ok_or(without)?;
                Ok(Self { path: format!("{component}/config.json").into(), json })
            }
            Err(error) => Err(error),
        }
    }

    /// Reads a file.
    pub(crate) fn read(path: PathBuf) -> Result<Self, ModelError> {
        let text = bounded::read_text(&path).map_err(ModelError::io(&path))?;
        Self::parsed(path, &text)
    }

    /// A small file that every model of the family shares; see [`ModelSource::text_or`].
    pub(crate) fn shared(source: &ModelSource, relative: &str, published: &str) -> Result<Self, ModelError> {
        let (path, text) = source.text_or(relative, published)?;
        Self::parsed(path, &text)
    }

    fn parsed(path: PathBuf, text: &str) -> Result<Self, ModelError> {
        let json = serde_json::from_str(text)
            .map_err(|error| ModelError::Config { path: path.clone(), reason: error.to_string() })?;
        Ok(Self { path, json })
    }

    /// The class that diffusers writes into its configs.
    pub(crate) fn class_name(&self) -> Option<&str> {
        self.json["_class_name"].as_str()
    }

    /// Refuses configs of classes there is no code for.
    pub(crate) fn check_class(
        &self,
        role: &'static str,
        found: Option<&str>,
        expected: &[&'static str],
    ) -> Result<(), ModelError> {
        let found = found.unwrap_or("(none)");
        if expected.contains(&found) {
            return Ok(());
        }
        let (path, found, expected) = (self.path.clone(), found.to_owned(), expected.to_vec());
        Err(ModelError::UnknownClass { path, role, found, expected })
    }

    /// The file as one line.
    pub(crate) fn text(&self) -> String {
        self.json.to_string()
    }

    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, ModelError> {
        T::deserialize(&self.json).map_err(|error| self.error(error.to_string()))
    }

    /// The same, keys that the file leaves out having the values they have in `defaults`.
    pub(crate) fn parse_over<T: DeserializeOwned>(&self, mut defaults: Value) -> Result<T, ModelError> {
        if let (Some(all), Some(given)) = (defaults.as_object_mut(), self.json.as_object()) {
            all.extend(given.clone());
        }
        T::deserialize(&defaults).map_err(|error| self.error(error.to_string()))
    }

    /// Says what is wrong in the file, found against expected.
    pub(crate) fn error(&self, reason: String) -> ModelError {
        ModelError::Config { path: self.path.clone(), reason }
    }
}

/// Reads a JSON file that is no config of a component.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    ConfigFile::read(path.to_owned())?.parse()
}
