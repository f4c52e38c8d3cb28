//! Pictures drawn on the way, so that a person sees what the loss does not tell.

use std::path::PathBuf;

use burn::tensor::Device;
use fewstep_data::image::Size;
use fewstep_models::{Model, Pipeline, Request};
use fewstep_report::grid::contact_sheet;

use crate::TrainError;
use crate::recipe::Recipe;

/// What is drawn every so many steps.
pub(crate) struct Samples {
    requests: Vec<Request>,
    folder: PathBuf,
}

/// Pictures drawn at once.
pub(crate) const BATCH: usize = 8;
/// Pixels between the pictures of a sheet.
const GAP_PX: usize = 2;

impl Samples {
    /// The sample settings of a recipe; `None` where it asks for none.
    ///
    /// # Errors
    /// If the file of prompts cannot be read.
    pub(crate) fn new(recipe: &Recipe, size: Size) -> Result<Option<Self>, TrainError> {
        let prompts = recipe.sample_prompts()?;
        if recipe.sample_steps == 0 || prompts.is_empty() {
            return Ok(None);
        }
        let request = |prompt| Request {
            seed: recipe.seed,
            num_inference_steps: recipe.sample_num_inference_steps,
            cfg_scale: recipe.sample_cfg_scale as f32,
            ..Request::new(prompt, size.height, size.width)
        };
        let requests = prompts.into_iter().map(request).collect();
        Ok(Some(Self { requests, folder: recipe.output_path.join("samples") }))
    }

    /// Draws the sheet of a step; returns its path.
    ///
    /// # Errors
    /// If a prompt cannot be encoded or the file cannot be written.
    pub(crate) fn draw(&self, model: Model, device: &Device, step: u64) -> Result<PathBuf, TrainError> {
        let pipeline = Pipeline::new(model, device.clone());
        let mut pictures = Vec::new();
        for requests in self.requests.chunks(BATCH) {
            pictures
                .extend(pipeline.generate_batch(requests)?.into_iter().map(|generated| generated.picture));
        }
        let path = self.folder.join(format!("step-{step:08}.png"));
        let columns = (pictures.len() as f64).sqrt().ceil() as usize;
        contact_sheet(&pictures, columns, GAP_PX).save_png(&path)?;
        Ok(path)
    }
}
