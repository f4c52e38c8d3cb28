//! Tests of whole runs and methods on a tiny model and pictures made here.

mod bad_input;
mod batches;
mod families;
mod fixtures;
mod goldens;
mod guards;
mod hostile;
mod methods;
mod monitor;
mod optimizers;
mod peer_runs;
mod runs;
mod seen;
mod starts;
