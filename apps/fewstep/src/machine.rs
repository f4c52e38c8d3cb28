//! What the machine has, as the system tells it: memory, disk, and how fast it multiplies.
//!
//! What a system does not tell is absent.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use fewstep_kernels::{Projection, linear};

/// Memory this process has now.
pub fn resident_bytes() -> Option<u64> {
    kib_field(Path::new("/proc/self/status"), "VmRSS:")
}

/// Memory that programs can still get, by the system as a whole and by the limit of this process's group.
pub fn free_memory_bytes() -> Option<u64> {
    let system = kib_field(Path::new("/proc/meminfo"), "MemAvailable:");
    system.into_iter().chain(free_in_group()).min()
}

/// Space that is free where a file or folder is, or would be created.
pub fn free_disk_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(existing(path).as_path()).ok()?;
        Some(found.f_bavail * found.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// The folder in which a path would be created, where nothing may be written there.
pub fn unwritable(path: &Path) -> Option<PathBuf> {
    let folder = existing(path);
    #[cfg(unix)]
    let writable =
        folder.is_dir() && rustix::fs::access(folder.as_path(), rustix::fs::Access::WRITE_OK).is_ok();
    #[cfg(not(unix))]
    let writable = folder.is_dir();
    (!writable).then_some(folder)
}

/// Memory this process has after a small forward and backward: with the code of a run, the threads' stacks, and what
/// the allocator keeps.
pub fn computing_bytes() -> Option<u64> {
    const SIZE: usize = 512;
    let device = Device::flex().autodiff();
    let weight = Tensor::<2>::ones([SIZE, SIZE], &device).require_grad();
    let projection = Projection { weight, bias: None, low_rank: None, rounded_to: None };
    drop(linear(Tensor::<2>::ones([SIZE, SIZE], &device), projection).square().sum().backward());
    resident_bytes()
}

/// Operations per second of a projection of 1024 tokens and a width of 1024: the best of a few runs.
pub fn measured_speed() -> f64 {
    const SIZE: usize = 1024;
    const RUNS: usize = 6;
    let device = Device::flex();
    let x = Tensor::<2>::ones([SIZE, SIZE], &device);
    let weight = Tensor::<2>::ones([SIZE, SIZE], &device);
    let run = || {
        let start = Instant::now();
        let projection = Projection { weight: weight.clone(), bias: None, low_rank: None, rounded_to: None };
        let product = linear(x.clone(), projection);
        // Reading a value waits for the product.
        let _ = product.slice([0..1, 0..1]).into_scalar::<f32>();
        start.elapsed().as_secs_f64()
    };
    let best = (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * (SIZE * SIZE * SIZE) as f64 / best
}

/// Bytes read and written per second by a copy on all cores, far larger than their caches: the best of a few runs.
pub fn measured_copy() -> f64 {
    const NUMBERS: usize = 24 << 20;
    const RUNS: usize = 5;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (from, mut into) = (vec![1.0_f32; NUMBERS], vec![0.0_f32; NUMBERS]);
    let mut run = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            let piece = NUMBERS.div_ceil(threads);
            for (into, from) in into.chunks_mut(piece).zip(from.chunks(piece)) {
                scope.spawn(move || into.copy_from_slice(from));
            }
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * size_of_val(from.as_slice()) as f64 / best
}

/// The path, or the nearest folder above it that is there.
fn existing(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    whole.ancestors().find(|path| path.exists()).map_or(whole.clone(), Path::to_owned)
}

/// What the memory limit of this process's group (cgroup v2) leaves; pages of files count as free.
fn free_in_group() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = Path::new("/sys/fs/cgroup").join(own);
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let statistics = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let files = field(&statistics, "inactive_file").unwrap_or(0);
    Some(number("memory.max")?.saturating_sub(number("memory.current")?.saturating_sub(files)))
}

fn kib_field(path: &Path, name: &str) -> Option<u64> {
    Some(1024 * field(&std::fs::read_to_string(path).ok()?, name)?)
}

/// The number behind a name.
fn field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_to_come_is_where_its_nearest_folder_is() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(existing(&folder.path().join("a/b")), folder.path());
        assert_eq!(unwritable(&folder.path().join("a/b")), None);
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(unwritable(&file.join("a")), Some(file));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_and_disk_are_told() {
        let resident = resident_bytes().unwrap();
        assert!((1 << 20..1 << 40).contains(&resident), "{resident}");
        assert!(free_memory_bytes().is_some() && free_disk_bytes(Path::new(".")).is_some());
    }
}
