//! What can be wrong with a schedule that came from a user or a file.

use crate::MAX_STEPS;

/// A schedule or a grid that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FlowError {
    /// No steps were asked for, or more than any sampler takes.
    #[error("num_inference_steps: found {found}, expected 1 to {MAX_STEPS}")]
    Steps {
        /// The steps asked for.
        found: usize,
    },
    /// The scheduler config is not the JSON object it should be.
    #[error("scheduler config: {0}")]
    Json(#[from] serde_json::Error),
    /// A field of the scheduler config has a value that cannot be followed.
    #[error("scheduler config: {field}: found {found}, expected {expected}")]
    Field {
        /// The key in the file.
        field: String,
        /// Its value.
        found: String,
        /// What could be followed.
        expected: String,
    },
    /// A run asks for what no schedule has.
    #[error("sampling: {field}: found {found}, expected {expected}")]
    Request {
        /// What was asked for.
        field: &'static str,
        /// Its value.
        found: String,
        /// What could be done.
        expected: &'static str,
    },
    /// The numbers are no way from noise to picture.
    #[error("sigma grid: entry {index} of {length}: found {found}, expected {expected}")]
    Grid {
        /// Position of the first bad entry.
        index: usize,
        /// Number of entries.
        length: usize,
        /// Its value.
        found: f32,
        /// What that position must hold.
        expected: &'static str,
    },
    /// Fewer than the two entries that one step needs.
    #[error("sigma grid: found {length} entries, expected at least 2 (a start and the final 0)")]
    ShortGrid {
        /// Number of entries.
        length: usize,
    },
}
