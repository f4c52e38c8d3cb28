//! Direct distillation (METHODS, A): the student's few Euler steps from the teacher's noise end in the teacher's picture.

use burn::tensor::Tensor;
use fewstep_flow::{SigmaGrid, path};
use fewstep_models::sampling::latents_from_noise;
use fewstep_models::{Denoiser, KeptSteps, Model};

use super::{GradientSum, Rollout};
use crate::TrainError;
use crate::batch::Batch;
use crate::recipe::{Distance, Recipe, StudentGuidance, StudentStart, TrainingGrid};

/// Direct distillation and its settings.
pub struct Direct {
    distance: Distance,
    huber_c: f64,
    training_grid: TrainingGrid,
    student_guidance: StudentGuidance,
    student_start: StudentStart,
    kept_steps: KeptSteps,
    /// Boxed: a model is hundreds of times larger than the rest.
    teacher: Option<Box<OnlineTeacher>>,
}

/// A teacher whose pictures are made during training.
pub struct OnlineTeacher {
    /// The frozen weights, on the plain side of the device.
    pub model: Model,
    /// Its sampling steps.
    pub num_inference_steps: usize,
    /// Its guidance; 1 is off.
    pub cfg_scale: f32,
}

impl Direct {
    /// The settings of a recipe; `start` is the model before training, which an online teacher keeps.
    pub fn new(recipe: &Recipe, start: &Model) -> Self {
        let teacher = || {
            let (num_inference_steps, cfg_scale) = recipe.teacher(start.defaults());
            OnlineTeacher { model: start.clone(), num_inference_steps, cfg_scale }
        };
        Self {
            distance: recipe.loss,
            huber_c: recipe.huber_c,
            training_grid: recipe.training_grid,
            student_guidance: recipe.student_guidance,
            student_start: recipe.student_start,
            kept_steps: recipe.kept_steps(),
            teacher: recipe.online_teacher.then(|| Box::new(teacher())),
        }
    }

    /// See [`super::Method::step`].
    pub(crate) fn step(
        &self,
        model: &Model,
        batch: &Batch<'_>,
        share: f32,
        sum: &mut GradientSum,
    ) -> Result<f64, TrainError> {
        let Problem { rollout, target } = self.problem(model, batch)?;
        let loss = self.loss(model, rollout.grid.clone(), target);
        Ok(rollout.add_gradient(model, self.kept_steps, (share, sum), loss))
    }

    /// The same gradient from one graph over all steps: the tests' reference.
    #[cfg(test)]
    pub(crate) fn step_on_tape(
        &self,
        model: &Model,
        batch: &Batch<'_>,
        share: f32,
        sum: &mut GradientSum,
    ) -> Result<f64, TrainError> {
        let Problem { rollout, target } = self.problem(model, batch)?;
        let loss = self.loss(model, rollout.grid.clone(), target);
        Ok(rollout.add_gradient_on_tape(model, (share, sum), loss))
    }

    fn problem(&self, model: &Model, batch: &Batch<'_>) -> Result<Problem, TrainError> {
        let group = batch.group();
        let noise = batch.initial_noise(model.dtype().into());
        let guidance = batch.guidance(model, self.student_guidance.scale(group.cfg_scale()))?;
        let target = match &self.teacher {
            Some(teacher) => teacher.latents(noise.clone(), batch)?,
            None => batch.latents(),
        };
        let grid = self.training_grid.sigmas(model, group.num_inference_steps, group.extent)?;
        let start = self.start(model, noise, &target, &grid);
        let rollout = Rollout { guidance, start: model.kept(start), grid };
        Ok(Problem { rollout, target })
    }

    /// The state at the first sigma of the grid.
    fn start(&self, model: &Model, noise: Tensor<4>, target: &Tensor<4>, grid: &SigmaGrid) -> Tensor<4> {
        let knows_pure_noise = model.highest_sigma() == 1.0;
        match self.student_start {
            StudentStart::NoisedTarget if !knows_pure_noise => {
                let sigma = Tensor::full([noise.dims()[0]], grid.as_slice()[0], &noise.device());
                path::noisy(target.clone(), noise, sigma)
            }
            _ => model.start(noise, grid),
        }
    }

    /// The loss of the last state of a grid; that has a graph.
    fn loss(&self, model: &Model, grid: SigmaGrid, target: Tensor<4>) -> impl FnOnce(Tensor<4>) -> Tensor<1> {
        move |state| {
            let squared = (model.finish(state, &grid) - target.autodiff()).square();
            match self.distance {
                Distance::Mse => squared.mean(),
                Distance::PseudoHuber => (squared + self.huber_c * self.huber_c).sqrt().mean() - self.huber_c,
            }
        }
    }
}

/// What a batch asks of the student.
struct Problem {
    rollout: Rollout,
    target: Tensor<4>,
}

impl OnlineTeacher {
    /// The teacher's own ODE solution from the noise.
    fn latents(&self, noise: Tensor<4>, batch: &Batch<'_>) -> Result<Tensor<4>, TrainError> {
        let grid = self.model.sigma_grid(self.num_inference_steps, batch.group().extent)?;
        // The teacher is told what it usually is, whatever its student is told.
        let guidance = batch.guidance(&self.model, self.cfg_scale)?.told(None);
        Ok(latents_from_noise(&self.model, &grid, noise, &guidance))
    }
}
