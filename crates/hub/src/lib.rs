//! Downloads model files from Hugging Face and ModelScope into a folder of models.
//!
//! Files are named as DiffSynth-Studio names them, `owner/name:pattern` ([`Origin`]), and land where it
//! puts them, `<base>/<owner>/<name>/…`, so both programs share one folder. One small client speaks to
//! both services: each needs a listing and a file by its path, nothing more. Nothing is uploaded, and
//! only the newest revision is fetched.
//!
//! ```no_run
//! # fn main() -> Result<(), fewstep_hub::HubError> {
//! use fewstep_hub::{Hub, Origin, Settings};
//!
//! let hub = Hub::new(Settings::from_env(None)?);
//! let plan = hub.plan(&[Origin::parse("Qwen/Qwen-Image:vae/*")?])?;
//! hub.download(&plan, &mut |_| ())?;
//! # Ok(())
//! # }
//! ```

mod error;
mod http;
mod listing;
mod origin;
mod plan;
mod settings;
mod transfer;

pub use error::HubError;
pub use origin::{Need, Origin};
pub use plan::{Hub, Plan};
pub use settings::{Settings, Source};
pub use transfer::Event;
