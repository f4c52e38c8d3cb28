//! All cores for the pieces of one operation.
//!
//! A training step is thousands of operations of tens of microseconds, one after the other. Threads that sleep between
//! two of them take about as long to wake as the operation takes them; the helpers here stay awake for a moment.

use std::any::Any;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a helper waits for the next job before it sleeps: longer than what lies between two operations of a step.
const AWAKE: Duration = Duration::from_micros(200);

/// Looks at what is waited for between two looks at the clock, or two offers to let another thread run.
const LOOKS: usize = 256;

/// Times that each thread comes for more, where pieces are many: the more, the more evenly all end.
const TURNS: usize = 16;

/// Calls `work` for every index below `count`, on all cores, and returns when all are done.
///
/// One thread has the helpers at a time: one that comes meanwhile, or from inside of `work`, does its work alone, as does
/// one in a rayon pool of one thread.
///
/// # Panics
/// Where `work` does, with its payload; the other indices may then be left out.
pub(super) fn for_each_index(count: usize, work: &(dyn Fn(usize) + Sync)) {
    let threads = rayon::current_num_threads();
    if count <= 1 || threads <= 1 {
        return (0..count).for_each(work);
    }
    static POOL: OnceLock<Pool> = OnceLock::new();
    let pool = POOL.get_or_init(|| Pool::start(threads - 1));
    if pool.taken.swap(true, Ordering::Acquire) {
        return (0..count).for_each(work);
    }
    let panic = pool.share_out(Job::new(count, threads, work));
    pool.taken.store(false, Ordering::Release);
    if let Some(payload) = panic {
        resume_unwind(payload);
    }
}

/// The helpers, which live as long as the process.
struct Pool {
    /// Whether a thread has the helpers.
    taken: AtomicBool,
    helpers: &'static [Helper],
    post: &'static Post,
}

/// Where the helpers find their work.
#[derive(Default)]
struct Post {
    /// Jobs so far.
    count: AtomicUsize,
    /// The job that may be joined, null where there is none.
    job: AtomicPtr<Job<'static>>,
    /// Helpers that may have found the job.
    inside: AtomicUsize,
}

#[derive(Default)]
struct Helper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Pool {
    /// Where the system gives no more threads, those it gave help.
    fn start(helpers: usize) -> Self {
        let helpers: Vec<Helper> = (0..helpers).map(|_| Helper::default()).collect();
        let (helpers, post): (&'static [Helper], &'static Post) = (helpers.leak(), Box::leak(Box::default()));
        for (index, helper) in helpers.iter().enumerate() {
            let builder = thread::Builder::new().name(format!("kernel helper {index}"));
            if let Ok(handle) = builder.spawn(|| helper.help(post)) {
                helper.thread.set(handle.thread().clone()).expect("each helper is started once");
            }
        }
        Self { taken: AtomicBool::new(false), helpers, post }
    }

    /// Does a job with the helpers; gives the first panic's payload.
    fn share_out(&self, job: Job<'_>) -> Option<Box<dyn Any + Send>> {
        let post = self.post;
        post.job.store(ptr::from_ref(&job).cast_mut().cast(), Ordering::SeqCst);
        post.count.fetch_add(1, Ordering::SeqCst);
        for helper in self.helpers {
            if helper.asleep.swap(false, Ordering::SeqCst)
                && let Some(thread) = helper.thread.get()
            {
                thread.unpark();
            }
        }
        job.work();
        post.job.store(ptr::null_mut(), Ordering::SeqCst);
        // Of two threads, one that announces itself and then looks for the job, and this one, which takes the job away and
        // then looks who announced himself, at least one sees the other.
        let mut looks = 0_usize;
        while post.inside.load(Ordering::SeqCst) > 0 {
            looks += 1;
            if looks.is_multiple_of(LOOKS) { thread::yield_now() } else { spin_loop() }
        }
        job.panic.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Helper {
    fn help(&self, post: &Post) {
        let mut seen = 0;
        loop {
            seen = self.next(post, seen);
            post.inside.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the job is on the stack of a thread that takes the pointer away and then waits until nobody is inside
            // before it returns; it is only read.
            if let Some(job) = unsafe { post.job.load(Ordering::SeqCst).as_ref() } {
                job.work();
            }
            post.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for another job than the last that was seen.
    fn next(&self, post: &Post, seen: usize) -> usize {
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                let count = post.count.load(Ordering::SeqCst);
                if count != seen {
                    return count;
                }
                spin_loop();
            }
            if start.elapsed() < AWAKE {
                continue;
            }
            self.asleep.store(true, Ordering::SeqCst);
            // A job that came before the line above woke nobody.
            if post.count.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }
}

/// Pieces of work, and how many of them have been begun.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    count: usize,
    /// Indices that a thread takes at one time.
    turn: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Job<'a> {
    fn new(count: usize, threads: usize, work: &'a (dyn Fn(usize) + Sync)) -> Self {
        let turn = (count / (threads * TURNS)).max(1);
        Self { work, count, turn, next: AtomicUsize::new(0), panic: Mutex::new(None) }
    }

    fn work(&self) {
        let turns = || {
            loop {
                let first = self.next.fetch_add(self.turn, Ordering::Relaxed);
                if first >= self.count {
                    return;
                }
                (first..self.count.min(first + self.turn)).for_each(self.work);
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(turns)) {
            self.next.store(self.count, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn counted(count: usize, share: impl FnOnce(&(dyn Fn(usize) + Sync))) -> Vec<u32> {
        let calls: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
        share(&|index| {
            calls[index].fetch_add(1, Ordering::Relaxed);
        });
        calls.into_iter().map(AtomicU32::into_inner).collect()
    }

    #[test]
    fn every_index_comes_once_whatever_the_number_of_helpers_and_turns() {
        for helpers in [0, 1, 3] {
            let pool = Pool::start(helpers);
            for count in [0, 1, 2, 7, 1000] {
                let calls = counted(count, |work| {
                    assert!(pool.share_out(Job::new(count, helpers + 1, work)).is_none())
                });
                assert_eq!(calls, vec![1; count], "{helpers} helpers");
            }
        }
    }

    #[test]
    fn a_helper_works_beside_the_caller_even_after_it_slept() {
        let pool = Pool::start(1);
        for _ in 0..3 {
            let both = Barrier::new(2);
            let work = |_| {
                both.wait();
            };
            assert!(pool.share_out(Job::new(2, 2, &work)).is_none());
            while !pool.helpers[0].asleep.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn work_inside_of_work_and_from_many_threads_is_all_done() {
        let calls = counted(64, |work| {
            thread::scope(|scope| {
                for first in [0, 16, 32, 48] {
                    scope.spawn(move || {
                        for_each_index(4, &|outer| {
                            for_each_index(4, &|inner| work(first + 4 * outer + inner));
                        });
                    });
                }
            });
        });
        assert_eq!(calls, [1; 64]);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_helpers_live_on() {
        let pool = Pool::start(2);
        let payload = pool.share_out(Job::new(100, 3, &|index| assert_ne!(index, 41, "no such index")));
        let payload = payload.expect("one index panicked");
        assert!(payload.downcast_ref::<String>().is_some_and(|text| text.contains("no such index")));
        let calls = counted(100, |work| assert!(pool.share_out(Job::new(100, 3, work)).is_none()));
        assert_eq!(calls, [1; 100]);
    }
}
