//! What pictures are drawn with where the flags leave it open: what a student was trained with, or a teacher's usual
//! settings.

use std::path::Path;

use anyhow::Result;
use fewstep_data::metadata::RandDevice;
use fewstep_flow::Solver;
use fewstep_models::conventions::{SOLVERS, name_of};
use fewstep_models::student::{TrainedGrid, noise_generator};
use fewstep_models::{Defaults, Extent, LoraFile, ModelSource, Student};

/// What the flags ask for; `None` where they are not given.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Sampling steps.
    pub num_inference_steps: Option<usize>,
    /// Guidance.
    pub cfg_scale: Option<f32>,
    /// The guidance scale that the denoiser is told.
    pub embedded_guidance: Option<f32>,
    /// Generator of the noise.
    pub rand_device: Option<RandDevice>,
    /// Shift of the schedule.
    pub exponential_shift_mu: Option<f64>,
    /// Integrator.
    pub solver: Option<Solver>,
    /// Size of what is drawn.
    pub extent: Extent,
}

/// What is drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Sampling steps.
    pub num_inference_steps: usize,
    /// Guidance; 1 is off.
    pub cfg_scale: f32,
    /// The guidance scale that the denoiser is told; `None` leaves it to the model.
    pub embedded_guidance: Option<f32>,
    /// Generator of the noise.
    pub rand_device: RandDevice,
}

/// The weights of a student among what is drawn with.
pub struct Found {
    /// How messages call it: the file of its adapters, or its model.
    name: String,
    /// Strength of its adapters.
    alpha: f32,
    student: Student,
}

impl Found {
    /// Looks for a student in an adapter and in the model under it.
    ///
    /// # Errors
    /// If a file cannot be read or its metadata is damaged.
    pub fn new(source: &ModelSource, lora: Option<&LoraFile>) -> Result<Option<Self>> {
        if let Some(file) = lora
            && let Some(student) = Student::of_file(&file.path)?
        {
            return Ok(Some(Self { name: file.path.display().to_string(), alpha: file.alpha, student }));
        }
        let student = Student::of_model(source)?;
        Ok(student.map(|student| Self { name: source.to_string(), alpha: 1.0, student }))
    }

    /// Looks for a student in a LoRA file or a model folder.
    ///
    /// # Errors
    /// As [`Found::new`].
    pub fn at(path: &Path) -> Result<Option<Self>> {
        let student = if path.is_dir() { Student::of_model(&path.into())? } else { Student::of_file(path)? };
        Ok(student.map(|student| Self { name: path.display().to_string(), alpha: 1.0, student }))
    }

    /// What the student was trained to run.
    pub fn student(&self) -> &Student {
        &self.student
    }

    /// The sentence that tells what was taken from the student; `None` where the flags said all.
    pub fn taken(&self, asked: &Asked) -> Option<String> {
        let trained = self.student.setting(asked.extent);
        let parts = [
            asked.num_inference_steps.is_none().then(|| steps(trained.num_inference_steps)),
            asked.cfg_scale.is_none().then(|| guidance(trained.cfg_scale)),
            trained.embedded_guidance.filter(|_| asked.embedded_guidance.is_none()).map(told),
            (asked.rand_device.is_none())
                .then(|| self.student.rand_device())
                .flatten()
                .map(|device| format!("noise of {}", noise_generator(device))),
            asked.exponential_shift_mu.is_none().then(|| "its own sigma grid".to_owned()),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty())
            .then(|| format!("{} is a student; as it was trained: {}", self.name, parts.join(", ")))
    }

    /// The line that tells in what the settings are not those of training; `None` where they are.
    pub fn warning(&self, asked: &Asked, settings: &Settings) -> Option<String> {
        let trained = self.student.setting(asked.extent);
        let parts = [
            differs(settings.num_inference_steps, trained.num_inference_steps, steps),
            differs(settings.cfg_scale, trained.cfg_scale, guidance),
            self.other_told(settings.embedded_guidance, trained),
            differs(asked.extent, trained.extent(), size),
            self.other_noise(settings.rand_device),
            (asked.solver.filter(|solver| *solver != Solver::Euler))
                .map(|solver| format!("solver {} instead of euler", name_of(&SOLVERS, solver))),
            asked.exponential_shift_mu.map(|mu| format!("a shift of {mu} instead of its own sigma grid")),
            differs(self.alpha, 1.0, |alpha| format!("strength {alpha}")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| {
            format!("warning: {} is drawn with as it was not trained: {}", self.name, parts.join("; "))
        })
    }

    fn other_told(&self, found: Option<f32>, trained: &TrainedGrid) -> Option<String> {
        differs(found?, trained.embedded_guidance?, told)
    }

    fn other_noise(&self, device: RandDevice) -> Option<String> {
        let (found, trained) = (noise_generator(device), &self.student.noise_generators);
        let names: Vec<&str> = trained.iter().map(String::as_str).collect();
        (!trained.is_empty() && !trained.contains(found))
            .then(|| format!("noise of {found} instead of {}", names.join(" and ")))
    }
}

impl Asked {
    /// The flags over what the student was trained with, that over the model's usual settings.
    pub fn settings(&self, student: Option<&Student>, usual: Defaults) -> Settings {
        let trained = student.map(|student| student.setting(self.extent));
        let of_student = trained.map(|trained| (trained.num_inference_steps, trained.cfg_scale));
        let (steps, cfg_scale) = of_student.unwrap_or((usual.num_inference_steps, usual.cfg_scale));
        let told = trained.and_then(|trained| trained.embedded_guidance);
        Settings {
            num_inference_steps: self.num_inference_steps.unwrap_or(steps),
            cfg_scale: self.cfg_scale.unwrap_or(cfg_scale),
            embedded_guidance: self.embedded_guidance.or(told),
            rand_device: self.rand_device.or_else(|| student?.rand_device()).unwrap_or_default(),
        }
    }
}

/// `found instead of expected`, where they differ.
fn differs<T: PartialEq>(found: T, expected: T, text: impl Fn(T) -> String) -> Option<String> {
    (found != expected).then(|| format!("{} instead of {}", text(found), text(expected)))
}

fn size(extent: Extent) -> String {
    match extent.frames {
        1 => format!("{} px", extent.size()),
        frames => format!("{} px, {frames} frames", extent.size()),
    }
}

fn steps(steps: usize) -> String {
    if steps == 1 { "1 step".to_owned() } else { format!("{steps} steps") }
}

fn told(scale: f32) -> String {
    format!("embedded guidance {scale}")
}

fn guidance(cfg_scale: f32) -> String {
    if cfg_scale == 1.0 { "no guidance".to_owned() } else { format!("guidance {cfg_scale}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_data::provenance::TORCH_CUDA;
    use fewstep_flow::SigmaGrid;

    fn found() -> Found {
        let grid = TrainedGrid {
            num_inference_steps: 2,
            cfg_scale: 1.0,
            embedded_guidance: Some(3.5),
            height: 64,
            width: 32,
            num_frames: None,
            sigmas: SigmaGrid::uniform(2).unwrap(),
        };
        let student =
            Student { grids: vec![grid], rule: None, noise_generators: [TORCH_CUDA.to_owned()].into() };
        Found { name: "s.safetensors".into(), alpha: 1.0, student }
    }

    const OPEN: Asked = Asked {
        num_inference_steps: None,
        cfg_scale: None,
        embedded_guidance: None,
        rand_device: None,
        exponential_shift_mu: None,
        solver: None,
        extent: Extent { frames: 1, height: 64, width: 32 },
    };

    #[test]
    fn open_flags_are_the_students_and_without_one_the_teachers() {
        let usual = Defaults { num_inference_steps: 28, cfg_scale: 4.0, embedded_guidance: None };
        let trained = Settings {
            num_inference_steps: 2,
            cfg_scale: 1.0,
            embedded_guidance: Some(3.5),
            rand_device: RandDevice::Cuda,
        };
        assert_eq!(OPEN.settings(Some(found().student()), usual), trained);
        assert_eq!(found().warning(&OPEN, &trained), None);
        let said = found().taken(&OPEN).unwrap();
        assert!(
            said.ends_with(
                "2 steps, no guidance, embedded guidance 3.5, noise of torch-cuda, its own sigma grid"
            ),
            "{said}"
        );
        let teacher = Settings {
            num_inference_steps: 28,
            cfg_scale: 4.0,
            embedded_guidance: None,
            rand_device: RandDevice::Cpu,
        };
        assert_eq!(OPEN.settings(None, usual), teacher);
    }

    #[test]
    fn given_flags_win_and_everything_untrained_is_named_in_one_line() {
        let asked = Asked {
            num_inference_steps: Some(8),
            cfg_scale: Some(3.5),
            embedded_guidance: Some(1.0),
            rand_device: Some(RandDevice::Cpu),
            exponential_shift_mu: Some(0.5),
            solver: Some(Solver::UniPc),
            extent: Extent { frames: 1, height: 48, width: 32 },
        };
        let usual = Defaults { num_inference_steps: 50, cfg_scale: 4.0, embedded_guidance: None };
        let settings = asked.settings(Some(found().student()), usual);
        assert_eq!(settings.num_inference_steps, 8);
        assert_eq!(found().taken(&asked), None);
        let warning = Found { alpha: 0.5, ..found() }.warning(&asked, &settings).unwrap();
        for part in [
            "8 steps instead of 2 steps",
            "guidance 3.5 instead of no guidance",
            "embedded guidance 1 instead of embedded guidance 3.5",
            "32x48 px instead of 32x64 px",
            "noise of torch-cpu instead of torch-cuda",
            "solver unipc instead of euler",
            "a shift of 0.5",
            "strength 0.5 instead of strength 1",
        ] {
            assert!(warning.contains(part), "{part} in {warning}");
        }
        assert!(!warning.contains('\n'));
    }
}
