//! What can go wrong with a run.

use std::path::{Path, PathBuf};

use fewstep_data::DataError;
use fewstep_flow::FlowError;
use fewstep_models::ModelError;

/// Errors of preparing, running and resuming a training run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// A recipe file has an unknown key or a malformed value.
    #[error("{}: {reason}\nhint: every key of a recipe is a flag of `train --help`, with underscores", path.display())]
    Recipe {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and key.
        reason: String,
    },
    /// A recipe value is out of its range.
    #[error("{key} is {found}, expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// The range.
        expected: &'static str,
    },
    /// A recipe value that asks for more than any run needs.
    #[error("{key} is {found}, expected at most {limit}")]
    TooMuch {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// The largest value.
        limit: String,
    },
    /// Only one of two keys that need each other is given.
    #[error("{given} is given without {missing}\nhint: give both or neither")]
    Half {
        /// The key that is there.
        given: &'static str,
        /// The key that is not.
        missing: &'static str,
    },
    /// A peer's flag for something that does not exist here.
    #[error("{flag} is not supported: {reason}\nhint: leave it out")]
    Unsupported {
        /// The flag.
        flag: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A pattern that is no regular expression.
    #[error("{key}: {found:?} is no regular expression: {reason}")]
    Pattern {
        /// The recipe key.
        key: &'static str,
        /// The pattern.
        found: String,
        /// The parser's reason.
        reason: String,
    },
    /// A file of weights to start from that does not fit what is trained.
    #[error("{}: {} of {count} tensors belong to nothing that is trained here: {}\nhint: it must hold full weights of trainable_models; give adapters as lora_checkpoint", path.display(), unknown.len(), unknown.join(", "))]
    StartWeights {
        /// The file.
        path: PathBuf,
        /// Keys of the file without a parameter.
        unknown: Vec<String>,
        /// Tensors in the file.
        count: usize,
    },
    /// A component name the model does not have, or that cannot be trained this way.
    #[error("{key}: no component {found} to train, expected one of {}", expected.join(", "))]
    Component {
        /// The recipe key.
        key: &'static str,
        /// The name asked for.
        found: String,
        /// The names that would do.
        expected: Vec<String>,
    },
    /// The output folder belongs to another run.
    #[error("{}: holds another run: {}\nhint: give another output_path, or the recipe this folder was started with", path.display(), differences.join("; "))]
    ForeignRun {
        /// The folder.
        path: PathBuf,
        /// Keys with both values.
        differences: Vec<String>,
    },
    /// The output folder holds things that no run wrote.
    #[error("{}: not empty and without a run.toml, so no run to continue\nhint: give a new or empty output_path", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
    },
    /// Another process trains in the output folder.
    #[error("{}: another process works in this folder: {process}\nhint: wait until it ends, or give another output_path", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
        /// Its number; empty where it cannot be read.
        process: String,
    },
    /// No checkpoint of the folder can be read.
    #[error("{}: every checkpoint is damaged: {}\nhint: delete the folder {} to start over", path.display(), reasons.join("; "), path.display())]
    Damaged {
        /// The folder of checkpoints.
        path: PathBuf,
        /// One reason each.
        reasons: Vec<String>,
    },
    /// A checkpoint that could not be written.
    #[error(
        "the checkpoint of step {step}, about {needed_bytes} bytes, was not written: {}; {}\nhint: make room and run the \
         same command again, it continues there",
        first_line(reason),
        newest.as_ref().map_or("there is none before it".into(), |path| format!("{} is whole", path.display()))
    )]
    NotSaved {
        /// The optimiser step.
        step: u64,
        /// Bytes of its numbers.
        needed_bytes: u64,
        /// What went wrong.
        reason: Box<TrainError>,
        /// The newest checkpoint there is.
        newest: Option<PathBuf>,
    },
    /// A checkpoint's optimiser state belongs to another optimiser or model.
    #[error(
        "the checkpoint's optimiser state does not fit this run's optimizer or model: {name}\nhint: continue with the recipe that wrote it, or give a new output_path"
    )]
    OptimizerState {
        /// The parameter, or the part of the state.
        name: String,
    },
    /// There is nothing to train on.
    #[error("{}: no rows to train on", path.display())]
    Empty {
        /// The metadata file or data set folder.
        path: PathBuf,
    },
    /// A data set folder without metadata.
    #[error("{}: found no metadata.csv, metadata.json or metadata.jsonl\nhint: name the file with dataset_metadata_path; data for direct_distill is made by `generate`", path.display())]
    NoMetadata {
        /// The data set folder.
        path: PathBuf,
    },
    /// The second half of a split task without its first.
    #[error("{}: not found\nhint: dataset_base_path is the output_path of a run with the same task and :data_process", path.display())]
    NotProcessed {
        /// The file looked for.
        path: PathBuf,
    },
    /// What the first half of a split task wrote does not fit the second.
    #[error("{}: {reason}\nhint: run the same task with :data_process again", path.display())]
    Processed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Stored latents do not fit the model.
    #[error("{}: {what} has shape {found:?}, expected {expected:?}\nhint: the data set was made for another model or picture size; generate it again", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape the model needs.
        expected: Vec<usize>,
    },
    /// The data set was made for something else than this run.
    #[error("{}: {what} is {found} in the data set, {expected} in this run\nhint: {hint}", path.display())]
    Provenance {
        /// The provenance file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// The data set's value.
        found: String,
        /// The run's value.
        expected: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The run makes no usable losses any more.
    #[error(
        "step {step}: {times} steps in a row had a loss or gradient that is not finite or a spike, after going back {rollbacks} times\nhint: lower learning_rate or max_grad_norm, or look for damaged rows in the data; the checkpoints are from before, and with more max_rollbacks the run goes on from them"
    )]
    Diverged {
        /// The optimiser step.
        step: u64,
        /// Steps skipped in a row.
        times: u32,
        /// Times the run went back before.
        rollbacks: u32,
    },
    /// A model error.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A data error.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A schedule error.
    #[error(transparent)]
    Flow(#[from] FlowError),
}

/// An error without its hint, where another one follows.
fn first_line(error: &TrainError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl TrainError {
    /// Whether the recipe itself is at fault, so that nothing was tried.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Recipe { .. }
                | Self::Value { .. }
                | Self::TooMuch { .. }
                | Self::Half { .. }
                | Self::Component { .. }
                | Self::Unsupported { .. }
                | Self::Pattern { .. }
        )
    }

    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError + '_ {
        move |reason| TrainError::Io { path: path.to_owned(), reason }
    }

    /// A TOML error of a recipe.
    pub(crate) fn recipe(path: &Path, error: &toml::de::Error) -> TrainError {
        TrainError::Recipe { path: path.to_owned(), reason: error.to_string().trim_end().to_owned() }
    }
}
