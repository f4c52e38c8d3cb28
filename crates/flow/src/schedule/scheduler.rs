//! `scheduler_config.json` of any supported class.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::CLASS;
use super::{FlowMatchConfig, GridRequest, UniPcConfig, unipc};
use crate::diffusion::DiffusionConfig;
use crate::{FlowError, SigmaGrid, Solver};

/// The schedule of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, try_from = "Value")]
pub enum SchedulerConfig {
    /// Of a model that was trained by flow matching.
    FlowMatching(FlowMatchConfig),
    /// Of a model that was trained by flow matching, for a multi-step solver.
    UniPc(UniPcConfig),
    /// Of a model that was trained on variance-preserving noise.
    Diffusion(DiffusionConfig),
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self::FlowMatching(FlowMatchConfig::default())
    }
}

impl TryFrom<Value> for SchedulerConfig {
    type Error = FlowError;

    fn try_from(value: Value) -> Result<Self, FlowError> {
        let class = value["_class_name"].as_str().unwrap_or(CLASS);
        if class == CLASS {
            return FlowMatchConfig::from_value(value).map(Self::FlowMatching);
        }
        if DiffusionConfig::CLASSES.contains(&class) {
            return DiffusionConfig::from_value(value).map(Self::Diffusion);
        }
        if class == unipc::CLASS {
            return UniPcConfig::from_value(value).map(Self::UniPc);
        }
        Err(other_class(class, format!("{CLASS}, {}, {}", unipc::CLASS, DiffusionConfig::CLASSES.join(", "))))
    }
}

impl SchedulerConfig {
    /// Reads a config and checks that it can be followed.
    ///
    /// # Errors
    /// When the text is no such object, of an unknown class, or a field asks for what is not implemented or is out of
    /// its range.
    pub fn from_json(text: &str) -> Result<Self, FlowError> {
        serde_json::from_str::<Value>(text)?.try_into()
    }

    /// The config of a flow-matching model.
    ///
    /// # Errors
    /// When it is of another class.
    pub fn flow_matching(&self) -> Result<&FlowMatchConfig, FlowError> {
        match self {
            Self::FlowMatching(config) => Ok(config),
            Self::UniPc(_) => Err(other_class(unipc::CLASS, CLASS.into())),
            Self::Diffusion(config) => Err(other_class(config.class_name(), CLASS.into())),
        }
    }

    /// The config of a model that was trained on variance-preserving noise.
    ///
    /// # Errors
    /// When it is of another class.
    pub fn diffusion(&self) -> Result<&DiffusionConfig, FlowError> {
        match self {
            Self::Diffusion(config) => Ok(config),
            Self::FlowMatching(_) => Err(other_class(CLASS, DiffusionConfig::CLASSES.join(", "))),
            Self::UniPc(_) => Err(other_class(unipc::CLASS, DiffusionConfig::CLASSES.join(", "))),
        }
    }

    /// The grid of the published pipelines.
    ///
    /// # Errors
    /// When the request cannot be met.
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, FlowError> {
        match self {
            Self::FlowMatching(config) => config.grid(request),
            Self::UniPc(config) => config.grid(request),
            Self::Diffusion(config) => config.grid(request),
        }
    }

    /// The solver of the published pipelines.
    pub fn solver(&self) -> Solver {
        match self {
            Self::FlowMatching(_) => Solver::Euler,
            Self::UniPc(_) => Solver::UniPc,
            Self::Diffusion(config) => config.solver(),
        }
    }
}

fn other_class(found: &str, expected: String) -> FlowError {
    FlowError::Field { field: "_class_name".into(), found: found.into(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_either_kind_survives_reading_and_writing() {
        for text in [
            r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","shift_terminal":0.02,
                "_diffusers_version":"0.36.0.dev0"}"#,
            r#"{"_class_name":"PNDMScheduler","skip_prk_steps":true,"steps_offset":1,
                "_diffusers_version":"0.6.0"}"#,
            r#"{"_class_name":"UniPCMultistepScheduler","flow_shift":3.0,"use_flow_sigmas":true,
                "prediction_type":"flow_prediction","_diffusers_version":"0.33.0.dev0"}"#,
        ] {
            let config = SchedulerConfig::from_json(text).unwrap();
            let written = serde_json::to_string(&config).unwrap();
            let version = serde_json::from_str::<Value>(text).unwrap()["_diffusers_version"].to_string();
            assert!(written.contains(&format!(r#""_diffusers_version":{version}"#)), "{written}");
            assert_eq!(serde_json::from_str::<SchedulerConfig>(&written).unwrap(), config);
        }
    }

    #[test]
    fn other_classes_are_refused_by_name() {
        let error = SchedulerConfig::from_json(r#"{"_class_name":"LCMScheduler"}"#).unwrap_err().to_string();
        assert!(
            error.starts_with("scheduler config: _class_name: found LCMScheduler, expected FlowMatchEuler"),
            "{error}"
        );
        assert!(error.ends_with("DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler"), "{error}");
    }
}
