//! The functions of the driver that burn's runtime calls, by their names and types in CUDA's driver API.
//!
//! A function that is not here is one the runtime was not seen to call; it names the missing one when it ends. What
//! pointers must be is said there.

// CUDA's names.
#![allow(non_snake_case)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Once;

use crate::account::{account, memory_bytes, report, setting};

/// `CUresult`.
type Answer = c_int;
const DONE: Answer = 0;
const INVALID_VALUE: Answer = 1;
const OUT_OF_MEMORY: Answer = 2;
const NO_DEVICE: Answer = 100;
const INVALID_DEVICE: Answer = 101;

/// Some handle; nothing is behind it.
const HANDLE: *mut c_void = 0x100 as *mut c_void;

/// Writes where a pointer leads, if anywhere.
///
/// # Safety
/// A pointer that is not null must be valid for writing.
unsafe fn set<T>(at: *mut T, value: T) -> Answer {
    if at.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { at.write(value) };
    DONE
}

fn devices() -> c_int {
    setting("NULL_CUDA_DEVICES", 1) as c_int
}

/// `CUdevice_attribute` of an H200; 0 is "does not have it".
fn attribute(which: c_int) -> c_int {
    let capability = setting("NULL_CUDA_CAPABILITY", 90) as c_int;
    match which {
        // Threads of a block, in all and by axis; the grid by axis.
        1..=3 => 1024,
        4 => 64,
        5 => c_int::MAX,
        6 | 7 => 65_535,
        // Shared memory of a block, constant memory, warp size, clock in kHz, multiprocessors.
        8 => 49_152,
        9 => 65_536,
        10 => 32,
        13 => 1_980_000,
        16 => 132,
        75 => capability / 10,
        76 => capability % 10,
        // Shared memory of a block that asks for more; memory pools.
        97 => 232_448,
        115 => 1,
        _ => 0,
    }
}

/// # Safety
/// As of [`set`].
unsafe fn take(at: *mut u64, bytes: usize) -> Answer {
    match account().take(bytes as u64) {
        // SAFETY: the caller's.
        Some(address) => unsafe { set(at, address) },
        None => OUT_OF_MEMORY,
    }
}

fn give_back(address: u64) -> Answer {
    if account().give_back(address) { DONE } else { INVALID_VALUE }
}

/// # Safety
/// `into` must be valid for writing `bytes`.
unsafe fn read_back(into: *mut c_void, bytes: usize) -> Answer {
    let mut account = account();
    account.copies_down += 1;
    account.bytes_down += bytes as u64;
    // SAFETY: the caller's.
    unsafe { into.cast::<u8>().write_bytes(0, bytes) };
    DONE
}

fn write_up(bytes: usize) -> Answer {
    let mut account = account();
    account.copies_up += 1;
    account.bytes_up += bytes as u64;
    DONE
}

fn wait() -> Answer {
    account().waits += 1;
    DONE
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
struct Copy2D {
    src_x: usize,
    src_y: usize,
    src_memory: c_int,
    src_host: *const c_void,
    src_device: u64,
    src_array: *mut c_void,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_memory: c_int,
    dst_host: *mut c_void,
    dst_device: u64,
    dst_array: *mut c_void,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

/// `CU_MEMORYTYPE_HOST`.
const HOST: c_int = 1;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuInit(_flags: c_uint) -> Answer {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: the function needs nothing that could be gone when the process ends.
        unsafe { libc::atexit(report) };
    });
    if devices() == 0 { NO_DEVICE } else { DONE }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(version, setting("NULL_CUDA_DRIVER", 13_000) as c_int) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: Answer, text: *mut *const c_char) -> Answer {
    let found = match error {
        OUT_OF_MEMORY => c"out of memory",
        NO_DEVICE => c"no CUDA-capable device is detected",
        INVALID_DEVICE => c"invalid device ordinal",
        _ => c"invalid argument",
    };
    // SAFETY: the caller's.
    unsafe { set(text, found.as_ptr()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: Answer, text: *mut *const c_char) -> Answer {
    // SAFETY: the caller's.
    unsafe { cuGetErrorString(error, text) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(count, devices()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Answer {
    if !(0..devices()).contains(&ordinal) {
        return INVALID_DEVICE;
    }
    // SAFETY: the caller's.
    unsafe { set(device, ordinal) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> Answer {
    let text = c"no GPU, all counted";
    if text.count_bytes() >= len as usize {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's; the text with its end fits.
    unsafe { name.copy_from(text.as_ptr(), text.count_bytes() + 1) };
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(name: *mut c_char, len: c_int, device: c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { cuDeviceGetName(name, len, device) };
    INVALID_DEVICE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(_uuid: *mut c_void, _device: c_int) -> Answer {
    INVALID_DEVICE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(value, attribute(which)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(bytes, memory_bytes() as usize) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Answer {
    // SAFETY: the caller's.
    unsafe {
        set(free, account().free_bytes() as usize);
        set(total, memory_bytes() as usize)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, _device: c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(context, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCurrent(_context: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(context, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSynchronize() -> Answer {
    wait()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> Answer {
    // SAFETY: the caller's.
    unsafe {
        set(least, 0);
        set(greatest, -5)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(stream, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut c_void,
    _flags: c_uint,
    _priority: c_int,
) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(stream, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> Answer {
    wait()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamQuery(_stream: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamDestroy_v2(_stream: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: c_uint) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(event, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventRecord(_event: *mut c_void, _stream: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventSynchronize(_event: *mut c_void) -> Answer {
    wait()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventQuery(_event: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventDestroy_v2(_event: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(millis: *mut f32, _start: *mut c_void, _end: *mut c_void) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(millis, 0.001) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(
    millis: *mut f32,
    _start: *mut c_void,
    _end: *mut c_void,
) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(millis, 0.001) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Answer {
    // SAFETY: the caller's.
    unsafe { take(address, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: *mut c_void) -> Answer {
    // SAFETY: the caller's.
    unsafe { take(address, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(address: u64) -> Answer {
    give_back(address)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeAsync(address: u64, _stream: *mut c_void) -> Answer {
    give_back(address)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(memory: *mut *mut c_void, bytes: usize) -> Answer {
    // SAFETY: any size may be asked for, and the result is checked by nobody but the caller.
    let found = unsafe { libc::calloc(bytes.max(1), 1) };
    // SAFETY: the caller's.
    unsafe { set(memory, found) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> Answer {
    // SAFETY: it comes from `calloc` above.
    unsafe { libc::free(memory) };
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    _to: u64,
    _from: *const c_void,
    bytes: usize,
    _stream: *mut c_void,
) -> Answer {
    write_up(bytes)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    _from: u64,
    bytes: usize,
    _stream: *mut c_void,
) -> Answer {
    // SAFETY: the caller's.
    unsafe { read_back(to, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    _to: u64,
    _from: u64,
    _bytes: usize,
    _stream: *mut c_void,
) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(_to: u64, _value: u8, _bytes: usize, _stream: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2D, _stream: *mut c_void) -> Answer {
    // SAFETY: the caller's.
    let copy = unsafe { &*copy };
    if copy.dst_memory != HOST {
        return write_up(copy.width * copy.height);
    }
    for row in copy.dst_y..copy.dst_y + copy.height {
        // SAFETY: the caller's: rows of the target are that far apart.
        unsafe { read_back(copy.dst_host.byte_add(row * copy.dst_pitch + copy.dst_x), copy.width) };
    }
    account().copies_down -= (copy.height as u64).saturating_sub(1);
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, _image: *const c_void) -> Answer {
    account().kernels += 1;
    // SAFETY: the caller's.
    unsafe { set(module, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(_module: *mut c_void) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    _module: *mut c_void,
    _name: *const c_char,
) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(function, HANDLE) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(_function: *mut c_void, _which: c_int, _value: c_int) -> Answer {
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(value: *mut c_int, _which: c_int, _function: *mut c_void) -> Answer {
    // SAFETY: the caller's.
    unsafe { set(value, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    _function: *mut c_void,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared: c_uint,
    _stream: *mut c_void,
    _parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Answer {
    account().launches += 1;
    DONE
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuTensorMapEncodeTiled(
    _map: *mut c_void,
    _type: c_int,
    _rank: c_uint,
    _address: *mut c_void,
    _sizes: *const u64,
    _strides: *const u64,
    _box: *const c_uint,
    _steps: *const c_uint,
    _interleave: c_int,
    _swizzle: c_int,
    _promotion: c_int,
    _fill: c_int,
) -> Answer {
    DONE
}
