//! Parts that families share.

pub(crate) mod linear;
pub(crate) mod rotary;
pub(crate) mod timestep;
