//! The sigma grid that a run trains on.

use fewstep_data::image::Size;
use fewstep_flow::SigmaGrid;
use fewstep_flow::schedule::{GridRequest, ShiftOverride, SigmaRounding};
use fewstep_models::Model;
use fewstep_models::student::SigmaRule;

use crate::TrainError;
use crate::recipe::TrainingGrid;

impl TrainingGrid {
    /// The grid of a number of steps for pictures of a size.
    pub(crate) fn sigmas(self, model: &Model, steps: usize, size: Size) -> Result<SigmaGrid, TrainError> {
        let SigmaRule { scheduler, shift, rounding } = self.rule(model);
        let inference = model.grid_request(steps, size.height, size.width);
        Ok(scheduler.grid(&GridRequest { shift, rounding, ..inference })?)
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
