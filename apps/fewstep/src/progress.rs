//! What a person sees of long work: a bar on a terminal, a plain line every few seconds elsewhere.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use fewstep_train::{Event, Memory, Observer, Started};
use indicatif::{BinaryBytes, HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of work that consists of countable parts.
pub trait Progress {
    /// Work begins; `total` is the number of parts.
    fn start(&self, what: &str, total: u64);
    /// Work on so many bytes begins.
    fn start_bytes(&self, what: &str, total_bytes: u64);
    /// That many more parts are done.
    fn advance(&self, parts: u64);
    /// A sentence about the parts to come, such as the present loss.
    fn note(&self, note: &str);
    /// Work is over.
    fn finish(&self);
    /// A line of its own.
    fn say(&self, line: &str);
}

/// The process's standard error as the place for progress.
pub struct Terminal {
    quiet: bool,
    work: RefCell<Option<Work>>,
}

/// What work is counted in.
#[derive(Clone, Copy)]
enum Unit {
    Parts,
    Bytes,
}

/// The work under way.
struct Work {
    what: String,
    note: String,
    unit: Unit,
    /// Hidden where there is no terminal; it counts and estimates there too.
    bar: ProgressBar,
    last_line: Instant,
}

impl Terminal {
    /// Shows progress on standard error, or nothing at all.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, work: RefCell::new(None) }
    }
}

impl Progress for Terminal {
    fn start(&self, what: &str, total: u64) {
        self.begin(what, total, Unit::Parts);
    }

    fn start_bytes(&self, what: &str, total_bytes: u64) {
        self.begin(what, total_bytes, Unit::Bytes);
    }

    fn advance(&self, parts: u64) {
        let mut work = self.work.borrow_mut();
        let Some(work) = work.as_mut() else { return };
        work.bar.inc(parts);
        if !self.quiet && work.bar.is_hidden() && work.last_line.elapsed() >= LINE_EVERY {
            work.last_line = Instant::now();
            eprintln!("{}", work.line());
        }
    }

    fn note(&self, note: &str) {
        if let Some(work) = self.work.borrow_mut().as_mut() {
            work.bar.set_message(note.to_owned());
            note.clone_into(&mut work.note);
        }
    }

    fn finish(&self) {
        let Some(work) = self.work.borrow_mut().take() else { return };
        if !self.quiet && work.bar.is_hidden() {
            eprintln!("{}", work.line());
        }
        work.bar.finish();
    }

    fn say(&self, line: &str) {
        match self.work.borrow().as_ref() {
            _ if self.quiet => {}
            Some(work) => work.bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

impl Work {
    fn line(&self) -> String {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let (rate, left) = (self.bar.per_sec(), HumanDuration(self.bar.eta()));
        let counts = match self.unit {
            Unit::Parts => format!("{done}/{total}, {rate:.3}/s"),
            Unit::Bytes => {
                format!("{}/{}, {}/s", HumanBytes(done), HumanBytes(total), HumanBytes(rate as u64))
            }
        };
        format!("{} {counts}, {left} left {}", self.what, self.note)
    }
}

fn bar_style(unit: Unit) -> ProgressStyle {
    let template = match unit {
        Unit::Parts => "{prefix} {wide_bar} {pos}/{len} {per_sec} {eta} left {msg}",
        Unit::Bytes => "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left {msg}",
    };
    ProgressStyle::with_template(template).expect("the templates are fixed and well-formed")
}

/// Shows a training run.
pub struct TrainProgress {
    terminal: Terminal,
    /// Of the last step, once there is one.
    loss: Option<f64>,
    /// As the log last said.
    samples_per_sec: Option<f64>,
}

impl TrainProgress {
    /// Shows progress on standard error, or nothing at all.
    pub fn new(quiet: bool) -> Self {
        Self { terminal: Terminal::new(quiet), loss: None, samples_per_sec: None }
    }

    /// Ends the bar and, of a run that took steps, tells the most memory the process ever had.
    pub fn finish(&self) {
        self.terminal.finish();
        if let (Some(_), Some(memory)) = (self.loss, Memory::of_process()) {
            self.say(&format!("peak memory: {}", BinaryBytes(memory.peak_bytes)));
        }
    }

    /// Prints a line.
    pub fn say(&self, line: &str) {
        self.terminal.say(line);
    }

    /// Loss, speed and memory, behind the bar's rate and time left.
    fn note(&self) {
        let speed = self.samples_per_sec.map_or(String::new(), |rate| format!(", {rate:.1} samples/s"));
        let memory = Memory::of_process()
            .map_or(String::new(), |memory| format!(", {} memory", BinaryBytes(memory.resident_bytes)));
        let loss = self.loss.map_or(String::new(), |loss| format!("loss {loss:.4}"));
        self.terminal.note(&format!("{loss}{speed}{memory}"));
    }

    fn started(&self, started: &Started) {
        let Started { first_step, total_steps, rows, trained_parameters, parameters, .. } = started;
        self.say(&format!("training {trained_parameters} of {parameters} parameters on {rows} rows"));
        self.terminal.start("step", *total_steps);
        self.terminal.skip(*first_step);
    }
}

impl Observer for TrainProgress {
    fn on(&mut self, event: Event<'_>) {
        match &event {
            Event::Started(started) => self.started(started),
            Event::Step { loss, .. } => {
                self.loss = Some(*loss);
                self.note();
                self.terminal.advance(1);
            }
            Event::Logged(line) => {
                self.samples_per_sec = Some(line.samples_per_sec);
                self.note();
            }
            Event::Message(_) | Event::Monitored { .. } => {
                event.sentence().iter().for_each(|text| self.say(text));
            }
            Event::Samples(path) => self.say(&format!("samples: {}", path.display())),
            Event::Checkpoint(_) | Event::Finished(_) => {}
        }
    }
}

impl Terminal {
    fn begin(&self, what: &str, total: u64, unit: Unit) {
        let bar = if self.quiet || !std::io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(total).with_style(bar_style(unit))
        };
        bar.set_length(total);
        bar.set_prefix(what.to_owned());
        let (what, note) = (what.to_owned(), String::new());
        *self.work.borrow_mut() = Some(Work { what, note, unit, bar, last_line: Instant::now() });
    }

    /// Parts that earlier work did; the rate does not count them.
    fn skip(&self, parts: u64) {
        if let Some(work) = self.work.borrow().as_ref() {
            work.bar.set_position(parts);
            work.bar.reset_eta();
        }
    }
}
