//! What a run tells whoever started it. The library itself prints nothing.

use std::path::Path;

use crate::log::LogLine;
use crate::monitor::Check;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Everything is loaded and the first step comes next.
    Started(Started),
    /// An optimiser step is done.
    Step {
        /// Optimiser steps done, this one included.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its learning rate.
        learning_rate: f64,
        /// Samples it was trained on.
        samples: usize,
    },
    /// A line was added to the log.
    Logged(LogLine),
    /// The monitor looked at held-out prompts.
    Monitored {
        /// What it saw.
        check: Check,
        /// Whether nothing before was as good.
        is_best: bool,
    },
    /// Something worth a sentence.
    Message(String),
    /// A checkpoint is complete.
    Checkpoint(&'a Path),
    /// Sample pictures were drawn.
    Samples(&'a Path),
    /// The result is written.
    Finished(&'a Path),
}

impl Event<'_> {
    /// The sentence of a [`Event::Message`] or of a look of the monitor.
    pub fn sentence(&self) -> Option<String> {
        match self {
            Event::Message(text) => Some(text.clone()),
            Event::Monitored { check, is_best: true } => Some(format!("{check} (the best so far)")),
            Event::Monitored { check, .. } => Some(check.to_string()),
            _ => None,
        }
    }
}

/// The facts of a run before its first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Started {
    /// Optimiser steps done by earlier runs in the same folder.
    pub first_step: u64,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// Optimiser steps per epoch.
    pub steps_per_epoch: u64,
    /// Rows of the data set.
    pub rows: usize,
    /// Numbers that learn.
    pub trained_parameters: usize,
    /// Numbers in all, frozen ones included.
    pub parameters: usize,
}

/// Receives the events of a run, on the thread that trains.
pub trait Observer {
    /// Called for every event in order.
    fn on(&mut self, event: Event<'_>);
}

/// Ignores everything.
impl Observer for () {
    fn on(&mut self, _event: Event<'_>) {}
}
