//! Where to compute: the CPU, or a graphics processor where the build and the machine have what it takes.
//!
//! A name such as `cuda:0` is read without touching any hardware, and opened before anything is loaded. What burn's
//! runtimes need of a machine is asked for first, since they panic where it is missing.
//!
//! The crate computes nothing and moves no tensors.

#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod name;
#[cfg(feature = "wgpu")]
mod wgpu;

pub use error::{DeviceError, NameError};
pub use name::DeviceName;
