//! Parts that families share.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod autoencoder_kl;
pub(crate) mod clip;
pub(crate) mod conv;
pub(crate) mod cost;
pub(crate) mod double_stream;
pub(crate) mod embedding;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod patches;
pub(crate) mod resnet;
pub(crate) mod rotary;
pub(crate) mod single_stream;
pub(crate) mod t5;
pub(crate) mod timestep;
pub(crate) mod video_autoencoder;
pub(crate) mod whole_tokenizer;
