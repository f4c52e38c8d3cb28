//! What a few-step student was trained to run, as the metadata of its weights tells it.
//!
//! A student is right on the sigma grid, at the guidance and from the noise it was trained with. Training writes them
//! into every file of weights; whoever draws with the file reads them here.

use std::collections::BTreeSet;
use std::path::Path;

use fewstep_data::provenance::{TORCH_CPU, TORCH_CUDA};
use fewstep_flow::SigmaGrid;
use fewstep_flow::noise::RandDevice;
use fewstep_flow::schedule::{GridRequest, SchedulerConfig, ShiftOverride, SigmaRounding};
use serde::{Deserialize, Serialize};

use crate::model::kind_of;
use crate::source::Info;
use crate::weights::read_info;
use crate::{Extent, LoraFile, ModelError, ModelSource};

/// The grids trained on, as JSON: a list of [`TrainedGrid`]. It makes weights those of a student.
const GRIDS: &str = "fewstep.sigma_grids";
/// How grids of other sizes and numbers of steps follow, as JSON: a [`SigmaRule`].
const RULE: &str = "fewstep.sigma_rule";
/// The generators of the noise trained from, with commas between them.
const NOISE: &str = "fewstep.noise_generator";
/// What the grids say, for whoever reads no JSON.
const STEPS: &str = "fewstep.num_inference_steps";
const CFG_SCALE: &str = "fewstep.cfg_scale";

/// How a student was trained to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Student {
    /// One for each picture size and setting, in the order of the data; at least one.
    pub grids: Vec<TrainedGrid>,
    /// How other grids follow; absent in files older than the entry.
    pub rule: Option<SigmaRule>,
    /// The generators of the noise it was trained from.
    pub noise_generators: BTreeSet<String>,
}

/// What a student was trained to do for one picture size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedGrid {
    /// Sampling steps.
    pub num_inference_steps: usize,
    /// Guidance; 1 is off.
    pub cfg_scale: f32,
    /// The guidance scale that the denoiser is told, where it takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedded_guidance: Option<f32>,
    /// Picture height in px.
    pub height: usize,
    /// Picture width in px.
    pub width: usize,
    /// Frames of a video; `None` is a picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_frames: Option<usize>,
    /// The sigma of every state, the final 0 included.
    pub sigmas: SigmaGrid,
}

impl TrainedGrid {
    /// Size of what was drawn.
    pub fn extent(&self) -> Extent {
        Extent { frames: self.num_frames.unwrap_or(1), height: self.height, width: self.width }
    }
}

/// How the grid of a number of steps and a picture size is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SigmaRule {
    /// The scheduler of the model that was trained.
    pub scheduler: SchedulerConfig,
    /// What training put in the place of the scheduler's shift.
    pub shift: Option<ShiftOverride>,
    /// Whose last bits the sigmas have.
    #[serde(default)]
    pub rounding: SigmaRounding,
}

impl SigmaRule {
    /// A run as the rule has it.
    pub(crate) fn request(&self, asked: &GridRequest) -> GridRequest {
        GridRequest { shift: self.shift, rounding: self.rounding, ..*asked }
    }
}

impl Student {
    /// What an adapter, or a model without one, was trained to run: an adapter that is no student's leaves the model
    /// what it is.
    ///
    /// # Errors
    /// As [`Student::of_file`].
    pub fn find(source: &ModelSource, lora: Option<&LoraFile>) -> Result<Option<Self>, ModelError> {
        match lora.map(|file| Self::of_file(&file.path)).transpose()?.flatten() {
            Some(student) => Ok(Some(student)),
            None => Self::of_model(source),
        }
    }

    /// Reads a file's metadata; `None` where the weights are no student's.
    ///
    /// # Errors
    /// If the file cannot be read, or an entry is damaged.
    pub fn of_file(path: &Path) -> Result<Option<Self>, ModelError> {
        Self::of_info(path, &read_info(path)?)
    }

    /// Reads the metadata of a model's denoiser; `None` where it is no student.
    ///
    /// # Errors
    /// As [`Student::of_file`].
    pub fn of_model(source: &ModelSource) -> Result<Option<Self>, ModelError> {
        match source.info(kind_of(source)?.denoiser())? {
            Some((path, info)) => Self::of_info(&path, &info),
            None => Ok(None),
        }
    }

    /// Reads metadata; `path` only names it in errors.
    ///
    /// # Errors
    /// If an entry is damaged.
    pub fn of_info(path: &Path, info: &Info) -> Result<Option<Self>, ModelError> {
        let Some(grids) = parsed::<Vec<TrainedGrid>>(path, info, GRIDS)? else { return Ok(None) };
        let names = info.get(NOISE).map(String::as_str).unwrap_or_default().split(',');
        let noise_generators = names.filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let student = Self { grids, rule: parsed(path, info, RULE)?, noise_generators };
        match student.grids.is_empty() {
            true => Err(damaged(path, GRIDS, "found an empty list")),
            false => Ok(Some(student)),
        }
    }

    /// The entries of the metadata.
    pub fn to_info(&self) -> Info {
        let json = |value: serde_json::Result<String>| value.expect("plain fields always serialise");
        let distinct = |of: &dyn Fn(&TrainedGrid) -> String| {
            let values: BTreeSet<String> = self.grids.iter().map(of).collect();
            values.into_iter().collect::<Vec<_>>().join(",")
        };
        let noise: Vec<&str> = self.noise_generators.iter().map(String::as_str).collect();
        let mut info = Info::from([
            (GRIDS.to_owned(), json(serde_json::to_string(&self.grids))),
            (NOISE.to_owned(), noise.join(",")),
            (STEPS.to_owned(), distinct(&|grid| grid.num_inference_steps.to_string())),
            (CFG_SCALE.to_owned(), distinct(&|grid| grid.cfg_scale.to_string())),
        ]);
        if let Some(rule) = &self.rule {
            info.insert(RULE.to_owned(), json(serde_json::to_string(rule)));
        }
        info
    }

    /// What it was trained to do for pictures or videos of a size; for sizes it has not seen, for its first.
    pub fn setting(&self, extent: impl Into<Extent>) -> &TrainedGrid {
        let extent = extent.into();
        self.grids.iter().find(|grid| grid.extent() == extent).unwrap_or(&self.grids[0])
    }

    /// The grid trained on, to the bit; `None` for a size in steps it was not trained for.
    pub fn trained_grid(&self, num_inference_steps: usize, extent: impl Into<Extent>) -> Option<SigmaGrid> {
        let asked = (extent.into(), num_inference_steps);
        let trained = |grid: &&TrainedGrid| (grid.extent(), grid.num_inference_steps) == asked;
        Some(self.grids.iter().find(trained)?.sigmas.clone())
    }

    /// The generator of its noise; `None` where it was trained from several, or an unknown one.
    pub fn rand_device(&self) -> Option<RandDevice> {
        let mut names = self.noise_generators.iter().map(String::as_str);
        match (names.next(), names.next()) {
            (Some(TORCH_CPU), None) => Some(RandDevice::Cpu),
            (Some(TORCH_CUDA), None) => Some(RandDevice::Cuda),
            _ => None,
        }
    }
}

/// The name of a noise generator in data sets and weights.
pub fn noise_generator(device: RandDevice) -> &'static str {
    match device {
        RandDevice::Cpu => TORCH_CPU,
        RandDevice::Cuda => TORCH_CUDA,
    }
}

fn parsed<T: serde::de::DeserializeOwned>(
    path: &Path,
    info: &Info,
    key: &str,
) -> Result<Option<T>, ModelError> {
    let read =
        |text: &String| serde_json::from_str(text).map_err(|error| damaged(path, key, &error.to_string()));
    info.get(key).map(read).transpose()
}

fn damaged(path: &Path, key: &str, reason: &str) -> ModelError {
    ModelError::Config { path: path.to_owned(), reason: format!("metadata {key}: {reason}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_flow::schedule::FlowMatchConfig;

    fn grid(num_inference_steps: usize, side: usize, sigmas: &[f32]) -> TrainedGrid {
        let sigmas = SigmaGrid::new(sigmas.to_vec()).unwrap();
        TrainedGrid {
            num_inference_steps,
            cfg_scale: 1.0,
            embedded_guidance: Some(3.5),
            height: side,
            width: side,
            num_frames: None,
            sigmas,
        }
    }

    fn student() -> Student {
        let scheduler =
            SchedulerConfig::FlowMatching(FlowMatchConfig { shift: 3.0, ..FlowMatchConfig::default() });
        Student {
            grids: vec![grid(2, 64, &[1.0, 0.7, 0.0]), grid(3, 96, &[1.0, 0.8, 0.6, 0.0])],
            rule: Some(SigmaRule { scheduler, shift: None, rounding: SigmaRounding::Diffsynth }),
            noise_generators: [TORCH_CUDA.to_owned()].into(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let info = student().to_info();
        assert_eq!(info["fewstep.num_inference_steps"], "2,3");
        assert_eq!(Student::of_info(Path::new("x"), &info).unwrap(), Some(student()));
        assert_eq!(Student::of_info(Path::new("x"), &Info::new()).unwrap(), None);
    }

    #[test]
    fn videos_of_a_size_are_not_its_pictures_and_files_of_pictures_do_not_tell_frames() {
        let info = student().to_info();
        assert!(!info[GRIDS].contains("num_frames"), "{}", info[GRIDS]);
        let mut student = student();
        student.grids[0].num_frames = Some(5);
        assert_eq!(student.trained_grid(2, [64, 64]), None);
        let video = Extent { frames: 5, height: 64, width: 64 };
        assert_eq!(student.trained_grid(2, video).unwrap().as_slice(), [1.0, 0.7, 0.0]);
        assert_eq!(Student::of_info(Path::new("x"), &student.to_info()).unwrap(), Some(student));
    }

    #[test]
    fn a_trained_size_has_its_own_setting_and_an_unknown_one_the_first() {
        assert_eq!(student().setting([96, 96]).num_inference_steps, 3);
        assert_eq!(student().setting([64, 96]).num_inference_steps, 2);
        assert_eq!(student().rand_device(), Some(RandDevice::Cuda));
    }

    #[test]
    fn the_grid_is_the_trained_one_and_otherwise_that_of_the_rule() {
        let trained = |steps, side| student().trained_grid(steps, [side; 2]);
        assert_eq!(trained(2, 64).unwrap().as_slice(), [1.0, 0.7, 0.0]);
        assert_eq!(trained(2, 96), None);
        let rule = student().rule.unwrap();
        let shifted = GridRequest { shift: Some(ShiftOverride::Mu(0.1)), ..GridRequest::new(2, 16) };
        // Shift 3 moves 1/2 to 3/4.
        let grid = rule.scheduler.grid(&rule.request(&shifted)).unwrap();
        assert_eq!(grid.as_slice(), [1.0, 0.75, 0.0]);
    }

    #[test]
    fn the_rule_is_right_to_the_last_bit() {
        let (shift, rounding) = (Some(ShiftOverride::Mu(0.8)), SigmaRounding::Diffsynth);
        let rule = SigmaRule { shift, rounding, ..student().rule.unwrap() };
        let asked = GridRequest::new(7, 16);
        let grid = |request: GridRequest| rule.scheduler.grid(&request).unwrap();
        assert_eq!(grid(rule.request(&asked)), grid(GridRequest { shift, rounding, ..asked }));
        assert_ne!(grid(rule.request(&asked)), grid(GridRequest { shift, ..asked }));
    }

    #[test]
    fn a_damaged_entry_is_named() {
        let info = Info::from([(GRIDS.to_owned(), "[{}]".to_owned())]);
        let error = Student::of_info(Path::new("a.safetensors"), &info).unwrap_err().to_string();
        assert!(error.contains("a.safetensors") && error.contains(GRIDS), "{error}");
    }
}
