//! Stable Diffusion 1 and 2 (arXiv 2112.10752) and SDXL (arXiv 2307.01952): a UNet over latents, conditioned on the
//! states of CLIP's text encoders. It was trained to predict noise.

mod config;
mod spatial_transformer;
mod unet;

pub use config::UnetConfig;
pub use unet::{AddedCondition, Unet, UnetCondition};
