//! Flow matching, the task `sft`: L = w(s) · mean |v(x_s, s, c) − (e − x0)|² at random s (METHODS, SFT).

use burn::tensor::{Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;
use fewstep_flow::path;
use fewstep_flow::schedule::TrainingLevels;

use fewstep_models::{Denoiser, Model, WeightType};
use rayon::prelude::*;

use super::{GradientSum, scalar};
use crate::TrainError;
use crate::batch::Batch;
use crate::recipe::{LossWeighting, Recipe, TimestepSampling, TrainingGrid};

/// Noise levels of [`TimestepSampling::Schedule`]: the peers' training timesteps.
pub(crate) const TRAINING_LEVELS: usize = 1000;

/// Flow matching and its settings.
pub struct FlowMatching {
    guidance_dropout: f32,
    timestep_sampling: TimestepSampling,
    loss_weighting: LossWeighting,
    training_grid: TrainingGrid,
}

impl FlowMatching {
    /// The settings of a recipe.
    pub fn new(recipe: &Recipe) -> Self {
        Self {
            guidance_dropout: recipe.guidance_dropout as f32,
            timestep_sampling: recipe.timestep_sampling,
            loss_weighting: recipe.loss_weighting,
            training_grid: recipe.training_grid,
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
        let clean = batch.latents(); // [B, C, H, W]
        let levels = self.training_grid.levels(model, batch.group().extent)?;
        let drawn = self.draw(batch, model, &levels);
        let device = clean.device();
        let per_sample =
            |values: Vec<f32>| Tensor::<1>::from_data(TensorData::new(values, [batch.len()]), &device);
        let weight = self.weight(model, &levels, &drawn.sigmas).map(per_sample);
        let sigma = per_sample(drawn.sigmas);
        let noise = Tensor::from_data(TensorData::new(drawn.noise, clean.dims()), &device);
        let noisy = path::noisy(clean.clone(), noise.clone(), sigma.clone());
        let target = path::velocity(clean, noise);

        let condition = batch.condition(model, &drawn.dropped)?.autodiff();
        let velocity = model.velocity(noisy.autodiff(), sigma.autodiff(), &condition);
        let errors = (velocity - target.autodiff()).square(); // [B, C, H, W]
        let loss = match weight {
            Some(weight) => (errors * weight.autodiff().reshape([-1, 1, 1, 1])).mean(),
            None => errors.mean(),
        };
        sum.add(model, || (loss.clone().mul_scalar(share).backward(), ()));
        Ok(scalar(loss))
    }

    /// One weight per sample: what makes levels count alike in what the model predicts, times that of the level nearest
    /// to its sigma. `None` where all are 1.
    fn weight(&self, model: &Model, levels: &TrainingLevels, sigmas: &[f32]) -> Option<Vec<f32>> {
        let of_level = |sigma: f32| match self.loss_weighting {
            LossWeighting::Uniform => 1.0,
            LossWeighting::Bell => levels.weights()[levels.nearest(sigma)],
        };
        let weights: Vec<f32> =
            sigmas.iter().map(|sigma| model.loss_weight(*sigma) * of_level(*sigma)).collect();
        weights.iter().any(|weight| *weight != 1.0).then_some(weights)
    }

    /// Everything random of a batch; a sample's numbers do not depend on the batch it is in.
    fn draw(&self, batch: &Batch<'_>, model: &Model, levels: &TrainingLevels) -> Drawn {
        let (dtype, highest) = (model.dtype(), model.highest_sigma());
        let elements = batch.group().latent_shape.iter().product();
        let draw = |mut generator: TorchGenerator| {
            let (dropped, sigma) = self.draw_level(&mut generator, levels, highest);
            // The peer looks for the level of the timestep after rounding it.
            let rounds = dtype == WeightType::BF16 && self.timestep_sampling == TimestepSampling::Schedule;
            let nearest = || levels.sigmas()[levels.after_bf16(levels.nearest(sigma))];
            let sigma = if rounds { nearest() } else { sigma };
            (dropped, sigma, generator.randn_as(elements, dtype.into()))
        };
        let samples: Vec<_> = batch.generators().into_par_iter().map(draw).collect();
        Drawn {
            dropped: samples.iter().map(|sample| sample.0).collect(),
            sigmas: samples.iter().map(|sample| sample.1).collect(),
            noise: samples.into_iter().flat_map(|sample| sample.2).collect(),
        }
    }

    /// Dropped or not, and sigma, at most the highest that the model knows.
    pub(crate) fn draw_level(
        &self,
        generator: &mut TorchGenerator,
        levels: &TrainingLevels,
        highest: f32,
    ) -> (bool, f32) {
        let levels = levels.sigmas();
        let dropped = self.guidance_dropout > 0.0 && generator.rand(1)[0] < self.guidance_dropout;
        let sigma = match self.timestep_sampling {
            TimestepSampling::Uniform => highest * generator.rand(1)[0],
            TimestepSampling::LogitNormal => highest / (1.0 + (-generator.randn(1)[0]).exp()),
            TimestepSampling::Schedule => levels[generator.randint(0, levels.len() as i64, 1)[0] as usize],
        };
        (dropped, sigma)
    }
}

struct Drawn {
    dropped: Vec<bool>,
    sigmas: Vec<f32>,
    noise: Vec<f32>,
}
