//! Where a generated data set comes from: what must agree between the teacher's run and the student's.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{DataError, atomic, bounded};

/// The file's name inside a data set's folder.
pub const FILE_NAME: &str = "provenance.json";

/// [`Provenance::noise_generator`] of initial noise drawn by torch's CPU generator.
pub const TORCH_CPU: &str = "torch-cpu";

/// [`Provenance::noise_generator`] of initial noise drawn as torch's CUDA generator does.
pub const TORCH_CUDA: &str = "torch-cuda";

/// How the pictures of a data set were drawn, and what their student shall run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// The guidance scale that the teacher's denoiser was told; `None` where it takes none, and in files older than the
    /// choice.
    #[serde(default)]
    pub embedded_guidance: Option<f32>,
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
    /// What the peers compute differently, by name; empty in files older than the choice.
    #[serde(default)]
    pub conventions: BTreeMap<String, String>,
    /// μ of the teacher's schedule where it is not the model's own.
    #[serde(default)]
    pub exponential_shift_mu: Option<f64>,
    /// The picture that sampling started from; `None` for pure noise.
    #[serde(default)]
    pub input_image: Option<InputImage>,
    /// Whether each picture's noise and states are stored too.
    #[serde(default)]
    pub saves_latents: bool,
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Frames of each video; `None` for pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_frames: Option<usize>,
    /// Pictures drawn at once: a picture's last bits may depend on its batch.
    pub batch_size: usize,
    /// SHA-256 of all prompts, negative prompts of their own and seeds in order.
    pub requests_hash: String,
}

/// A picture that others were drawn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputImage {
    /// SHA-256 of its pixels.
    pub hash: String,
    /// How much of it was drawn anew, in (0, 1].
    pub denoising_strength: f64,
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
        let text = bounded::read_text(&path).map_err(DataError::io(&path))?;
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
        let mut found = Vec::new();
        compare(None, &json(self), &json(other), &mut found);
        found
    }
}

/// Descends into objects, so that only what differs in them is named.
fn compare(name: Option<&str>, ours: &Value, theirs: &Value, found: &mut Vec<(String, String, String)>) {
    match (name, ours) {
        (_, Value::Object(fields)) if theirs.is_object() => {
            for (field, value) in fields {
                let path = name.map_or(field.clone(), |name| format!("{name}.{field}"));
                compare(Some(&path), value, &theirs[field.as_str()], found);
            }
        }
        (Some(name), _) if ours != theirs => {
            found.push((name.to_owned(), ours.to_string(), theirs.to_string()));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_convention_that_differs_is_named() {
        let conventions = |activation: &str| {
            let entries = [("activation", activation), ("decode_range", "clamped")];
            entries.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
        };
        let ours = Provenance { conventions: conventions("gelu-tanh"), ..Provenance::default() };
        let theirs = Provenance { conventions: conventions("gelu-sigmoid"), cfg_scale: 4.0, ..ours.clone() };
        let name = |name: &str, ours: &str, theirs: &str| (name.into(), ours.into(), theirs.into());
        let expected = [
            name("cfg_scale", "0.0", "4.0"),
            name("conventions.activation", "\"gelu-tanh\"", "\"gelu-sigmoid\""),
        ];
        assert_eq!(ours.differences(&theirs), expected);
        assert_eq!(ours.differences(&ours), []);
    }

    #[test]
    fn a_file_older_than_the_conventions_is_read() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut json = serde_json::to_value(Provenance::default()).expect("plain fields");
        let fields = json.as_object_mut().expect("an object");
        for new in
            ["conventions", "embedded_guidance", "exponential_shift_mu", "input_image", "saves_latents"]
        {
            fields.remove(new).expect("a field of today");
        }
        std::fs::write(folder.path().join(FILE_NAME), json.to_string()).expect("written");
        assert_eq!(Provenance::read(folder.path()).expect("reads"), Some(Provenance::default()));
    }
}
