//! From metadata files to pictures and videos in memory.
//!
//! [`metadata`] reads rows, [`image`] loads and resizes the pictures they name as DiffSynth-Studio does and [`video`] the
//! videos, [`buckets`] makes batches of one size, [`emoji`] is the data set this project ships, [`atomic`] writes files that are never half
//! there, and [`bounded`] reads no more than a file should hold. Latents and tensors begin one crate further on.

pub mod atomic;
pub mod bounded;
pub mod buckets;
pub mod disk;
pub mod emoji;
mod error;
pub mod image;
mod inside;
pub mod metadata;
pub mod provenance;
mod unchanged;
pub mod video;

pub use error::DataError;
pub use inside::check_inside;
pub use unchanged::refuse_changes;
