//! Where a run stands, from its log.

use super::log::{Happening, LogEntry};

/// Lines of the log that the speed is measured over.
const RATE_LINES: usize = 20;
/// A run is taken to be slow or dead after so many of its usual pauses between lines …
const QUIET_PAUSES: f64 = 5.0;
/// … and no earlier than this.
const QUIET_SECS: f64 = 120.0;

/// What a run is doing.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Status {
    /// Nothing of it is there yet.
    Waiting,
    /// Its log grows.
    Running,
    /// Its log has not grown for so many seconds.
    Quiet(f64),
    /// It is done.
    Finished,
    /// It was stopped.
    Stopped,
    /// It ended by this error.
    Failed(String),
}

/// Where a run stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct State {
    pub(super) status: Status,
    /// Optimiser steps done.
    pub(super) step: u64,
    /// Optimiser steps of the whole run, where it has begun.
    pub(super) total_steps: Option<u64>,
    /// Optimiser steps per second.
    pub(super) steps_per_sec: Option<f64>,
    /// When its log last grew, in Unix seconds.
    pub(super) last_time: Option<f64>,
}

impl State {
    /// The state at a time.
    pub(super) fn of(log: &[LogEntry], now: f64) -> Self {
        let started = log.iter().rposition(|entry| matches!(entry.what, Happening::Started { .. }));
        let session = &log[started.unwrap_or(0)..];
        let total_steps = started.and_then(|at| match log[at].what {
            Happening::Started { total_steps, .. } => Some(total_steps),
            _ => None,
        });
        let steps_per_sec = steps_per_sec(session);
        Self {
            status: status(log, session, now),
            step: log.iter().map(|entry| entry.step).max().unwrap_or(0),
            total_steps,
            steps_per_sec,
            last_time: log.last().map(|entry| entry.time),
        }
    }

    /// Seconds left while the run goes on.
    pub(super) fn secs_left(&self) -> Option<f64> {
        let left = self.total_steps?.saturating_sub(self.step) as f64;
        (self.status == Status::Running).then_some(left / self.steps_per_sec?)
    }
}

fn status(log: &[LogEntry], session: &[LogEntry], now: f64) -> Status {
    let Some(last) = log.last() else { return Status::Waiting };
    match &last.what {
        Happening::Finished { .. } => return Status::Finished,
        Happening::Stopped => return Status::Stopped,
        Happening::Failed { text } => return Status::Failed(text.clone()),
        _ => {}
    }
    let pauses = session.windows(2).rev().take(RATE_LINES).map(|pair| pair[1].time - pair[0].time);
    let patience = QUIET_PAUSES * pauses.fold(0.0, f64::max);
    let quiet = now - last.time;
    if quiet > patience.max(QUIET_SECS) { Status::Quiet(quiet) } else { Status::Running }
}

/// Over the last lines of the session, or from its start where it is young.
fn steps_per_sec(session: &[LogEntry]) -> Option<f64> {
    let timed = |entry: &&LogEntry| matches!(entry.what, Happening::Train { .. } | Happening::Started { .. });
    let last: Vec<&LogEntry> = session.iter().rev().filter(timed).take(RATE_LINES).collect();
    let (newest, oldest) = (last.first()?, last.last()?);
    let secs = newest.time - oldest.time;
    (secs > 0.0 && newest.step > oldest.step).then(|| (newest.step - oldest.step) as f64 / secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(what: Happening, step: u64, time: f64) -> LogEntry {
        LogEntry { what, step, time }
    }

    fn started(step: u64, time: f64) -> LogEntry {
        let what = Happening::Started {
            total_steps: 100,
            steps_per_epoch: 10,
            rows: 20,
            trained_parameters: 1,
            parameters: 2,
            version: "v".into(),
        };
        entry(what, step, time)
    }

    fn train(step: u64, time: f64) -> LogEntry {
        let what = Happening::Train {
            epoch: 0,
            loss: Some(1.0),
            gradient_norm: None,
            learning_rate: 1.0,
            samples_per_sec: None,
            memory_bytes: None,
        };
        entry(what, step, time)
    }

    #[test]
    fn the_rate_counts_only_the_present_session() {
        let log =
            [started(0, 0.0), train(10, 10.0), started(10, 1000.0), train(20, 1005.0), train(30, 1010.0)];
        let state = State::of(&log, 1011.0);
        assert_eq!((state.status.clone(), state.step), (Status::Running, 30));
        assert_eq!(state.steps_per_sec, Some(2.0));
        assert_eq!(state.secs_left(), Some(35.0));
    }

    #[test]
    fn silence_beyond_the_usual_pause_is_told_and_an_end_is_not_silence() {
        let slow = [started(0, 0.0), train(1, 300.0), train(2, 600.0)];
        assert_eq!(State::of(&slow, 1500.0).status, Status::Running);
        assert_eq!(State::of(&slow, 2200.0).status, Status::Quiet(1600.0));
        let fast = [started(0, 0.0), train(1, 1.0), train(2, 2.0)];
        assert_eq!(State::of(&fast, 100.0).status, Status::Running);
        assert_eq!(State::of(&fast, 130.0).status, Status::Quiet(128.0));
        let ended = [started(0, 0.0), train(1, 1.0), entry(Happening::Stopped, 1, 1.0)];
        assert_eq!(State::of(&ended, 1e9).status, Status::Stopped);
        assert_eq!(State::of(&ended, 1e9).secs_left(), None);
        assert_eq!(State::of(&[], 5.0).status, Status::Waiting);
    }
}
