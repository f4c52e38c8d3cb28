//! What Ctrl-C and its kin do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};

use crate::INTERRUPTED;

/// Takes the signals that ask a process to end. They end it at once, except during work that finishes its step first.
pub struct Interrupts(Arc<Flags>);

#[derive(Default)]
struct Flags {
    /// The work that runs looks at `stop`.
    is_polled: AtomicBool,
    stop: AtomicBool,
}

impl Interrupts {
    /// # Errors
    /// If the handler cannot be installed.
    pub fn take() -> Result<Self> {
        let flags = Arc::new(Flags::default());
        let handled = flags.clone();
        let handler = move || {
            if !handled.is_polled.load(Ordering::SeqCst) || handled.stop.swap(true, Ordering::SeqCst) {
                eprintln!("interrupted; the same command continues");
                std::process::exit(INTERRUPTED.into());
            }
        };
        ctrlc::set_handler(handler).context("cannot listen for Ctrl-C")?;
        Ok(Self(flags))
    }

    /// Does work that ends soon after its flag is set, which the first signal does; the second ends the process.
    pub fn during<T>(&self, work: impl FnOnce(&AtomicBool) -> T) -> T {
        self.0.is_polled.store(true, Ordering::SeqCst);
        let result = work(&self.0.stop);
        self.0.is_polled.store(false, Ordering::SeqCst);
        result
    }
}
