//! NVIDIA GPUs: whether driver, compiler and headers are there, asked before burn's runtime needs them.
//!
//! Nothing of CUDA is linked. The driver (libcuda) comes with the system; kernels are compiled while the program runs
//! by NVRTC from headers of CUDA's toolkit, or of its packages for Python. Matrix products are burn's own kernels:
//! cuBLAS is not used.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::Device;
use cudarc::driver::CudaContext;
use cudarc::{driver, nvrtc};

use crate::{DeviceError, DeviceName};

const DRIVER_HINT: &str =
    "install NVIDIA's driver; in a container start it with the driver's libraries (--gpus all)";
const NVRTC_HINT: &str = "install CUDA's toolkit, or the Python packages nvidia-cuda-nvrtc, nvidia-cuda-runtime, \
     nvidia-cuda-crt and nvidia-cuda-cccl of a version that the driver supports, and set CUDA_PATH to the folder that \
     has lib and include (nvidia/cu13 in site-packages)";

/// The GPU of an ordinal.
pub(crate) fn open(ordinal: usize) -> Result<Device, DeviceError> {
    check(ordinal)?;
    Ok(Device::cuda(ordinal))
}

/// Memory that programs can still get on the GPU of an ordinal.
pub(crate) fn free_memory_bytes(ordinal: usize) -> Result<u64, DeviceError> {
    check(ordinal)?;
    let context = CudaContext::new(ordinal).map_err(refused(ordinal, "a context is made"))?;
    let (free, _total) = context.mem_get_info().map_err(refused(ordinal, "free memory is asked for"))?;
    Ok(free as u64)
}

/// Everything that burn's runtime takes for granted.
fn check(ordinal: usize) -> Result<(), DeviceError> {
    let device = DeviceName::Cuda(ordinal);
    let missing = |missing, hint| DeviceError::Missing { device, missing, hint };
    // SAFETY: the call only tries to load a library of each name that the driver has.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(missing("NVIDIA's driver (libcuda.so.1)", DRIVER_HINT));
    }
    driver::result::init().map_err(refused(ordinal, "it is started"))?;
    let count = CudaContext::device_count().map_err(refused(ordinal, "GPUs are counted"))?;
    if ordinal >= count as usize {
        return Err(DeviceError::NoSuchDevice { device, count: count as usize });
    }
    let toolkit = cubecl_cuda::install::cuda_path();
    load_compiler(toolkit.as_deref());
    // SAFETY: as above.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(missing("CUDA's compiler (libnvrtc.so)", NVRTC_HINT));
    }
    if !toolkit.is_some_and(|toolkit| toolkit.join("include/cuda_runtime.h").exists()) {
        return Err(missing(
            "CUDA's headers (include/cuda_runtime.h in CUDA_PATH or /usr/local/cuda)",
            NVRTC_HINT,
        ));
    }
    let (driver, compiler) = (driver_version(ordinal)?, compiler_version());
    if driver < compiler {
        return Err(DeviceError::DriverTooOld { device, driver, compiler });
    }
    Ok(())
}

/// Loads NVRTC from the toolkit, where the system does not know of it: whoever loads it by name then gets this one. Of its
/// helper it does the same by itself, so that comes first.
fn load_compiler(toolkit: Option<&Path>) {
    static LOADED: OnceLock<Vec<libloading::Library>> = OnceLock::new();
    LOADED.get_or_init(|| {
        // SAFETY: as above.
        if unsafe { nvrtc::sys::is_culib_present() } {
            return Vec::new();
        }
        let folders = ["lib64", "lib", "targets/x86_64-linux/lib"].into_iter();
        let folders = folders.filter_map(|folder| toolkit.map(|path| path.join(folder)));
        let found = folders
            .map(|folder| ["libnvrtc-builtins.so.", "libnvrtc.so."].map(|name| file_in(&folder, name)));
        let files = found.into_iter().find(|[_, compiler]| compiler.is_some());
        // SAFETY: the initialisers of both have no preconditions.
        let load = |path: PathBuf| unsafe { libloading::Library::new(path) }.ok();
        files.into_iter().flatten().flatten().filter_map(load).collect()
    });
}

/// The library of a name in a folder, with a version alone behind that.
fn file_in(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.find(|path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let version = file.strip_prefix(name).unwrap_or_default();
        !version.is_empty() && version.split('.').all(|number| number.parse::<u32>().is_ok())
    })
}

/// Major and minor version of CUDA that the driver supports.
fn driver_version(ordinal: usize) -> Result<(i32, i32), DeviceError> {
    let mut version = 0;
    // SAFETY: the number outlives the call that writes it.
    let answer = unsafe { driver::sys::cuDriverGetVersion(&mut version) };
    answer.result().map_err(refused(ordinal, "its version is asked for"))?;
    Ok((version / 1000, version % 1000 / 10))
}

/// Major and minor version of NVRTC.
fn compiler_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the numbers outlive the call that writes them.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// For `map_err` on questions to the driver.
fn refused(ordinal: usize, asked: &'static str) -> impl Fn(driver::DriverError) -> DeviceError {
    move |error| {
        let reason = error
            .error_string()
            .map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into());
        DeviceError::Driver { device: DeviceName::Cuda(ordinal), asked, reason }
    }
}
