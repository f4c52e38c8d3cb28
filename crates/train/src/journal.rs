//! `log.jsonl`: passes a run's events on to whoever started it, and writes them down.

use std::path::{Path, PathBuf};

use fewstep_report::run::{Happening, LOG_FILE, LogEntry};

use crate::log::{LogFile, LogLine, read, wall_time_secs};
use crate::memory::Memory;
use crate::monitor::Check;
use crate::observer::{Event, Observer, Started};
use crate::{Outcome, TrainError};

/// An observer in front of another one that keeps a log of what it hears.
pub(crate) struct Journal<'a> {
    observer: &'a mut dyn Observer,
    version: &'a str,
    /// The run's folder; paths in it are written as they are seen from there.
    run: PathBuf,
    /// The step that present events belong to.
    step: u64,
    file: Option<LogFile>,
    /// What was heard before the file was open.
    early: Vec<LogEntry>,
    /// Observers cannot fail, so this waits for [`Journal::check`].
    failed: Option<TrainError>,
}

impl<'a> Journal<'a> {
    /// A journal that keeps in memory what it hears until [`Journal::open`].
    pub(crate) fn new(observer: &'a mut dyn Observer, version: &'a str) -> Self {
        Self { observer, version, run: PathBuf::new(), step: 0, file: None, early: Vec::new(), failed: None }
    }

    /// Opens a run's log to continue after `step`; lines of later steps, which the run comes past again, are cut.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub(crate) fn open(&mut self, run: &Path, step: u64) -> Result<(), TrainError> {
        let path = run.join(LOG_FILE);
        let kept = up_to_step(&read(&path)?, step);
        self.file = Some(LogFile::replace(path, &kept)?);
        run.clone_into(&mut self.run);
        self.step = step;
        for entry in std::mem::take(&mut self.early) {
            self.write(&LogEntry { step, ..entry });
        }
        self.check()
    }

    /// Says which step the events to come belong to.
    pub(crate) fn begin_step(&mut self, step: u64) {
        self.step = step;
    }

    /// # Errors
    /// The first reason for which the log could not be written.
    pub(crate) fn check(&mut self) -> Result<(), TrainError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Writes down how the run ended, and its page. A page that cannot be written is told and no more: the run itself
    /// is what matters.
    pub(crate) fn end(&mut self, outcome: &Result<Outcome, TrainError>) {
        if self.file.is_none() {
            return;
        }
        match outcome {
            Ok(Outcome::Finished(_)) => {}
            Ok(Outcome::Stopped(_)) => self.record(Happening::Stopped),
            Err(error) => self.record(Happening::Failed { text: error.to_string() }),
        }
        if let Err(error) = fewstep_report::run::write_report(&self.run, wall_time_secs()) {
            self.observer.on(Event::Message(error.to_string()));
        }
    }

    fn record(&mut self, what: Happening) {
        let entry = LogEntry { what, step: self.step, time: wall_time_secs() };
        match self.file {
            Some(_) => self.write(&entry),
            None => self.early.push(entry),
        }
    }

    fn write(&mut self, entry: &LogEntry) {
        let Some(file) = &mut self.file else { return };
        let line = serde_json::to_string(entry).expect("plain fields always serialise") + "\n";
        if let Err(error) = file.append(line.as_bytes()) {
            self.failed.get_or_insert(error);
        }
    }

    /// What an event leaves in the log.
    fn happening(&self, event: &Event<'_>) -> Option<Happening> {
        let path = |path: &Path| path.strip_prefix(&self.run).unwrap_or(path).display().to_string();
        Some(match event {
            Event::Step { .. } => return None,
            Event::Started(started) => started_line(started, self.version),
            Event::Logged(line) => train_line(line),
            Event::Monitored { check, is_best } => {
                monitor_line(check, *is_best, event.sentence().unwrap_or_default())
            }
            Event::Message(text) => Happening::Message { text: text.clone() },
            Event::Checkpoint(folder) => Happening::Checkpoint { path: path(folder) },
            Event::Samples(sheet) => Happening::Samples { path: path(sheet) },
            Event::Finished(result) => Happening::Finished { path: path(result) },
        })
    }
}

impl Observer for Journal<'_> {
    fn on(&mut self, event: Event<'_>) {
        if let Some(what) = self.happening(&event) {
            self.record(what);
        }
        self.observer.on(event);
    }
}

fn started_line(started: &Started, version: &str) -> Happening {
    Happening::Started {
        total_steps: started.total_steps,
        steps_per_epoch: started.steps_per_epoch,
        rows: started.rows,
        trained_parameters: started.trained_parameters,
        parameters: started.parameters,
        version: version.to_owned(),
    }
}

fn train_line(line: &LogLine) -> Happening {
    let finite = |value: f64| value.is_finite().then_some(value);
    Happening::Train {
        epoch: line.epoch,
        loss: finite(line.loss),
        gradient_norm: finite(line.gradient_norm),
        learning_rate: line.learning_rate,
        samples_per_sec: finite(line.samples_per_sec),
        memory_bytes: Memory::of_process().map(|memory| memory.resident_bytes),
    }
}

fn monitor_line(check: &Check, is_best: bool, text: String) -> Happening {
    let &Check { step: _, paired_error, saturation_ratio, contrast_ratio, sharpness_ratio, diversity_ratio } =
        check;
    Happening::Monitor {
        paired_error,
        saturation_ratio,
        contrast_ratio,
        sharpness_ratio,
        diversity_ratio,
        is_best,
        text,
    }
}

/// The whole lines up to and including those of `last_step`.
fn up_to_step(old: &[u8], last_step: u64) -> Vec<u8> {
    #[derive(serde::Deserialize)]
    struct Step {
        step: u64,
    }
    let kept = |line: &&[u8]| {
        let step = serde_json::from_slice::<Step>(line);
        line.ends_with(b"\n") && step.is_ok_and(|line| line.step <= last_step)
    };
    old.split_inclusive(|byte| *byte == b'\n').filter(kept).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_continued_log_keeps_whole_lines_of_done_steps() {
        let line = |step: u64| format!("{{\"kind\":\"stopped\",\"step\":{step},\"time\":1.0}}\n");
        let old = [line(1), line(2), "broken\n".into(), line(3), line(2)[..10].into()].concat();
        assert_eq!(up_to_step(old.as_bytes(), 2), [line(1), line(2)].concat().as_bytes());
        assert_eq!(up_to_step(b"", 2), b"");
    }

    #[test]
    fn what_was_heard_early_is_written_once_there_is_a_file() {
        let run = tempfile::tempdir().unwrap();
        let mut observer = ();
        let mut journal = Journal::new(&mut observer, "v");
        journal.on(Event::Message("early".into()));
        journal.open(run.path(), 4).unwrap();
        journal.begin_step(5);
        journal.on(Event::Message("late".into()));
        journal.on(Event::Checkpoint(&run.path().join("checkpoints/x")));
        let check = Check {
            step: 5,
            paired_error: 0.5,
            saturation_ratio: 0.75,
            contrast_ratio: 1.25,
            sharpness_ratio: 1.5,
            diversity_ratio: None,
        };
        journal.on(Event::Monitored { check, is_best: true });
        let text = std::fs::read_to_string(run.path().join(LOG_FILE)).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let told: Vec<_> =
            lines[..3].iter().map(|line| (line["step"].as_u64(), line["text"].as_str())).collect();
        assert_eq!(told, [(Some(4), Some("early")), (Some(5), Some("late")), (Some(5), None)]);
        assert_eq!(lines[2]["path"], "checkpoints/x");
        let (look, number) = (&lines[3], |name: &str| lines[3][name].as_f64());
        assert_eq!((look["kind"].as_str(), look["step"].as_u64()), (Some("monitor"), Some(5)));
        assert_eq!((number("paired_error"), number("saturation_ratio")), (Some(0.5), Some(0.75)));
        assert_eq!((number("contrast_ratio"), number("sharpness_ratio")), (Some(1.25), Some(1.5)));
        assert_eq!(look["diversity_ratio"], serde_json::Value::Null);
        assert!(look["text"].as_str().unwrap().ends_with("(the best so far)"), "{look}");
    }
}
