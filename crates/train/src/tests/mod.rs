//! Tests of whole runs and methods on a tiny model and pictures made here.

mod bad_input;
mod fixtures;
mod goldens;
mod methods;
mod optimizers;
mod peer_runs;
mod runs;
mod starts;
