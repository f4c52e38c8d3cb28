//! AdamW over a model's trained parameters, with clipping by the global norm.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use fewstep_kernels::{AdamW, AdamWStep, Moments, squared_norm};
use fewstep_models::{Model, NamedMapper, NamedVisitor, map_named, visit_named};

use crate::host::{to_vec, with_values};
use crate::recipe::{DecayOn, Dtype, Recipe};
use crate::rounded_adamw;

/// Optimiser state: the moments of every parameter that has had a gradient, by name.
pub struct Optimizer {
    adamw: AdamW,
    decay_on: DecayOn,
    max_grad_norm: f64,
    /// Type of parameters and moments.
    numbers: Dtype,
    pub(crate) moments: BTreeMap<String, Moments>,
    /// Updates made; skipped steps do not count.
    pub(crate) updates: u64,
}

impl Optimizer {
    /// A fresh optimiser with a recipe's settings.
    pub fn new(recipe: &Recipe) -> Self {
        let adamw = AdamW {
            beta_1: recipe.adam_beta_1,
            beta_2: recipe.adam_beta_2,
            epsilon: recipe.adam_epsilon,
            weight_decay: recipe.weight_decay,
        };
        Self {
            adamw,
            decay_on: recipe.weight_decay_on,
            max_grad_norm: recipe.max_grad_norm,
            numbers: recipe.state_dtype(),
            moments: BTreeMap::new(),
            updates: 0,
        }
    }

    /// Moves every parameter that has a gradient; the others stay as they are, undecayed.
    ///
    /// Parameters are updated in their own memory, so no other handle to them (a graph, a `valid()` clone) may be
    /// alive, or each is copied.
    pub fn step(&mut self, model: Model, gradients: GradientsParams, norm: f64, learning_rate: f64) -> Model {
        self.updates += 1;
        let at = AdamWStep {
            learning_rate,
            gradient_scale: clip_scale(norm, self.max_grad_norm),
            step: self.updates,
        };
        map_named(model, &mut Update { optimizer: self, gradients, at })
    }
}

/// The norm of all gradients together.
pub fn gradient_norm(model: &Model, gradients: &GradientsParams) -> f64 {
    struct Norm<'a>(&'a GradientsParams, f64);
    impl NamedVisitor for Norm<'_> {
        fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(parameter.id) {
                self.1 += squared_norm(gradient);
            }
        }
    }
    let mut norm = Norm(gradients, 0.0);
    visit_named(model, &mut norm);
    norm.1.sqrt()
}

/// torch's `clip_grad_norm_`, its 1e-6 included; a maximum of 0 is off.
fn clip_scale(norm: f64, max_grad_norm: f64) -> f32 {
    match max_grad_norm {
        0.0 => 1.0,
        max => (max / (norm + 1e-6)).min(1.0) as f32,
    }
}

struct Update<'a> {
    optimizer: &'a mut Optimizer,
    gradients: GradientsParams,
    at: AdamWStep,
}

impl NamedMapper for Update<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove::<D>(parameter.id) else { return parameter };
        let adamw = match self.optimizer.decay_on {
            DecayOn::Matrices if D < 2 => AdamW { weight_decay: 0.0, ..self.optimizer.adamw },
            _ => self.optimizer.adamw,
        };
        let count = gradient.shape().num_elements();
        let moments = self.optimizer.moments.entry(name.to_owned()).or_insert_with(|| Moments::zeros(count));
        let (id, value, mapper) = parameter.consume();
        let value = match self.optimizer.numbers {
            Dtype::F32 => adamw.step(value.inner(), gradient, moments, self.at),
            small => rounded_step(&adamw, value.inner(), gradient, (moments, self.at, small)),
        };
        Param::from_mapped_value(id, value.autodiff().require_grad(), mapper)
    }
}

/// One step in numbers of a small type.
fn rounded_step<const D: usize>(
    adamw: &AdamW,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    (moments, at, dtype): (&mut Moments, AdamWStep, Dtype),
) -> Tensor<D> {
    let (shape, device) = (parameter.dims(), parameter.device());
    let mut values = to_vec(parameter);
    with_values(gradient, |gradient| rounded_adamw::step(adamw, &mut values, gradient, moments, (at, dtype)));
    Tensor::from_data(TensorData::new(values, shape), &device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_gradients_are_scaled_to_the_maximum_and_shorter_ones_kept() {
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert_eq!(clip_scale(1e9, 0.0), 1.0);
    }

    /// With a zero gradient only the decay moves a parameter: w ← w·(1 − rate·decay).
    #[test]
    fn matrices_decay_and_vectors_only_when_asked_for() {
        for (decay_on, expected_vector) in [(DecayOn::Matrices, 2.0), (DecayOn::All, 1.0)] {
            let recipe = Recipe { weight_decay: 5.0, weight_decay_on: decay_on, ..Recipe::default() };
            let mut optimizer = Optimizer::new(&recipe);
            let device = Default::default();
            let matrix = Param::from_tensor(Tensor::<2>::full([1, 1], 2.0, &device));
            let vector = Param::from_tensor(Tensor::<1>::full([1], 2.0, &device));
            let mut gradients = GradientsParams::new();
            gradients.register(matrix.id, Tensor::<2>::zeros([1, 1], &device));
            gradients.register(vector.id, Tensor::<1>::zeros([1], &device));
            let at = AdamWStep { learning_rate: 0.1, gradient_scale: 1.0, step: 1 };
            let mut update = Update { optimizer: &mut optimizer, gradients, at };
            assert_eq!(update.map("m", matrix).val().inner().into_scalar::<f32>(), 1.0);
            assert_eq!(update.map("v", vector).val().inner().into_scalar::<f32>(), expected_vector);
        }
    }
}
