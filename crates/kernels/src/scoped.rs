//! A value that a thread's operations see while something runs.

use std::cell::RefCell;
use std::thread::LocalKey;

/// Does `run` while `slot` holds `value`; gives its result and what `slot` holds then. What it held before is put back,
/// whether `run` returns or panics.
pub(crate) fn scoped<T, R>(slot: &'static LocalKey<RefCell<T>>, value: T, run: impl FnOnce() -> R) -> (R, T) {
    let mut scope = Scope { slot, before: Some(slot.replace(value)) };
    let result = run();
    let before = scope.before.take().expect("taken here alone");
    (result, slot.replace(before))
}

struct Scope<T: 'static> {
    slot: &'static LocalKey<RefCell<T>>,
    /// Until it is put back.
    before: Option<T>,
}

impl<T> Drop for Scope<T> {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.slot.set(before);
        }
    }
}
