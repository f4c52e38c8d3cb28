//! A training run as a page: what its folder holds at any moment, and the page that shows it.
//!
//! [`Run::read`] never fails: a folder may not be there yet, and the run writes while it is read. [`page()`] is the page
//! that asks a server for news, [`write_report`] the same page in one file with everything inside. Serving is the
//! application's.

mod embed;
mod fragments;
mod log;
mod monitor;
mod page;
mod samples;
mod state;
mod view;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use fewstep_data::atomic;

use crate::ReportError;
pub use log::{Happening, LOG_FILE, LogEntry};
pub use monitor::{MONITOR_FILE, MonitorLine};
pub use page::{Page, page, security_policy};
pub use samples::{
    SAMPLES_FOLDER, Sample, SampleSet, Samples, TEACHER, picture_file, picture_path, step_folder,
    step_folders,
};
pub use view::View;

/// The recipe's name inside a run folder.
pub const RECIPE_FILE: &str = "run.toml";
/// The page's name inside a run folder.
pub const REPORT_FILE: &str = "report.html";
/// Bytes read of a recipe, a monitor's table or a drawing's description.
const MAX_TEXT_BYTES: u64 = 4 << 20;

/// What a run folder holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// The folder's name.
    pub name: String,
    /// The recipe as written.
    pub recipe: String,
    /// The log's lines that can be read.
    pub log: Vec<LogEntry>,
    /// The monitor's lines.
    pub monitor: Vec<MonitorLine>,
    /// The sample pictures that are complete.
    pub samples: Samples,
}

impl Run {
    /// Reads what is there.
    pub fn read(folder: &Path) -> Self {
        let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        Self {
            name: whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned(),
            recipe: read_text(&folder.join(RECIPE_FILE)),
            log: log::read(&folder.join(LOG_FILE)),
            monitor: monitor::read(&folder.join(monitor::MONITOR_FILE)),
            samples: Samples::read(folder),
        }
    }
}

/// Writes [`REPORT_FILE`] into a run folder: the page with data and pictures inside, readable offline; returns its path.
///
/// # Errors
/// When it cannot be written; an older one is then unchanged.
pub fn write_report(folder: &Path, now: f64) -> Result<PathBuf, ReportError> {
    let view = View::alone(&Run::read(folder), folder, now);
    let path = folder.join(REPORT_FILE);
    atomic::write(&path, page(Page::Report, &view).as_bytes())
        .map_err(|reason| ReportError::Write { path: path.clone(), reason })?;
    Ok(path)
}

/// A text file that may be absent or of any size: its start, whatever of it is text.
fn read_text(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        // Half a file is shown as half a file.
        let _ = file.take(MAX_TEXT_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
