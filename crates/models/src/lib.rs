//! Model families in their official folder layouts.
//!
//! A family is one folder of this crate (its transformer, text encoder, VAE, key names and sampling
//! defaults) and its lines in `model.rs`: one in [`Model`], and where that is told what family it is. Everything outside
//! this crate sees a family only through [`Model`]'s methods, [`Denoiser`] and [`Condition`]; nobody else matches on its
//! variants.

mod condition;
mod config_file;
pub mod conventions;
mod error;
mod extent;
mod family;
pub mod flux;
mod footprint;
mod load_options;
pub mod lora;
mod model;
mod model_folder;
mod named;
mod parts;
mod pipeline;
pub mod qwen_image;
mod ranges;
pub mod sampling;
mod source;
pub mod stable_diffusion;
pub mod stable_diffusion_3;
pub mod student;
mod trial;
pub mod wan;
mod weights;
pub mod z_image;

pub use condition::{Condition, PromptLength};
pub use conventions::{Conventions, DecodeRange, GuidanceRule, Peer};
pub use error::ModelError;
pub use extent::Extent;
pub use family::{AUTOENCODER, Defaults, MAX_FRAMES};
pub use footprint::{Activations, Encoding, Flops, Footprint, KeptSteps, Workload};
pub use load_options::{Components, DTYPES, LoadOptions};
pub use model::{Denoiser, Model, check_weights, expected_tensors, loaded_components};
pub use named::{NamedMapper, NamedVisitor, map_named, visit_named};
pub use parts::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig, Posterior};
pub use parts::clip::{ClipStates, ClipTextConfig, ClipTextEncoder, ClipTokenizer};
pub use parts::linear::{Linear, LowRankAdapter};
pub use parts::t5::{T5Config, T5Encoder, T5Tokenizer, T5Tokens};
pub use parts::video_autoencoder::{VideoAutoencoder, VideoAutoencoderConfig};
pub use pipeline::{Generated, LoraFile, Pipeline, PipelineOptions, Request};
pub use source::ModelSource;
pub use student::Student;
pub use trial::{trial_classes, write_random_weights, write_trial_model};
pub use weights::{
    Numbers, TensorEntry, TensorShapes, WeightFiles, WeightType, read_info, read_numbers, save_numbers,
    save_streamed, save_tensors, weights_hash,
};
