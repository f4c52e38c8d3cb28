//! Threads that read ahead: decode pictures for the encoder, and fetch what batches need from files.
//!
//! What they read comes out in the order it was asked for, whoever is done first, and nothing random happens in them: no
//! result depends on their number. At most [`AHEAD`] readings per thread are under way or waiting, which bounds memory.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::TrainError;
use crate::host::HostTensor;

/// Readings under way or waiting, per thread.
const AHEAD: usize = 2;

/// Something to read.
pub(crate) type Reading = Box<dyn FnOnce() -> Result<Vec<HostTensor>, TrainError> + Send>;

type Finished = Result<Result<Vec<HostTensor>, TrainError>, Box<dyn Any + Send>>;

/// Readings and, where asked for, threads that do them. Without threads, a reading is done when its turn has come.
pub(crate) struct Workers {
    threads: Vec<JoinHandle<()>>,
    /// To the threads; closed when this value goes.
    send: Option<Sender<(u64, Reading)>>,
    receive: Receiver<(u64, Finished)>,
    /// Done before their turn.
    early: BTreeMap<u64, Finished>,
    /// Not begun, where there are no threads.
    queue: VecDeque<Reading>,
    asked: u64,
    taken: u64,
}

impl Workers {
    /// Starts so many threads.
    pub(crate) fn new(count: usize) -> Self {
        let (send, readings) = channel();
        let (finished, receive) = channel();
        let readings = Arc::new(Mutex::new(readings));
        let start = |_| {
            let (readings, finished) = (readings.clone(), finished.clone());
            thread::spawn(move || work(&readings, &finished))
        };
        Self {
            threads: (0..count).map(start).collect(),
            send: Some(send),
            receive,
            early: BTreeMap::new(),
            queue: VecDeque::new(),
            asked: 0,
            taken: 0,
        }
    }

    /// Whether another reading may be asked for now.
    pub(crate) fn has_room(&self) -> bool {
        self.asked - self.taken < (AHEAD * self.threads.len()).max(1) as u64
    }

    /// Asks for a reading.
    pub(crate) fn ask(&mut self, reading: Reading) {
        let number = self.asked;
        self.asked += 1;
        match &self.send {
            Some(send) if !self.threads.is_empty() => {
                send.send((number, reading)).expect("threads end only when this value goes");
            }
            _ => self.queue.push_back(reading),
        }
    }

    /// Asks for readings as long as there is room.
    pub(crate) fn fill(&mut self, readings: &mut dyn Iterator<Item = Reading>) {
        while self.has_room()
            && let Some(reading) = readings.next()
        {
            self.ask(reading);
        }
    }

    /// What the oldest reading not taken yet has read; waits for it.
    ///
    /// # Errors
    /// Its own.
    ///
    /// # Panics
    /// If nothing was asked for, or the reading panicked.
    pub(crate) fn take(&mut self) -> Result<Vec<HostTensor>, TrainError> {
        let number = self.taken;
        self.taken += 1;
        if let Some(reading) = self.queue.pop_front() {
            return reading();
        }
        assert!(number < self.asked, "reading {number} is taken before it is asked for");
        while !self.early.contains_key(&number) {
            let (done, read) = self.receive.recv().expect("a thread is at work on every reading asked for");
            self.early.insert(done, read);
        }
        self.early.remove(&number).expect("waited for above").unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.send = None;
        for thread in self.threads.drain(..) {
            // Readings do not unwind past `work`.
            let _ = thread.join();
        }
    }
}

/// Does readings until there will be no more, or nobody waits for them.
fn work(readings: &Mutex<Receiver<(u64, Reading)>>, finished: &Sender<(u64, Finished)>) {
    let next = || readings.lock().unwrap_or_else(PoisonError::into_inner).recv().ok();
    while let Some((number, reading)) = next() {
        let read = catch_unwind(AssertUnwindSafe(reading));
        if finished.send((number, read)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn number(number: usize) -> Vec<HostTensor> {
        vec![HostTensor { shape: vec![], values: vec![number as f32] }]
    }

    /// The first of each four takes longest, so that threads finish in another order.
    fn slow(at: usize) -> Reading {
        Box::new(move || {
            thread::sleep(Duration::from_millis(5 * (3 - at as u64 % 4)));
            Ok(number(at))
        })
    }

    #[test]
    fn readings_come_out_in_the_order_they_were_asked_for() {
        for count in [0, 1, 4] {
            let mut workers = Workers::new(count);
            let mut readings = (0..20).map(slow);
            for at in 0..20 {
                workers.fill(&mut readings);
                assert_eq!(workers.take().unwrap(), number(at), "{count} threads");
            }
            assert!(workers.has_room() && readings.next().is_none());
        }
    }

    #[test]
    fn so_many_readings_are_ahead_and_no_more() {
        let begun = Arc::new(AtomicUsize::new(0));
        for (count, ahead) in [(0, 1), (3, 6)] {
            begun.store(0, Ordering::SeqCst);
            let reading = |_| -> Reading {
                let begun = begun.clone();
                Box::new(move || {
                    begun.fetch_add(1, Ordering::SeqCst);
                    Ok(Vec::new())
                })
            };
            let mut workers = Workers::new(count);
            workers.fill(&mut (0..100).map(reading));
            assert_eq!(workers.asked, ahead);
            workers.take().unwrap();
            workers.fill(&mut (0..100).map(reading));
            assert_eq!(workers.asked, ahead + 1);
            drop(workers);
            assert!(begun.load(Ordering::SeqCst) as u64 <= ahead + 1);
        }
    }

    #[test]
    fn an_error_comes_in_its_turn() {
        let mut workers = Workers::new(2);
        let fails = || -> Reading { Box::new(|| Err(TrainError::Empty { path: "somewhere".into() })) };
        let mut readings = [slow(0), fails(), slow(2)].into_iter();
        workers.fill(&mut readings);
        assert_eq!(workers.take().unwrap(), number(0));
        assert!(matches!(workers.take(), Err(TrainError::Empty { .. })));
        assert_eq!(workers.take().unwrap(), number(2));
    }

    #[test]
    #[should_panic(expected = "a bug in a reading")]
    fn a_panic_does_not_leave_the_run_waiting() {
        let mut workers = Workers::new(2);
        workers.ask(Box::new(|| panic!("a bug in a reading")));
        let _ = workers.take();
    }
}
