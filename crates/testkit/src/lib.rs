//! Helpers of the tests in every crate: element-wise comparison, golden files, finite differences and fixed
//! random inputs.
//!
//! For tests only: every failure here panics with a message, nothing returns an error.

mod compare;
mod golden;
mod random;
mod tiny;

pub use compare::{assert_close, assert_tensors_close, finite_difference, values};
pub use golden::{Golden, golden};
pub use random::{random, random_values};
pub use tiny::write_tiny_configs;
