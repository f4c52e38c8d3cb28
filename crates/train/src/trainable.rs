//! Which parameters learn: whole components, or LoRA adapters beside frozen weights.

use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, TensorData};
use fewstep_models::lora::{self, LoraConfig};
use fewstep_models::{Model, NamedMapper, map_named};

use crate::host::to_vec;
use crate::recipe::{Dtype, Recipe, Task};
use crate::{TrainError, start_weights, targets};

/// What a recipe trains.
#[derive(Clone, Debug, PartialEq)]
pub enum Trainable {
    /// Every parameter of these components.
    Full(Vec<String>),
    /// Adapters on one component.
    Lora(LoraConfig),
}

impl Trainable {
    /// Reads a recipe's choice and checks it against the model.
    ///
    /// # Errors
    /// If a component is unknown, or its gradient does not exist in the task.
    pub fn new(recipe: &Recipe, model: &Model) -> Result<Self, TrainError> {
        if let Some(base) = &recipe.lora_base_model {
            check("lora_base_model", component(base, model), &[model.denoiser_name().to_owned()])?;
            return Ok(Self::Lora(LoraConfig {
                rank: recipe.lora_rank,
                alpha: recipe.lora_alpha.unwrap_or(recipe.lora_rank as f64) as f32,
                target_modules: targets::resolve(recipe.lora_target_modules.as_deref(), model)?,
            }));
        }
        let names = model.component_names().iter().map(|name| (*name).to_owned());
        let possible: Vec<String> = names.filter(|name| learns(name, recipe.task, model)).collect();
        let asked = recipe.trainable_models.iter().map(|name| component(name, model).to_owned());
        let asked: Vec<String> = asked.collect();
        for name in &asked {
            check("trainable_models", name, &possible)?;
        }
        Ok(Self::Full(asked))
    }

    /// Whether prompts must be encoded anew in each step, with a graph.
    pub fn trains_text_encoder(&self, model: &Model) -> bool {
        let is_text_encoder = |name: &String| model.text_encoder_names().contains(&name.as_str());
        matches!(self, Self::Full(names) if names.iter().any(is_text_encoder))
    }

    /// Attaches adapters where asked for, loads the weights to start from, freezes everything else, has blocks recomputed
    /// where asked for, and moves the model to the autodiff side.
    ///
    /// Frozen parameters cost no gradient memory and no backward work.
    ///
    /// # Errors
    /// If no layer matches the LoRA targets, or a file of weights does not fit.
    pub fn prepare(&self, model: Model, recipe: &Recipe) -> Result<Model, TrainError> {
        let model = match self {
            Self::Full(_) => model,
            Self::Lora(config) => match &recipe.lora_checkpoint {
                // A file's adapters are applied as they were trained: its scale is folded in.
                Some(path) => lora::load(model, path, 1.0)?,
                None => lora::attach(model, config, recipe.seed)?.0,
            },
        };
        let model = match &recipe.resume_from_checkpoint {
            Some(path) => start_weights::overlay(model, path, self, recipe.lora_scale())?,
            None => model,
        };
        let model = map_named(model, &mut Freeze(self, recipe.state_dtype()));
        let model = self.rounding(model, recipe.state_dtype());
        Ok(model.recomputing_blocks(recipe.checkpoints_gradients()).train())
    }

    /// Components that learn in f32 compute in the model's type, as everything around them does.
    fn rounding(&self, model: Model, state: Dtype) -> Model {
        match self {
            Self::Full(components) if state == Dtype::F32 => {
                components.iter().fold(model, |model, component| model.rounding(component))
            }
            _ => model,
        }
    }

    /// Whether a parameter learns.
    pub(crate) fn includes(&self, name: &str) -> bool {
        match self {
            Self::Full(components) => {
                let component = name.split('.').next().unwrap_or_default();
                components.iter().any(|trained| trained == component)
            }
            Self::Lora(_) => name.contains(".lora."),
        }
    }
}

/// Distillation and split tasks read stored text states, and no task has a gradient for an autoencoder.
fn learns(component: &str, task: Task, model: &Model) -> bool {
    component == model.denoiser_name() || task == Task::Sft && model.text_encoder_names().contains(&component)
}

/// What denoisers are called: by one peer, and in the official layouts.
const DENOISERS: [&str; 3] = ["dit", "transformer", "unet"];

/// A component's name here; any name of a denoiser is that of the model's own.
pub(crate) fn component<'a>(name: &'a str, model: &Model) -> &'a str {
    let name = name.trim();
    if DENOISERS.contains(&name) { model.denoiser_name() } else { name }
}

/// The model with a LoRA file's update added to its weights, where the recipe names one.
///
/// # Errors
/// If it is for another component, or does not fit.
pub(crate) fn with_preset(model: Model, recipe: &Recipe) -> Result<Model, TrainError> {
    match preset(&model, recipe)? {
        Some(path) => Ok(lora::merge(lora::load(model, path, 1.0)?)),
        None => Ok(model),
    }
}

/// The LoRA file to add to the weights, if the recipe names one.
///
/// # Errors
/// If it is for a component that adapters do not belong to.
pub(crate) fn preset<'a>(model: &Model, recipe: &'a Recipe) -> Result<Option<&'a Path>, TrainError> {
    let (Some(path), Some(base)) = (&recipe.preset_lora_path, &recipe.preset_lora_model) else {
        return Ok(None);
    };
    check("preset_lora_model", component(base, model), &[model.denoiser_name().to_owned()])?;
    Ok(Some(path))
}

fn check(key: &'static str, found: &str, expected: &[String]) -> Result<(), TrainError> {
    match expected.iter().any(|name| name == found) {
        true => Ok(()),
        false => Err(TrainError::Component { key, found: found.to_owned(), expected: expected.to_vec() }),
    }
}

/// Marks what learns, stores it in f32, and rounds it to the numbers it is trained in.
struct Freeze<'a>(&'a Trainable, Dtype);

impl NamedMapper for Freeze<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let learns = self.0.includes(name);
        let parameter = if learns { parameter.map(|values| rounded(values, self.1)) } else { parameter };
        parameter.set_require_grad(learns)
    }
}

/// The nearest numbers of a type, as f32.
fn rounded<const D: usize>(values: Tensor<D>, dtype: Dtype) -> Tensor<D> {
    if dtype == Dtype::F32 && values.dtype() == DType::F32 {
        return values;
    }
    let (shape, device) = (values.dims(), values.device());
    let values: Vec<f32> = to_vec(values).into_iter().map(|value| dtype.round(value)).collect();
    Tensor::from_data(TensorData::new(values, shape), &device)
}
