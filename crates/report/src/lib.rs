//! Judging pictures and showing what a run came to.
//!
//! [`judge`] turns pictures into features, [`metrics`] compares features, latents and pixels, [`appearance`] measures
//! how pictures look, [`report`] holds one evaluation and writes it as a terminal table, `report.json` and a
//! self-contained `report.html` with [`charts`]; [`grid`] draws the contact sheets that a training leaves behind, [`run`]
//! is the page of a training. Sampling and timing are the caller's.

pub mod appearance;
pub mod charts;
pub mod error;
pub mod grid;
mod html;
pub mod judge;
pub mod metrics;
mod mobilenet;
mod product;
pub mod report;
pub mod run;
mod table;

pub use appearance::{Appearance, diversity};
pub use charts::{Chart, Curve};
pub use error::ReportError;
pub use judge::{Features, Judge};
pub use metrics::{Retrieval, kid, latent_mse, psnr_db, retrieval};
pub use report::{Grid, GridRow, Report, Row, Stage};
