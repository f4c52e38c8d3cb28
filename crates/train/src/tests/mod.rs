//! Tests of whole runs and methods on a tiny model and pictures made here.

mod bad_input;
mod batches;
mod fixtures;
mod goldens;
mod hostile;
mod methods;
mod peer_runs;
mod runs;
mod starts;
