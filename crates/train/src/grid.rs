//! The sigma grid that a run trains on.

use fewstep_data::image::Size;
use fewstep_flow::SigmaGrid;
use fewstep_flow::schedule::{GridRequest, ShiftOverride, SigmaRounding};
use fewstep_models::Model;

use crate::TrainError;
use crate::recipe::TrainingGrid;

impl TrainingGrid {
    /// The grid of a number of steps for pictures of a size.
    pub(crate) fn sigmas(self, model: &Model, steps: usize, size: Size) -> Result<SigmaGrid, TrainError> {
        let inference = model.grid_request(steps, size.height, size.width);
        let request = match self {
            Self::Inference => inference,
            Self::Diffsynth => GridRequest {
                shift: Some(ShiftOverride::DiffsynthTraining),
                rounding: SigmaRounding::Diffsynth,
                ..inference
            },
        };
        Ok(model.grid(&request)?)
    }
}
