//! The sigma grid that a run trains on.

use fewstep_data::image::Size;
use fewstep_flow::SigmaGrid;
use fewstep_flow::schedule::ShiftOverride;
use fewstep_models::Model;

use crate::TrainError;
use crate::recipe::TrainingGrid;

impl TrainingGrid {
    /// The grid of a number of steps for pictures of a size.
    pub(crate) fn sigmas(self, model: &Model, steps: usize, size: Size) -> Result<SigmaGrid, TrainError> {
        let shift = match self {
            Self::Inference => None,
            Self::Diffsynth => Some(ShiftOverride::DiffsynthTraining),
        };
        Ok(model.shifted_sigma_grid(steps, size.height, size.width, shift)?)
    }
}
