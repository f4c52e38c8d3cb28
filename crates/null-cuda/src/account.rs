//! The card's memory, and what is counted.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// Of an H200.
const MEMORY_BYTES: u64 = 143_771 << 20;
/// Addresses of devices are where no host memory lies.
const FIRST_ADDRESS: u64 = 1 << 56;
/// What CUDA aligns allocations to.
const ALIGNMENT: u64 = 512;

/// What a process did with the card.
#[derive(Default)]
pub(crate) struct Account {
    blocks: HashMap<u64, u64>,
    next: u64,
    held: u64,
    peak: u64,
    pub(crate) kernels: u64,
    pub(crate) launches: u64,
    pub(crate) waits: u64,
    pub(crate) copies_up: u64,
    pub(crate) copies_down: u64,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
}

static ACCOUNT: LazyLock<Mutex<Account>> = LazyLock::new(Mutex::default);

pub(crate) fn account() -> MutexGuard<'static, Account> {
    ACCOUNT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub(crate) fn memory_bytes() -> u64 {
    setting("NULL_CUDA_MEMORY", MEMORY_BYTES)
}

impl Account {
    /// An address, or nothing where the card is full.
    pub(crate) fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        if self.held + bytes > memory_bytes() {
            return None;
        }
        let address = FIRST_ADDRESS + self.next;
        self.next += bytes;
        self.held += bytes;
        self.peak = self.peak.max(self.held);
        self.blocks.insert(address, bytes);
        Some(address)
    }

    /// False where nothing was taken there.
    pub(crate) fn give_back(&mut self, address: u64) -> bool {
        let bytes = self.blocks.remove(&address);
        self.held -= bytes.unwrap_or(0);
        bytes.is_some()
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        memory_bytes() - self.held
    }

    fn told(&self) -> String {
        format!(
            "{{\"peak_bytes\": {}, \"held_bytes\": {}, \"kernels\": {}, \"launches\": {}, \"waits\": {}, \
             \"copies_up\": {}, \"bytes_up\": {}, \"copies_down\": {}, \"bytes_down\": {}}}\n",
            self.peak,
            self.held,
            self.kernels,
            self.launches,
            self.waits,
            self.copies_up,
            self.bytes_up,
            self.copies_down,
            self.bytes_down
        )
    }
}

/// Writes what was counted where the environment wants it.
pub(crate) extern "C" fn report() {
    if let Some(path) = std::env::var_os("NULL_CUDA_REPORT") {
        // The process is ending: nobody is left to tell of an error.
        let _ = std::fs::write(path, account().told());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_held_from_taking_to_giving_back_and_the_peak_stays() {
        let mut account = Account::default();
        let [first, second] = [1, 1000].map(|bytes| account.take(bytes).unwrap());
        assert_ne!(first, second);
        assert_eq!(account.free_bytes(), memory_bytes() - 512 - 1024);
        assert!(account.give_back(first) && !account.give_back(first));
        assert_eq!((account.held, account.peak), (1024, 1536));
        assert_eq!(account.take(memory_bytes()), None);
    }
}
