//! Training: methods, optimiser, the loop around them, and runs that continue where they stopped.
//!
//! [`run`] takes a [`Recipe`] and does everything up to the trained weights in the run's folder. A method turns batches
//! into gradients ([`method`]); the trainer alone moves weights, keeps checkpoints and draws samples. Everything random
//! is a function of the position in the run, so a resumed run is bit-equal to an uninterrupted one.
//!
//! Left out: mixed precision, several devices.

#![forbid(unsafe_code)]

mod batch;
mod checkpoint;
mod dataset;
pub mod dry_run;
mod ema;
mod error;
mod exact_floats;
mod global_draws;
mod grid;
mod guard;
mod hash;
mod host;
mod journal;
mod learning_rate;
mod loader;
mod log;
mod memory;
pub mod method;
mod monitor;
mod observer;
mod optimizer;
mod output;
mod peer_output;
mod place;
mod processed;
mod provenance;
mod random;
pub mod recipe;
mod run_folder;
mod samples;
mod shelf;
mod source;
mod start_weights;
mod state;
mod tables;
mod targets;
mod tensorboard;
#[cfg(test)]
mod tests;
mod trainable;
mod trainer;
mod update;
mod workers;

pub use batch::Batch;
pub use dataset::{Dataset, Group};
pub use ema::Ema;
pub use error::TrainError;
pub use learning_rate::LearningRate;
pub use log::LogLine;
pub use memory::Memory;
pub use monitor::Check;
pub use observer::{Event, Observer, Started};
pub use optimizer::{Optimizer, gradient_norm};
pub use recipe::{Recipe, Task};
pub use trainable::Trainable;
pub use trainer::{Context, Outcome, run};
