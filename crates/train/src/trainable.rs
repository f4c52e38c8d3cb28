//! Which parameters learn: whole components, or LoRA adapters beside frozen weights.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use fewstep_models::lora::{self, LoraConfig};
use fewstep_models::{Model, NamedMapper, map_named};

use crate::TrainError;
use crate::recipe::{Recipe, Task};

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
            check("lora_base_model", base, &[model.denoiser_name().to_owned()])?;
            return Ok(Self::Lora(LoraConfig {
                rank: recipe.lora_rank,
                alpha: recipe.lora_alpha.unwrap_or(recipe.lora_rank as f64) as f32,
                target_modules: recipe.lora_target_modules.clone(),
            }));
        }
        let names = model.component_names().iter().map(|name| (*name).to_owned());
        let possible: Vec<String> = names.filter(|name| learns(name, recipe.task)).collect();
        for name in &recipe.trainable_models {
            check("trainable_models", name, &possible)?;
        }
        Ok(Self::Full(recipe.trainable_models.clone()))
    }

    /// Whether prompts must be encoded anew in each step, with a graph.
    pub fn trains_text_encoder(&self) -> bool {
        matches!(self, Self::Full(names) if names.iter().any(|name| is_text_encoder(name)))
    }

    /// Attaches adapters where asked for, freezes everything else, and moves the model to the autodiff side.
    ///
    /// Frozen parameters cost no gradient memory and no backward work.
    ///
    /// # Errors
    /// If no layer matches the LoRA targets, or the LoRA checkpoint does not fit.
    pub fn prepare(&self, model: Model, recipe: &Recipe) -> Result<Model, TrainError> {
        let model = match self {
            Self::Full(_) => model,
            Self::Lora(config) => match &recipe.lora_checkpoint {
                // A file's adapters are applied as they were trained: its scale is folded in.
                Some(path) => lora::load(model, path, 1.0)?,
                None => lora::attach(model, config, recipe.seed)?.0,
            },
        };
        Ok(map_named(model, &mut Freeze(self)).train())
    }

    /// Whether a parameter learns.
    fn includes(&self, name: &str) -> bool {
        match self {
            Self::Full(components) => {
                let component = name.split('.').next().unwrap_or_default();
                components.iter().any(|trained| trained == component)
            }
            Self::Lora(_) => name.contains(".lora."),
        }
    }
}

/// Distillation reads stored text states, and no task has a gradient for the VAE.
fn learns(component: &str, task: Task) -> bool {
    match task {
        Task::Sft => component != "vae",
        Task::DirectDistill => component != "vae" && !is_text_encoder(component),
    }
}

fn is_text_encoder(component: &str) -> bool {
    component.starts_with("text_encoder")
}

fn check(key: &'static str, found: &str, expected: &[String]) -> Result<(), TrainError> {
    match expected.iter().any(|name| name == found) {
        true => Ok(()),
        false => Err(TrainError::Component { key, found: found.to_owned(), expected: expected.to_vec() }),
    }
}

struct Freeze<'a>(&'a Trainable);

impl NamedMapper for Freeze<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.set_require_grad(self.0.includes(name))
    }
}
