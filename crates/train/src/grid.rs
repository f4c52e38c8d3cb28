//! The sigma grid that a run trains on.

use fewstep_data::image::Size;
use fewstep_flow::SigmaGrid;
use fewstep_flow::schedule::{GridRequest, ShiftOverride, SigmaRounding, TrainingLevels};
use fewstep_models::Model;
use fewstep_models::student::SigmaRule;

use crate::TrainError;
use crate::method::TRAINING_LEVELS;
use crate::recipe::TrainingGrid;

impl TrainingGrid {
    /// The grid of a number of steps for pictures of a size.
    pub(crate) fn sigmas(self, model: &Model, steps: usize, size: Size) -> Result<SigmaGrid, TrainError> {
        Ok(model.grid(&self.request(model, steps, size))?)
    }

    /// The levels of flow matching on pictures of a size.
    pub(crate) fn levels(self, model: &Model, size: Size) -> Result<TrainingLevels, TrainError> {
        Ok(model.training_levels(&self.request(model, TRAINING_LEVELS, size))?)
    }

    fn request(self, model: &Model, steps: usize, size: Size) -> GridRequest {
        let SigmaRule { shift, rounding, .. } = self.rule(model);
        GridRequest { shift, rounding, ..model.grid_request(steps, size.height, size.width) }
    }

    /// How grids of any size and number of steps follow from the model's schedule.
    pub(crate) fn rule(self, model: &Model) -> SigmaRule {
        let (shift, rounding) = match self {
            Self::Inference => (None, model.conventions().sigma_rounding),
            Self::Diffsynth => (Some(ShiftOverride::DiffsynthTraining), SigmaRounding::Diffsynth),
        };
        SigmaRule { scheduler: model.scheduler().clone(), shift, rounding }
    }
}
