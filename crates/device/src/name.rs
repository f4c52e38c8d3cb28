//! The names of devices, as flags and recipes have them.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::{DeviceError, NameError};

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceName {
    /// The CPU: `cpu`.
    #[default]
    Cpu,
    /// An NVIDIA GPU by its ordinal: `cuda:0`; `cuda` is the first.
    Cuda(usize),
    /// The graphics processor that the system prefers, through Vulkan, Metal or Direct3D: `wgpu`.
    Wgpu,
}

impl DeviceName {
    /// The devices that this build can compute on, in the words of an error.
    pub(crate) fn built() -> String {
        let names = [("cpu", true), ("cuda:N", cfg!(feature = "cuda")), ("wgpu", cfg!(feature = "wgpu"))];
        let built: Vec<&str> = names.iter().filter(|(_, built)| *built).map(|(name, _)| *name).collect();
        built.join(", ")
    }

    /// The device.
    ///
    /// # Errors
    /// If this build does not compute there, or the machine lacks the device or a library that it is reached by.
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => crate::cuda::open(ordinal),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => crate::wgpu::open(),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(DeviceError::NotBuilt { device: self, feature: "cuda" }),
            #[cfg(not(feature = "wgpu"))]
            Self::Wgpu => Err(DeviceError::NotBuilt { device: self, feature: "wgpu" }),
        }
    }

    /// The device, for tensors of a number type beside f32.
    ///
    /// # Errors
    /// As [`DeviceName::open`], or if the device has no such numbers.
    pub fn open_for(self, dtype: DType) -> Result<Device, DeviceError> {
        let device = self.open()?;
        match self == Self::Cpu || device.supports_dtype(dtype) {
            true => Ok(device),
            false => {
                Err(DeviceError::NumberType { device: self, found: format!("{dtype:?}").to_lowercase() })
            }
        }
    }

    /// Memory that is free on a device of its own; `None` where that is the host's, or the device does not tell.
    ///
    /// # Errors
    /// As [`DeviceName::open`].
    pub fn free_memory_bytes(self) -> Result<Option<u64>, DeviceError> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => crate::cuda::free_memory_bytes(ordinal).map(Some),
            _ => Ok(None),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(ordinal) => write!(formatter, "cuda:{ordinal}"),
            Self::Wgpu => formatter.write_str("wgpu"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            None if text == "wgpu" => Ok(Self::Wgpu),
            Some(("cuda", ordinal)) => {
                ordinal.parse().map(Self::Cuda).map_err(|_| NameError(text.to_owned()))
            }
            _ => Err(NameError(text.to_owned())),
        }
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for DeviceName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written_the_same() {
        for name in [DeviceName::Cpu, DeviceName::Cuda(0), DeviceName::Cuda(7), DeviceName::Wgpu] {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:0:1", "CPU", "cpu:0"] {
            let error = wrong.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("cuda:N"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_always_there_and_has_no_memory_of_its_own() {
        assert_eq!(DeviceName::Cpu.open().unwrap(), Device::flex());
        assert_eq!(DeviceName::Cpu.free_memory_bytes().unwrap(), None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_how_to_build_with_it() {
        let error = DeviceName::Cuda(1).open().unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "device cuda:1: this build computes on {}\nhint: build with --features cuda",
                DeviceName::built()
            )
        );
    }
}
