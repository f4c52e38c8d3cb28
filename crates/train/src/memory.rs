//! The memory of the process, as the system counts it.

use std::fs;

/// Resident memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Now, in bytes.
    pub resident_bytes: u64,
    /// The most there ever was, in bytes.
    pub peak_bytes: u64,
}

impl Memory {
    /// Asks the system; `None` where there is no `/proc`, so on anything but Linux.
    pub fn of_process() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
            Some(1024 * kibibytes)
        };
        Some(Self { resident_bytes: bytes("VmRSS:")?, peak_bytes: bytes("VmHWM:")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_file_is_in_kibibytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t     100 kB\nThreads:\t1\n";
        assert_eq!(Memory::parse(status), Some(Memory { resident_bytes: 100 << 10, peak_bytes: 2 << 20 }));
        assert_eq!(Memory::parse("VmRSS:\tmany\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_is_used_is_counted() {
        let before = Memory::of_process().unwrap().resident_bytes;
        let used = std::hint::black_box(vec![1u8; 64 << 20]);
        let memory = Memory::of_process().unwrap();
        // Other tests allocate and free meanwhile, so only most of it is asked for.
        assert!(memory.resident_bytes > before + (32 << 20), "{before} bytes before, then {memory:?}");
        assert!(memory.peak_bytes >= memory.resident_bytes);
        drop(used);
    }
}
