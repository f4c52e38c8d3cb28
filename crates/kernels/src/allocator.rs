//! The allocator for programs whose buffers come and go by the megabyte.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which keeps freed memory in the process, on huge pages.
///
/// Otherwise each training step faults its pages in again, which costs 10 to 25 % of it, and each pass over a weight looks
/// its pages up one by one, which costs another 3 to 6 %. Both are glibc's and Linux's to give; elsewhere it is the
/// system's allocator as it is.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: fewstep_kernels::TunedAllocator = fewstep_kernels::TunedAllocator;
/// # fn main() {}
/// ```
pub struct TunedAllocator;

/// Buffers from this size on decide about the pages that they lie on.
const LARGE_BYTES: usize = 1 << 20;

// SAFETY: every block is the system's; what is done beside it moves and frees nothing.
unsafe impl GlobalAlloc for TunedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as this function's.
        large(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as this function's.
        large(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as this function's.
        large(size, || unsafe { System.realloc(block, layout, size) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as this function's.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Tunes the system before it gives a large buffer, and the pages under the buffer after.
#[inline]
fn large(bytes: usize, allocate: impl FnOnce() -> *mut u8) -> *mut u8 {
    if bytes < LARGE_BYTES {
        return allocate();
    }
    glibc::keep_freed_memory();
    let block = allocate();
    glibc::use_huge_pages(block as usize, bytes);
    block
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use std::sync::Once;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Buffers below this size come from the heap; glibc accepts no more than 32 MiB, larger ones are mapped.
    const MAPPED_FROM_BYTES: libc::c_int = 32 << 20;

    const PAGE_BYTES: usize = 4096;

    pub(super) fn keep_freed_memory() {
        static TUNED: Once = Once::new();
        TUNED.call_once(|| {
            // SAFETY: mallopt only changes parameters of the allocator; it takes the allocator's own lock.
            unsafe {
                libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
                libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
                libc::mallopt(libc::M_TOP_PAD, MAPPED_FROM_BYTES);
            }
        });
    }

    /// Asks for huge pages under a buffer, and under what the heap has grown by beyond it.
    pub(super) fn use_huge_pages(start: usize, bytes: usize) {
        /// The heap has been asked for up to here. Mapped buffers lie above it.
        static ASKED_TO: AtomicUsize = AtomicUsize::new(0);
        let end = start.saturating_add(bytes);
        if start == 0 || end <= ASKED_TO.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: an increment of 0 changes nothing.
        let heap_end = unsafe { libc::sbrk(0) } as usize;
        let end = if end <= heap_end { heap_end } else { end };
        let first = start.next_multiple_of(PAGE_BYTES);
        // SAFETY: advice about pages changes nothing that is stored in them; where it cannot be followed it is not.
        unsafe { libc::madvise(first as *mut libc::c_void, end.saturating_sub(first), libc::MADV_HUGEPAGE) };
        if end == heap_end {
            ASKED_TO.store(end, Ordering::Relaxed);
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod glibc {
    pub(super) fn keep_freed_memory() {}

    pub(super) fn use_huge_pages(_: usize, _: usize) {}
}
