//! What a step changes: the model, the optimiser, the averages, and where the run stands.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use fewstep_models::{Model, NamedVisitor, visit_named};

use crate::checkpoint::{Checkpoints, Progress, Snapshot};
use crate::ema::Ema;
use crate::host::{HostTensors, trainable_values, with_parameters};
use crate::method::GradientSum;
use crate::observer::{Event, Observer};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::recipe::{Recipe, ResultWeights};
use crate::{TrainError, monitor};

/// What a step changes.
pub(crate) struct State {
    /// On the autodiff side, frozen parameters without gradients.
    pub(crate) model: Model,
    optimizer: Optimizer,
    ema: Option<Ema>,
    max_spike: f64,
    /// Where the run stands.
    pub(crate) progress: Progress,
}

impl State {
    /// The state after the newest checkpoint, or the start.
    pub(crate) fn prepare(
        recipe: &Recipe,
        model: Model,
        checkpoints: &Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let found = checkpoints.load_newest()?;
        for reason in found.damaged {
            observer
                .on(Event::Message(format!("a checkpoint is damaged, taking the one before it: {reason}")));
        }
        let start = Self::new(recipe, model);
        let Some(snapshot) = found.snapshot else { return Ok(start) };
        observer.on(Event::Message(format!("continuing after step {}", snapshot.progress.step)));
        start.restore(snapshot)
    }

    /// The state before the first step.
    pub(crate) fn new(recipe: &Recipe, model: Model) -> Self {
        Self {
            optimizer: Optimizer::new(recipe),
            ema: (recipe.ema_decay > 0.0).then(|| Ema::new(recipe.ema_decay, &model)),
            max_spike: recipe.max_spike,
            progress: Progress::default(),
            model,
        }
    }

    /// The state of a checkpoint; parameters that do not learn stay as they are.
    ///
    /// # Errors
    /// If the optimiser's state is another one's.
    pub(crate) fn restore(mut self, snapshot: Snapshot<'_>) -> Result<Self, TrainError> {
        self.ema = self.ema.zip(snapshot.averages).map(|(ema, averages)| ema.with_averages(averages));
        let values = |name: &str| Some(snapshot.weights.get(name)?.values.as_slice());
        self.model = with_parameters(self.model, values);
        self.optimizer.restore(snapshot.progress.updates, snapshot.optimizer, &self.model)?;
        Ok(Self { progress: snapshot.progress, ..self })
    }

    /// Moves the weights, unless loss or gradient is not finite or a spike; returns the gradient's norm.
    pub(crate) fn update(
        mut self,
        sum: GradientSum,
        loss: f64,
        learning_rate: f64,
        observer: &mut dyn Observer,
    ) -> (Self, f64) {
        self.progress.step += 1;
        let gradients = sum.finish();
        let norm = gradient_norm(&self.model, &gradients);
        if let Some(objection) = self.progress.guard.objection(loss, norm, self.max_spike) {
            self.progress.skipped_in_a_row += 1;
            observer.on(Event::Message(format!("step {} skipped: {objection}", self.progress.step)));
            return (self, norm);
        }
        self.progress.losses.push(loss);
        self.progress.skipped_in_a_row = 0;
        self.progress.guard.moved(loss, norm);
        self.model = self.optimizer.step(self.model, gradients, norm, learning_rate);
        self.progress.updates = self.optimizer.updates;
        if let Some(ema) = &mut self.ema {
            ema.update(&self.model, self.optimizer.updates);
        }
        (self, norm)
    }

    /// The state whose weights are a run's result: this last one, or the best the monitor saw.
    ///
    /// # Errors
    /// As [`State::restore`].
    pub(crate) fn for_result(
        self,
        weights: ResultWeights,
        checkpoints: &Checkpoints,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let best = monitor::best(&self.progress.checks).map(|check| check.step);
        let Some(step) = best.filter(|step| weights == ResultWeights::Best && *step != self.progress.step)
        else {
            return Ok(self);
        };
        let (snapshot, message) = match checkpoints.load(step) {
            Ok(snapshot) => {
                (Some(snapshot), format!("the result has the weights of step {step}, the best ones"))
            }
            Err(reason) => {
                (None, format!("the best checkpoint is damaged, the result has the last weights: {reason}"))
            }
        };
        observer.on(Event::Message(message));
        match snapshot {
            Some(snapshot) => self.restore(snapshot),
            None => Ok(self),
        }
    }

    /// Everything an exact resume needs; the optimiser's state, the largest part, is lent.
    pub(crate) fn snapshot(&self) -> Snapshot<'_> {
        Snapshot {
            progress: self.progress.clone(),
            weights: trainable_values(&self.model),
            optimizer: self.optimizer.saved(),
            averages: self.ema.as_ref().map(|ema| ema.averages().clone()),
        }
    }

    /// The step size that a learning rate amounts to; another where the optimiser finds its own.
    pub(crate) fn step_size(&self, learning_rate: f64) -> f64 {
        self.optimizer.step_size(learning_rate)
    }

    /// The model on the plain side, with averaged weights where the run averages.
    pub(crate) fn averaged(&self) -> Model {
        let plain = self.model.valid();
        match &self.ema {
            Some(ema) => ema.apply(plain),
            None => plain,
        }
    }

    /// The trained parameters, averaged where the run averages.
    pub(crate) fn trained(&self) -> HostTensors {
        match &self.ema {
            Some(ema) => ema.averages().clone(),
            None => trainable_values(&self.model),
        }
    }

    /// Trained and all parameters of the model.
    pub(crate) fn count(&self) -> (usize, usize) {
        struct Count(usize, usize);
        impl NamedVisitor for Count {
            fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
                let elements = parameter.shape().num_elements();
                self.0 += if parameter.is_require_grad() { elements } else { 0 };
                self.1 += elements;
            }
        }
        let mut count = Count(0, 0);
        visit_named(&self.model, &mut count);
        (count.0, count.1)
    }
}
