//! The sigma grid that a run trains on.

use fewstep_flow::SigmaGrid;
use fewstep_flow::schedule::{GridRequest, ShiftOverride, SigmaRounding, TrainingLevels};
use fewstep_models::student::SigmaRule;
use fewstep_models::{Extent, Model};

use crate::TrainError;
use crate::method::TRAINING_LEVELS;
use crate::recipe::TrainingGrid;

impl TrainingGrid {
    /// The grid of a number of steps for pictures or videos of a size.
    pub(crate) fn sigmas(self, model: &Model, steps: usize, extent: Extent) -> Result<SigmaGrid, TrainError> {
        Ok(model.grid(&self.request(model, steps, extent))?)
    }

    /// The levels of flow matching on pictures or videos of a size.
    pub(crate) fn levels(self, model: &Model, extent: Extent) -> Result<TrainingLevels, TrainError> {
        Ok(model.training_levels(&self.request(model, TRAINING_LEVELS, extent))?)
    }

    fn request(self, model: &Model, steps: usize, extent: Extent) -> GridRequest {
        let SigmaRule { shift, rounding, .. } = self.rule(model);
        GridRequest { shift, rounding, ..model.grid_request(steps, extent) }
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
