//! What a step changes: the model, the optimiser, the averages, and where the run stands.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use fewstep_models::{Model, NamedVisitor, visit_named};

use crate::TrainError;
use crate::checkpoint::{Checkpoints, Progress, Snapshot};
use crate::ema::Ema;
use crate::host::{HostTensors, trainable_values, with_parameters};
use crate::method::GradientSum;
use crate::observer::{Event, Observer};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::recipe::Recipe;

/// Steps without a finite loss and gradient after which a run gives up.
const MAX_SKIPPED_IN_A_ROW: u32 = 20;

/// What a step changes.
pub(crate) struct State {
    /// On the autodiff side, frozen parameters without gradients.
    pub(crate) model: Model,
    optimizer: Optimizer,
    ema: Option<Ema>,
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
        let mut optimizer = Optimizer::new(recipe);
        let averages = recipe.ema_decay > 0.0;
        let found = checkpoints.load_newest()?;
        for reason in found.damaged {
            observer
                .on(Event::Message(format!("a checkpoint is damaged, taking the one before it: {reason}")));
        }
        let Some(snapshot) = found.snapshot else {
            let ema = averages.then(|| Ema::new(recipe.ema_decay, &model));
            return Ok(Self { model, optimizer, ema, progress: Progress::default() });
        };
        observer.on(Event::Message(format!("continuing after step {}", snapshot.progress.step)));
        let model = with_parameters(model, |name| Some(snapshot.weights.get(name)?.values.as_slice()));
        optimizer.restore(snapshot.progress.updates, snapshot.optimizer, &model)?;
        let ema = snapshot.averages.map(|saved| Ema::from_saved(recipe.ema_decay, saved));
        Ok(Self { model, optimizer, ema, progress: snapshot.progress })
    }

    /// Moves the weights, unless loss or gradient is not finite; returns the gradient's norm.
    pub(crate) fn update(
        mut self,
        sum: GradientSum,
        loss: f64,
        learning_rate: f64,
        observer: &mut dyn Observer,
    ) -> Result<(Self, f64), TrainError> {
        self.progress.step += 1;
        let gradients = sum.finish();
        let norm = gradient_norm(&self.model, &gradients);
        if !(loss.is_finite() && norm.is_finite()) {
            self.skip(loss, norm, observer)?;
            return Ok((self, norm));
        }
        self.progress.losses.push(loss);
        self.progress.skipped_in_a_row = 0;
        self.model = self.optimizer.step(self.model, gradients, norm, learning_rate);
        self.progress.updates = self.optimizer.updates;
        if let Some(ema) = &mut self.ema {
            ema.update(&self.model, self.optimizer.updates);
        }
        Ok((self, norm))
    }

    /// Counts and reports a step without an update.
    fn skip(&mut self, loss: f64, norm: f64, observer: &mut dyn Observer) -> Result<(), TrainError> {
        self.progress.skipped_in_a_row += 1;
        let (step, times) = (self.progress.step, self.progress.skipped_in_a_row);
        observer.on(Event::Message(format!("step {step} skipped: loss {loss}, gradient norm {norm}")));
        match times >= MAX_SKIPPED_IN_A_ROW {
            true => Err(TrainError::Diverged { step, times }),
            false => Ok(()),
        }
    }

    /// A copy of everything an exact resume needs.
    pub(crate) fn snapshot(&self) -> Snapshot {
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
