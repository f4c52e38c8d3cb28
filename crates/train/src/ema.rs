//! The running average of the weights: what samples and results are made with.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::Tensor;
use fewstep_kernels::lerp_in_place;
use fewstep_models::{Model, NamedVisitor, visit_named};

use crate::host::{HostTensor, HostTensors, trainable_values, with_parameters, with_values};

/// Exponential moving average of the trained parameters, by name, in f32.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    averages: HostTensors,
}

impl Ema {
    /// Starts from the present weights.
    pub fn new(decay: f64, model: &Model) -> Self {
        Self { decay, averages: trainable_values(model) }
    }

    /// Continues from saved averages.
    pub(crate) fn with_averages(self, averages: HostTensors) -> Self {
        Self { averages, ..self }
    }

    /// The averages, for saving.
    pub(crate) fn averages(&self) -> &HostTensors {
        &self.averages
    }

    /// Takes in the weights after optimiser step `step`, counted from 1: average ← decay·average + (1 − decay)·weight.
    pub fn update(&mut self, model: &Model, step: u64) {
        let weight = (1.0 - effective_decay(self.decay, step)) as f32;
        visit_named(model, &mut Update { averages: &mut self.averages, weight });
    }

    /// The model with the averages in place of its trained parameters.
    pub fn apply(&self, model: Model) -> Model {
        with_parameters(model, |name| Some(self.averages.get(name)?.values.as_slice()))
    }
}

/// The decay grows from 2/11 as (1 + step) / (10 + step), so that early averages forget the start
/// (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
fn effective_decay(decay: f64, step: u64) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

struct Update<'a> {
    averages: &'a mut BTreeMap<String, HostTensor>,
    weight: f32,
}

impl NamedVisitor for Update<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        if let Some(average) = self.averages.get_mut(name) {
            with_values(parameter.val(), |values| lerp_in_place(&mut average.values, values, self.weight));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decay_grows_to_the_one_asked_for() {
        assert!((effective_decay(0.9, 1) - 2.0 / 11.0).abs() < 1e-12);
        assert!((effective_decay(0.9, 10) - 11.0 / 20.0).abs() < 1e-12);
        assert_eq!(effective_decay(0.9, 1000), 0.9);
    }

    #[test]
    fn an_average_moves_towards_the_weight_by_one_minus_the_decay() {
        let mut average = HostTensor { shape: vec![2], values: vec![1.0, -2.0] };
        let parameter = Param::from_tensor(Tensor::<1>::from_floats([3.0, 2.0], &Default::default()));
        let mut averages = BTreeMap::from([("w".to_owned(), average.clone())]);
        Update { averages: &mut averages, weight: 0.25 }.visit("w", &parameter);
        average.values = vec![1.5, -1.0];
        assert_eq!(averages["w"], average);
    }
}
