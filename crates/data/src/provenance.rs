//! Where a generated data set comes from: what must agree between the teacher's run and the student's.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{DataError, atomic};

/// The file's name inside a data set's folder.
pub const FILE_NAME: &str = "provenance.json";

/// [`Provenance::noise_generator`] of initial noise drawn by torch's CPU generator.
pub const TORCH_CPU: &str = "torch-cpu";

/// How the pictures of a data set were drawn, and what their student shall run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The teacher's folder, as given.
    pub teacher: String,
    /// SHA-256 of the teacher's weights.
    pub teacher_hash: String,
    /// The adapter applied to the teacher, `FILE:alpha`; `None` for the model as it is.
    pub lora: Option<String>,
    /// The teacher's sampling steps.
    pub num_inference_steps: usize,
    /// The teacher's guidance.
    pub cfg_scale: f32,
    /// What the teacher's guidance pushed away from.
    pub negative_prompt: String,
    /// The teacher's integrator.
    pub solver: String,
    /// The teacher's sigma grid, 0 included.
    pub sigmas: Vec<f32>,
    /// The student's sampling steps.
    pub student_num_inference_steps: usize,
    /// The student's guidance.
    pub student_cfg_scale: f32,
    /// The student's sigma grid, 0 included: the one it must be trained and run on.
    pub student_sigmas: Vec<f32>,
    /// The generator of the initial noise.
    pub noise_generator: String,
    /// Number type of the sampling.
    pub dtype: String,
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Pictures drawn at once: a picture's last bits may depend on its batch.
    pub batch_size: usize,
    /// SHA-256 of all prompts and seeds in order.
    pub requests_hash: String,
}

impl Provenance {
    /// Reads the provenance of a data set; `None` where it has none, as for pictures from elsewhere.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>, DataError> {
        let path = folder.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(DataError::io(&path))?;
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).map_err(|error| DataError::Provenance { path, reason: error.to_string() })
    }

    /// Writes the file into a data set's folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), DataError> {
        let path = folder.join(FILE_NAME);
        let text = serde_json::to_string_pretty(self).expect("plain fields always serialise");
        atomic::write(&path, text.as_bytes()).map_err(DataError::io(&path))
    }

    /// The fields in which two differ: name, `self`'s value, `other`'s value.
    pub fn differences(&self, other: &Self) -> Vec<(String, String, String)> {
        let json =
            |provenance: &Self| serde_json::to_value(provenance).expect("plain fields always serialise");
        let (ours, theirs) = (json(self), json(other));
        let fields = ours.as_object().into_iter().flatten();
        fields
            .filter(|(name, value)| theirs[name.as_str()] != **value)
            .map(|(name, value)| (name.clone(), value.to_string(), theirs[name.as_str()].to_string()))
            .collect()
    }
}
