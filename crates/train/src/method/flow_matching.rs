//! Flow matching, the task `sft`: L = mean |v(x_s, s, c) − (e − x0)|² at random s (METHODS, SFT).

use burn::tensor::{Tensor, TensorData};
use fewstep_flow::path;
use fewstep_models::{Denoiser, Model};
use rayon::prelude::*;

use super::{GradientSum, scalar};
use crate::TrainError;
use crate::batch::Batch;
use crate::random::{Draw, Purpose};
use crate::recipe::{Recipe, TimestepSampling};

/// Noise levels of [`TimestepSampling::Schedule`]: the peers' training timesteps.
const TRAINING_LEVELS: usize = 1000;

/// Flow matching and its settings.
pub struct FlowMatching {
    guidance_dropout: f32,
    timestep_sampling: TimestepSampling,
}

impl FlowMatching {
    /// The settings of a recipe.
    pub fn new(recipe: &Recipe) -> Self {
        Self { guidance_dropout: recipe.guidance_dropout as f32, timestep_sampling: recipe.timestep_sampling }
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
        let drawn = self.draw(model, batch, clean.shape().num_elements() / batch.len())?;
        let device = clean.device();
        let sigma = Tensor::from_data(TensorData::new(drawn.sigmas, [batch.len()]), &device); // [B]
        let noise = Tensor::from_data(TensorData::new(drawn.noise, clean.dims()), &device);
        let noisy = path::noisy(clean.clone(), noise.clone(), sigma.clone());
        let target = path::velocity(clean, noise);

        let condition = batch.condition(model, &drawn.dropped)?.autodiff();
        let velocity = model.velocity(noisy.autodiff(), sigma.autodiff(), &condition);
        let loss = (velocity - target.autodiff()).square().mean();
        sum.add(model, loss.clone().mul_scalar(share).backward());
        Ok(scalar(loss))
    }

    /// Everything random of a batch; a sample's numbers do not depend on the batch it is in.
    fn draw(&self, model: &Model, batch: &Batch<'_>, elements: usize) -> Result<Drawn, TrainError> {
        let size = batch.group().size;
        let grid = model.sigma_grid(TRAINING_LEVELS, size.height, size.width)?;
        let levels = &grid.as_slice()[..TRAINING_LEVELS];
        let draw = |draw| self.draw_sample(draw, elements, levels);
        let samples: Vec<_> = batch.draws().into_par_iter().map(draw).collect();
        Ok(Drawn {
            dropped: samples.iter().map(|sample| sample.0).collect(),
            sigmas: samples.iter().map(|sample| sample.1).collect(),
            noise: samples.into_iter().flat_map(|sample| sample.2).collect(),
        })
    }

    /// Dropped or not, sigma, noise; `levels` are those of [`TimestepSampling::Schedule`].
    pub(crate) fn draw_sample(&self, draw: Draw, elements: usize, levels: &[f32]) -> (bool, f32, Vec<f32>) {
        let mut generator = draw.generator(Purpose::Sample);
        let dropped = generator.rand(1)[0] < self.guidance_dropout;
        let sigma = match self.timestep_sampling {
            TimestepSampling::Uniform => generator.rand(1)[0],
            TimestepSampling::LogitNormal => 1.0 / (1.0 + (-generator.randn(1)[0]).exp()),
            TimestepSampling::Schedule => levels[(generator.rand(1)[0] * levels.len() as f32) as usize],
        };
        (dropped, sigma, generator.randn(elements))
    }
}

struct Drawn {
    dropped: Vec<bool>,
    sigmas: Vec<f32>,
    noise: Vec<f32>,
}
