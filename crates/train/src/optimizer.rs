//! An optimiser over a model's trained parameters, with clipping by the global norm.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use fewstep_kernels::{SquaredNorm, with_values};
use fewstep_models::{Model, NamedMapper, NamedVisitor, Numbers, map_named, visit_named};

use crate::TrainError;
use crate::recipe::{DecayOn, Recipe};
use crate::update::{self, Estimate, Fraction, Kind, Memory, Prodigy, Rule, SavedState, Step};

/// A rule and what it remembers of every parameter that has had a gradient, by name.
pub struct Optimizer {
    rule: Rule,
    weight_decay: f64,
    decay_on: DecayOn,
    max_grad_norm: f64,
    memories: BTreeMap<String, Memory>,
    /// Updates made; skipped steps do not count.
    pub(crate) updates: u64,
}

/// Prodigy's estimate in a saved state.
const ESTIMATE: &str = "estimate";

impl Optimizer {
    /// A fresh optimiser with a recipe's settings.
    pub fn new(recipe: &Recipe) -> Self {
        Self {
            rule: Rule::new(recipe),
            weight_decay: recipe.weight_decay,
            decay_on: recipe.weight_decay_on,
            max_grad_norm: recipe.max_grad_norm,
            memories: BTreeMap::new(),
            updates: 0,
        }
    }

    /// Moves every parameter that has a gradient; the others stay as they are, undecayed.
    ///
    /// Parameters are updated in their own memory, so no other handle to them (a graph, a `valid()` clone) may be
    /// alive, or each is copied.
    pub fn step(&mut self, model: Model, gradients: GradientsParams, norm: f64, learning_rate: f64) -> Model {
        self.updates += 1;
        let at = Step {
            learning_rate,
            gradient_scale: clip_scale(norm, self.max_grad_norm),
            number: self.updates,
            weight_decay: self.weight_decay,
        };
        if let Rule::Prodigy(prodigy) = &mut self.rule {
            estimate(prodigy, &mut self.memories, (&model, &gradients), &at);
        }
        let tables = model.tables();
        map_named(model, &mut Update { optimizer: self, gradients, at, tables })
    }

    /// The step size that a learning rate amounts to.
    pub(crate) fn step_size(&self, learning_rate: f64) -> f64 {
        match &self.rule {
            Rule::Prodigy(prodigy) => prodigy.estimate.distance * learning_rate,
            _ => learning_rate,
        }
    }

    /// The state, for a checkpoint.
    pub(crate) fn saved(&self) -> SavedState<'_> {
        let mut saved = update::save(&self.memories);
        if let Rule::Prodigy(Prodigy { estimate, .. }) = &self.rule {
            let Estimate { distance, largest, numerator } = *estimate;
            saved.insert(ESTIMATE.to_owned(), Numbers::F64(vec![distance, largest, numerator].into()));
        }
        saved
    }

    /// Continues from a saved state after this many updates.
    ///
    /// # Errors
    /// If it is another optimiser's, or that of another model.
    pub(crate) fn restore(
        &mut self,
        updates: u64,
        mut saved: SavedState<'_>,
        model: &Model,
    ) -> Result<(), TrainError> {
        let foreign = |name: &str| TrainError::OptimizerState { name: name.to_owned() };
        if let Rule::Prodigy(prodigy) = &mut self.rule {
            let Some(Numbers::F64(numbers)) = saved.remove(ESTIMATE) else { return Err(foreign(ESTIMATE)) };
            let [distance, largest, numerator] = numbers[..] else { return Err(foreign(ESTIMATE)) };
            prodigy.estimate = Estimate { distance, largest, numerator };
        }
        self.memories = update::restore(saved).map_err(|name| foreign(&name))?;
        match unfit(&self.rule, &self.memories, model) {
            Some(name) => Err(foreign(&name)),
            None => {
                self.updates = updates;
                Ok(())
            }
        }
    }
}

/// The first memory that is not one of this rule for a parameter that learns.
fn unfit(rule: &Rule, memories: &BTreeMap<String, Memory>, model: &Model) -> Option<String> {
    struct Fitting<'a> {
        rule: &'a Rule,
        memories: &'a BTreeMap<String, Memory>,
        tables: &'static [&'static str],
        fits: BTreeSet<String>,
    }
    impl NamedVisitor for Fitting<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let Some(memory) = self.memories.get(name) else { return };
            let fresh = self.rule.fresh(&parameter.val(), kind::<D>(name, self.tables));
            if parameter.is_require_grad() && memory.is_like(&fresh) {
                self.fits.insert(name.to_owned());
            }
        }
    }
    let mut fitting = Fitting { rule, memories, tables: model.tables(), fits: BTreeSet::new() };
    visit_named(model, &mut fitting);
    memories.keys().find(|name| !fitting.fits.contains(*name)).cloned()
}

fn kind<const D: usize>(name: &str, tables: &[&str]) -> Kind {
    if D == 2 && !tables.contains(&name) { Kind::Matrix } else { Kind::Other }
}

/// The first half of Prodigy's step, over all parameters.
fn estimate(
    prodigy: &mut Prodigy,
    memories: &mut BTreeMap<String, Memory>,
    (model, gradients): (&Model, &GradientsParams),
    at: &Step,
) {
    struct TakeIn<'a> {
        prodigy: &'a Prodigy,
        memories: &'a mut BTreeMap<String, Memory>,
        gradients: &'a GradientsParams,
        at: &'a Step,
        total: Fraction,
    }
    impl NamedVisitor for TakeIn<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let Some(gradient) = self.gradients.get::<D>(parameter.id) else { return };
            self.total += with_values(parameter.val(), |parameter| {
                let memory = self.memories.entry(name.to_owned());
                let travelled = memory.or_insert_with(|| Memory::travelled(parameter)).as_travelled();
                with_values(gradient, |gradient| {
                    self.prodigy.take_in(parameter, gradient, travelled, self.at)
                })
            });
        }
    }
    let mut taken = TakeIn { prodigy, memories, gradients, at, total: Fraction::default() };
    visit_named(model, &mut taken);
    let total = taken.total;
    prodigy.advance(total, at);
}

/// The norm of all gradients together; from a GPU it is read back once.
pub fn gradient_norm(model: &Model, gradients: &GradientsParams) -> f64 {
    struct Norm<'a>(&'a GradientsParams, SquaredNorm);
    impl NamedVisitor for Norm<'_> {
        fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(parameter.id) {
                self.1.add(gradient);
            }
        }
    }
    let mut norm = Norm(gradients, SquaredNorm::default());
    visit_named(model, &mut norm);
    norm.1.total().sqrt()
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
    at: Step,
    tables: &'static [&'static str],
}

impl NamedMapper for Update<'_> {
    fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.gradients.remove::<D>(parameter.id) else { return parameter };
        let Optimizer { rule, memories, decay_on, .. } = &mut *self.optimizer;
        let kind = kind::<D>(name, self.tables);
        let at = match decay_on {
            DecayOn::Matrices if D < 2 => Step { weight_decay: 0.0, ..self.at },
            _ => self.at,
        };
        let (id, value, mapper) = parameter.consume();
        let value = value.inner();
        if !memories.contains_key(name) {
            memories.insert(name.to_owned(), rule.fresh(&value, kind));
        }
        let memory = memories.get_mut(name).expect("put there above");
        let value = rule.apply(value, gradient, memory, &at);
        Param::from_mapped_value(id, value.autodiff().require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::OptimizerName;

    #[test]
    fn longer_gradients_are_scaled_to_the_maximum_and_shorter_ones_kept() {
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert_eq!(clip_scale(1e9, 0.0), 1.0);
    }

    /// With a zero gradient only the decay moves a parameter: w ← w·(1 − rate·decay).
    #[test]
    fn matrices_decay_and_vectors_only_when_asked_for() {
        use OptimizerName::{Adafactor, Adamw, Adamw8bit, Muon};
        let cases = [Adamw, Adamw8bit, Adafactor, Muon]
            .into_iter()
            .flat_map(|optimizer| [(optimizer, DecayOn::Matrices, 2.0), (optimizer, DecayOn::All, 1.0)]);
        for (optimizer, weight_decay_on, expected_vector) in cases {
            let recipe = Recipe { optimizer, weight_decay: 5.0, weight_decay_on, ..Recipe::default() };
            let mut optimizer = Optimizer::new(&recipe);
            let device = Default::default();
            let matrix = Param::from_tensor(Tensor::<2>::full([1, 1], 2.0, &device));
            let vector = Param::from_tensor(Tensor::<1>::full([1], 2.0, &device));
            let mut gradients = GradientsParams::new();
            gradients.register(matrix.id, Tensor::<2>::zeros([1, 1], &device));
            gradients.register(vector.id, Tensor::<1>::zeros([1], &device));
            let at = Step { learning_rate: 0.1, gradient_scale: 1.0, number: 1, weight_decay: 5.0 };
            let mut update = Update { optimizer: &mut optimizer, gradients, at, tables: &[] };
            assert_eq!(update.map("m", matrix).val().inner().into_scalar::<f32>(), 1.0);
            assert_eq!(update.map("v", vector).val().inner().into_scalar::<f32>(), expected_vector);
        }
    }
}
