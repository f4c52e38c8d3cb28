//! Allocator settings for programs whose buffers come and go by the megabyte.

/// Keeps freed memory in the process instead of giving it back to the system after every large buffer.
///
/// Otherwise each training step faults its pages in again, which costs 10 to 25 % of it. Call this once, first thing
/// in the application. It does something with glibc only.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Buffers below this size come from the heap; glibc accepts no more than 32 MiB, larger ones are mapped.
        const MAPPED_FROM_BYTES: libc::c_int = 32 << 20;
        // SAFETY: mallopt only changes parameters of the allocator; it takes the allocator's own lock.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, MAPPED_FROM_BYTES);
        }
    }
}
