//! Stands in for cubecl-llvm 0.11.3, so that the feature `cuda` builds where only package registries are reachable.
//!
//! cubecl-cuda 0.11.3 has two ways from a kernel to the GPU: CUDA C++ that NVRTC compiles, and PTX that LLVM makes. Its
//! feature `cpp` chooses the first, but the second is compiled in all the same, and the build of the real cubecl-llvm
//! downloads a bundle of LLVM from a host that is no registry. This crate has the names and types that cubecl-cuda
//! mentions and nothing behind them: with `cpp` none of it is ever called.
//!
//! It goes when cubecl-cuda can be built without LLVM. A change of cubecl's version needs a look at the uses of
//! `cubecl_llvm` in cubecl-cuda; where they have changed, the feature `cuda` does not compile.

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_server::compiler::CompilationError;
use cubecl_server::kernel::BufferIOAttr;

pub mod nvptx {
    pub mod ptx_version {
        /// The version of PTX that a driver reads.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);

        impl PtxVersion {
            /// Only code of LLVM would want to know.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl core::fmt::Display for PtxVersion {
            fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(formatter, "ptx{}", self.0)
            }
        }
    }
}

pub mod shared {
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        pub enum GpuTarget {
            Nvptx,
        }

        /// Takes nothing away: only code of LLVM would lack something.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

#[derive(Clone, Copy, Debug)]
pub enum LlvmTarget {
    Nvptx,
}

#[derive(Clone, Debug)]
pub struct PlironCompiler {
    pub target: LlvmTarget,
}

/// `..Default::default()` stands in cubecl-cuda after the fields that it sets, so there must be one more.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    pub arch: Option<()>,
    pub sm_arch: Option<SmArch>,
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    pub grid_constants: bool,
    pub others: (),
}

#[derive(Clone, Debug)]
pub struct NvptxModule {
    pub ptx: Vec<core::ffi::c_char>,
    pub entrypoint: String,
    pub ir: String,
    pub shared_memory_size: usize,
    pub io: Vec<BufferIOAttr>,
}

pub enum PlironArtifact {
    NvptxCode(NvptxModule),
    Other,
}

impl PlironCompiler {
    pub fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        panic!("LLVM is left out of this build: cubecl-cuda must have its feature `cpp`")
    }

    pub fn lang_tag(&self) -> &'static str {
        "no-llvm"
    }
}
