//! One evaluation: its numbers, pictures and curves, and the three forms it is shown in.

use std::collections::BTreeMap;
use std::path::Path;

use fewstep_data::atomic;
use fewstep_data::image::Picture;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::charts::Chart;
use crate::{ReportError, html, table};

/// The numbers of one model with one sampler setting. `None` where a number does not apply.
///
/// A row without [`Self::latent_mse`] is a reference: nothing it can be compared with pairwise, so it takes no part in
/// naming the best value of a column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What drew the pictures.
    pub name: String,
    /// Sampling steps.
    pub num_inference_steps: usize,
    /// Guidance; 1.0 is off.
    pub cfg_scale: f64,
    /// Mean squared difference of final latents to the teacher's, same prompt and seed.
    pub latent_mse: Option<f64>,
    /// Mean peak signal-to-noise ratio to the teacher's pictures in dB, same prompt and seed.
    pub psnr_db: Option<f64>,
    /// Kernel Inception Distance to the teacher's pictures.
    pub kid_teacher: Option<f64>,
    /// Kernel Inception Distance to the real pictures.
    pub kid_real: Option<f64>,
    /// Share of pictures whose nearest reference is that of their own prompt, in [0, 1].
    pub top1: Option<f64>,
    /// Share of pictures with their own prompt's reference among the five nearest, in [0, 1].
    pub top5: Option<f64>,
    /// Wall time per picture in seconds, sampling and decoding.
    pub secs_per_image: Option<f64>,
}

/// Pictures of the same prompts and seeds by several models.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// What the rows have in common.
    pub title: String,
    /// What drew each column.
    pub columns: Vec<String>,
    /// One prompt and seed each.
    pub rows: Vec<GridRow>,
}

/// One prompt and seed, drawn by every column of a [`Grid`].
#[derive(Debug, Clone, PartialEq)]
pub struct GridRow {
    /// The prompt.
    pub prompt: String,
    /// The seed of the noise, where the row has one (a real picture has none).
    pub seed: Option<u64>,
    /// One per column; `None` leaves a gap.
    pub pictures: Vec<Option<Picture>>,
}

/// How long one stage of the run took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// What was done.
    pub name: String,
    /// Wall time in seconds.
    pub secs: f64,
}

/// Everything a report shows. Empty parts are left out of the page.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// Heading of the page.
    pub title: String,
    /// What there is to see, in the caller's words; blank lines part paragraphs.
    pub summary: String,
    /// How many prompts, pictures, … the numbers rest on.
    pub counts: BTreeMap<String, u64>,
    /// Seeds of the evaluation's noise.
    pub seeds: Vec<u64>,
    /// One per model and sampler setting, in the order shown.
    pub rows: Vec<Row>,
    /// Picture grids; in the page only.
    #[serde(skip)]
    pub grids: Vec<Grid>,
    /// Loss curves and the like.
    pub charts: Vec<Chart>,
    /// Wall time of the run's stages.
    pub stages: Vec<Stage>,
    /// Anything a reader has to know: device, commit, settings, deviations.
    pub notes: Vec<String>,
}

impl Report {
    /// Name of the file that [`Self::write_json`] is usually given.
    pub const JSON_FILE: &str = "report.json";
    /// Name of the file that [`Self::write_html`] is usually given.
    pub const HTML_FILE: &str = "report.html";

    /// Writes everything but the pictures as JSON. A number that is not finite becomes `null`.
    ///
    /// # Errors
    /// When the file cannot be written; an older one is then unchanged.
    pub fn write_json(&self, path: &Path) -> Result<(), ReportError> {
        let json = serde_json::to_value(self).expect("strings, numbers and lists always have a JSON form");
        write(path, lines(&json).as_bytes())
    }

    /// Writes the page: one file with its style, charts and pictures inside, readable offline, in light and in dark.
    ///
    /// # Errors
    /// When the file cannot be written; an older one is then unchanged.
    pub fn write_html(&self, path: &Path) -> Result<(), ReportError> {
        write(path, html::page(self).as_bytes())
    }

    /// The rows as an aligned plain-text table, the best value of each column marked with `*`.
    pub fn terminal_table(&self) -> String {
        table::plain(&self.rows)
    }
}

/// JSON with one line per key and one per element of a list, so that a row reads as a row and a curve of thousands of
/// points is one line.
fn lines(json: &Value) -> String {
    let list = |items: &Vec<Value>| {
        let items: Vec<String> = items.iter().map(|item| format!("    {item}")).collect();
        format!("[\n{}\n  ]", items.join(",\n"))
    };
    let entry = |(key, value): (&String, &Value)| match value {
        Value::Array(items) if items.iter().any(Value::is_object) => format!("  \"{key}\": {}", list(items)),
        other => format!("  \"{key}\": {other}"),
    };
    let entries: Vec<String> = json.as_object().into_iter().flatten().map(entry).collect();
    format!("{{\n{}\n}}\n", entries.join(",\n"))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    atomic::write(path, bytes).map_err(|reason| ReportError::Write { path: path.to_owned(), reason })
}
