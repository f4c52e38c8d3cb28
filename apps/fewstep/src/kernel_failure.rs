//! A kernel that a GPU's compiler refuses, as an error with the compiler's log.
//!
//! burn compiles a kernel when it is first launched, on a thread of its own, and marks what the kernel should have written.
//! Whoever reads that panics, anywhere in the program, with all that is known: log, the kernel's source and a backtrace.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};

use anyhow::{Error, Result, anyhow};

/// Does `run`; a panic over a kernel that does not compile is an error, and nothing else is said of it.
///
/// # Errors
/// That, and those of `run`.
pub fn caught<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    let usual = take_hook();
    set_hook(Box::new(move |panic| {
        if failure(panic.payload()).is_none() {
            usual(panic);
        }
    }));
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| match failure(&*payload) {
        Some(error) => Err(error),
        None => resume_unwind(payload),
    })
}

/// The error that a panic stands for, if it is over a kernel that does not compile (cubecl-cuda's `compile_to_ptx` words it).
fn failure(payload: &(dyn Any + Send)) -> Option<Error> {
    let said = payload.downcast_ref::<String>()?;
    let (_, said) = said.split_once("[Compilation Error]")?;
    let (log, source) = said.split_once("[Source]")?;
    let name = entry_point(source).unwrap_or("without a name");
    Some(anyhow!(
        "kernel {name} does not compile: {}\nhint: NVRTC and CUDA's headers (CUDA_PATH) must be of one version; if they \
         are, please report this, and compute with --device cpu meanwhile",
        log.trim()
    ))
}

/// The name in `extern "C" __global__ void __launch_bounds__(256) name(…`, behind which attributes may stand.
fn entry_point(source: &str) -> Option<&str> {
    let (_, entry) = source.split_once("__launch_bounds__(")?;
    let (_, entry) = entry.split_once(')')?;
    entry.split('(').filter_map(|part| part.split_whitespace().last()).find(|word| !word.starts_with("__"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_does_not_compile_is_named_with_its_log() {
        for attributes in ["", "__cluster_dims__(1, 2, 3)"] {
            let error = caught::<()>(|| {
                panic!(
                    "Error while reading data: An error caused the compilation to fail\nCaused by:\n  \
                     [Compilation Error] \n    default_program(7): error: expected a \";\"\n[Source]  \n\
                     #include <cuda_fp16.h>\nextern \"C\" __global__ void __launch_bounds__(256) {attributes} \
                     copy_f32(float const* __restrict__ x) {{}}\nBacktrace:\n  0: somewhere"
                )
            });
            let said = error.unwrap_err().to_string();
            let (first, hint) = said.split_once('\n').unwrap();
            assert_eq!(
                first,
                "kernel copy_f32 does not compile: default_program(7): error: expected a \";\""
            );
            assert!(hint.starts_with("hint: NVRTC and CUDA's headers"), "{hint}");
        }
    }

    #[test]
    fn other_panics_go_on() {
        let payload = catch_unwind(|| caught::<()>(|| panic!("another bug"))).unwrap_err();
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"another bug"));
    }
}
