//! A real browser without a window, for tests of pages.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names that Chromium is installed under.
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
/// Set where a missing browser is a failure, as in .ci/run.
const REQUIRED: &str = "FEWSTEP_REQUIRE_BROWSER";

/// Chromium.
pub(crate) struct Browser {
    program: PathBuf,
}

/// A page as the browser has it.
pub(crate) struct Seen {
    /// The document after its script has run, as HTML.
    pub(crate) dom: String,
    /// What the browser complained about: failed scripts, blocked sources.
    pub(crate) complaints: Vec<String>,
    picture: image::RgbImage,
}

impl Browser {
    /// The browser on the search path. Where there is none, says so past the tests' capture and returns nothing.
    ///
    /// # Panics
    /// If there is none and [`REQUIRED`] is set.
    pub(crate) fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates: Vec<PathBuf> = std::env::split_paths(&path).collect();
        let program = NAMES.iter().flat_map(|name| candidates.iter().map(move |folder| folder.join(name)));
        let found = program.into_iter().find(|program| program.is_file());
        if found.is_none() {
            let missing = format!("no browser found under {}", NAMES.join(", "));
            assert!(std::env::var_os(REQUIRED).is_none(), "{missing}; {REQUIRED} is set");
            // Unlike what eprintln! writes, this is shown although the test passes.
            let mut shown = std::io::stderr();
            writeln!(shown, "NOT TESTED: {missing}; the page is not looked at").unwrap();
        }
        found.map(|program| Self { program })
    }

    /// Opens a page in a window of 1280 × 2400 px and waits for its script.
    pub(crate) fn open(&self, url: &str) -> Seen {
        let folder = tempfile::tempdir().unwrap();
        let screenshot = folder.path().join("page.png");
        let dump = self.run(folder.path(), &["--dump-dom"], url);
        self.run(folder.path(), &[&format!("--screenshot={}", screenshot.display())], url);
        let log = String::from_utf8_lossy(&dump.stderr).into_owned();
        Seen {
            dom: String::from_utf8_lossy(&dump.stdout).into_owned(),
            complaints: log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect(),
            picture: image::open(&screenshot).unwrap_or_else(|error| panic!("{error}: {log}")).into_rgb8(),
        }
    }

    fn run(&self, folder: &Path, what: &[&str], url: &str) -> Output {
        let output = Command::new(&self.program)
            // Its sandbox does not start as root, as tests in containers run.
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
            .args(["--enable-logging=stderr", "--window-size=1280,2400", "--virtual-time-budget=4000"])
            .arg(format!("--user-data-dir={}", folder.join("profile").display()))
            .args(what)
            .arg(url)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }
}

impl Seen {
    /// Pixels of exactly this colour.
    pub(crate) fn pixels_of(&self, colour: [u8; 3]) -> usize {
        self.picture.pixels().filter(|pixel| pixel.0 == colour).count()
    }
}
