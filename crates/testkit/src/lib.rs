//! Helpers of the tests in every crate: element-wise comparison, golden files, finite differences, fixed
//! random inputs, whole folders and a server of model files.
//!
//! For tests only: every failure here panics with a message, nothing returns an error.

mod compare;
mod folder;
mod golden;
mod random;
mod server;
mod tiny;

pub use compare::{assert_close, assert_tensors_close, finite_difference, values};
pub use folder::{copy_folder, folder_files};
pub use golden::{Golden, golden};
pub use random::{random, random_values};
pub use server::{Fault, ModelServer, SERVED_MODEL, ServedRequest};
pub use tiny::write_tiny_configs;
