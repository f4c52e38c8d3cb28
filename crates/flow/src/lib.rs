//! The mathematics of flow matching, on tensors only: the path between picture and noise, sigma schedules,
//! guidance, samplers, the gradient through a whole sampling run, and torch's random numbers.
//!
//! Nothing here knows a network, a file or a prompt: a velocity is any function of (noisy, sigma). Functions
//! take any rank whose first axis is the batch, and are plain burn operations, so a gradient flows through
//! all of them.
//!
//! # Symbols
//!
//! | symbol | name | meaning |
//! |---|---|---|
//! | x₀ | `clean` | what the model draws |
//! | e | `noise` | a standard normal sample |
//! | s, σ | `sigma` | noise level in [0, 1]; 1 is pure noise |
//! | x, x_s | `noisy`, `state` | (1 − s)·x₀ + s·e |
//! | v | `velocity` | dx/ds = e − x₀ |
//! | s_1 … s_{N+1} | `grid` ([`SigmaGrid`]) | 1 … 0 for N = `num_inference_steps` |
//! | f = e^μ | [`schedule::Shift`], [`schedule::ShiftOverride`] | how far a schedule is moved towards noise |
//! | w | `cfg_scale` | guidance; 1 is off |
//! | a | `cotangent`, `*_gradient` | derivative of the loss by a state |
//! | μ, s | `mean`, `deviation` | of the data in the Gaussian [`oracle`] |

#![forbid(unsafe_code)]

pub mod adjoint;
pub mod diffusion;
mod error;
mod grid;
pub mod guidance;
pub mod noise;
pub mod oracle;
pub mod path;
pub mod sampler;
pub mod schedule;
mod unipc;

pub use error::FlowError;
pub use grid::{MAX_STEPS, SigmaGrid};
pub use sampler::{Solver, sample, trajectory};
