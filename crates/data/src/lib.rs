//! From metadata files to pictures in memory.
//!
//! [`metadata`] reads rows, [`image`] loads and resizes the pictures they name as DiffSynth-Studio does, [`buckets`]
//! makes batches of one size, [`emoji`] is the data set this project ships, and [`atomic`] writes files that are never
//! half there. Latents and tensors begin one crate further on.

pub mod atomic;
pub mod buckets;
pub mod emoji;
mod error;
pub mod image;
pub mod metadata;
pub mod provenance;

pub use error::DataError;
