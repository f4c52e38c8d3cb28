//! From flags, a TOML file and a peer's choices to one recipe, and back to TOML.

use std::path::Path;

use clap::ArgMatches;
use clap::parser::ValueSource;
use fewstep_data::bounded;

use super::{Compat, OptimizerName, Recipe};
use crate::TrainError;

/// Keys on which no trained number depends: where a run works, how fast, and what it writes on the way.
const PLACE_KEYS: [&str; 13] = [
    "output_path",
    "dataset_num_workers",
    "dataset_memory_mib",
    "find_unused_parameters",
    "enable_csv_log",
    "enable_tensorboard_log",
    "save_steps",
    "keep",
    "log_steps",
    "sample_steps",
    "sample_prompts",
    "sample_num_inference_steps",
    "sample_cfg_scale",
];

/// Other keys that may change when a run is continued: how long it runs, when it gives up, and what moves last bits.
const FREE_KEYS: [&str; 15] = [
    "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload",
    "recorded_steps",
    "max_steps",
    "num_epochs",
    "device",
    "output_dtype",
    "lora_format",
    "result",
    "max_skipped_steps",
    "max_rollbacks",
    "monitor_patience",
    "monitor_min_diversity",
    "monitor_min_sharpness",
    "monitor_max_drift",
];

impl Recipe {
    /// The defaults, with a peer's choices wherever they differ.
    pub fn compatible(peer: Compat) -> Recipe {
        peer.choices().try_into().expect("a peer's choices are keys of a recipe with valid values")
    }

    /// Overlays the flags that stood on the command line over a TOML file, that over the peer's choices where `compat`
    /// names one, and those over the defaults.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown key or a malformed value, or a flag's number is none of TOML's.
    pub fn resolve(&self, matches: &ArgMatches, config: Option<&Path>) -> Result<Recipe, TrainError> {
        let mut given = config.map(read_table).transpose()?.unwrap_or_default();
        self.check_integers()?;
        for (key, value) in to_table(self) {
            if matches.value_source(&key) == Some(ValueSource::CommandLine) {
                given.insert(key, value);
            }
        }
        Ok(over_compat(given))
    }

    /// Reads a TOML recipe; absent keys have their defaults, or the choices of the peer it names as `compat`.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown key or a malformed value.
    pub fn read(path: &Path) -> Result<Recipe, TrainError> {
        Ok(over_compat(read_table(path)?))
    }

    /// As [`Recipe::read`], from a file's text; `path` only names it in errors.
    ///
    /// # Errors
    /// If the text has an unknown key or a malformed value.
    pub fn parse(path: &Path, text: &str) -> Result<Recipe, TrainError> {
        Ok(over_compat(parse_table(path, text)?))
    }

    /// The recipe as TOML, every key that has a value.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a flat struct of numbers, strings and lists is valid TOML")
    }

    /// The recipe with the defaults in place of the keys on which no trained number depends, so that equal runs in two
    /// folders have equal results.
    pub fn without_place(&self) -> Recipe {
        let mut table = to_table(self);
        table.retain(|key, _| !PLACE_KEYS.contains(&key));
        table.try_into().expect("the rest of a valid recipe is valid, since every key has a default")
    }

    /// The keys, with both values, that make `self` another run than `other`.
    pub fn differences(&self, other: &Recipe) -> Vec<String> {
        let (ours, theirs) = (to_table(self), to_table(other));
        let shown =
            |table: &toml::Table, key: &str| table.get(key).map_or("unset".into(), ToString::to_string);
        let mut keys: Vec<&String> =
            ours.keys().chain(theirs.keys().filter(|key| !ours.contains_key(*key))).collect();
        let free = |key: &str| PLACE_KEYS.contains(&key) || FREE_KEYS.contains(&key);
        keys.retain(|key| !free(key) && ours.get(*key) != theirs.get(*key));
        keys.iter()
            .map(|key| format!("{key} is {} there, {} here", shown(&theirs, key), shown(&ours, key)))
            .collect()
    }
}

/// The keys of a recipe file, all known and with valid values.
fn read_table(path: &Path) -> Result<toml::Table, TrainError> {
    let text = bounded::read_text(path).map_err(TrainError::io(path))?;
    parse_table(path, &text)
}

fn parse_table(path: &Path, text: &str) -> Result<toml::Table, TrainError> {
    let malformed = |error: toml::de::Error| TrainError::recipe(path, &error);
    // For the message, which then names the line.
    toml::from_str::<Recipe>(text).map_err(malformed)?;
    toml::from_str(text).map_err(malformed)
}

/// Lays valid keys over the choices of the peer among them and the defaults of their optimiser.
fn over_compat(given: toml::Table) -> Recipe {
    let valid = "every key has been checked";
    let peer: Option<Compat> = given.get("compat").map(|name| name.clone().try_into().expect(valid));
    let mut table = peer.map(Compat::choices).unwrap_or_default();
    let optimizer: Option<OptimizerName> =
        given.get("optimizer").map(|name| name.clone().try_into().expect(valid));
    table.extend(optimizer.map(OptimizerName::defaults).unwrap_or_default());
    table.extend(given);
    table.try_into().expect(valid)
}

fn to_table(recipe: &Recipe) -> toml::Table {
    toml::Table::try_from(recipe).expect("a flat struct of numbers, strings and lists is a TOML table")
}
