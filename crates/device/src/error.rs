//! What can go wrong before anything is computed.

use crate::DeviceName;

/// A name that is none of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {0:?}, expected cpu, cuda:N or wgpu")]
pub struct NameError(pub(crate) String);

/// A device that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The program was built without it.
    #[error(
        "device {device}: this build computes on {}\nhint: build with --features {feature}",
        DeviceName::built()
    )]
    NotBuilt {
        /// The device.
        device: DeviceName,
        /// The feature of the build.
        feature: &'static str,
    },
    /// Something that is loaded while the program runs is not on the machine.
    #[error("device {device}: {missing} was not found\nhint: {hint}")]
    Missing {
        /// The device.
        device: DeviceName,
        /// The library or the folder.
        missing: &'static str,
        /// What to install.
        hint: &'static str,
    },
    /// The driver is older than the compiler that kernels are compiled with.
    #[error(
        "device {device}: the NVIDIA driver runs code of CUDA {} at most, and the compiler found (NVRTC) makes code of \
         CUDA {}\nhint: install a newer driver, or put an older NVRTC first in LD_LIBRARY_PATH",
        version(.driver), version(.compiler)
    )]
    DriverTooOld {
        /// The device.
        device: DeviceName,
        /// Major and minor version that the driver supports.
        driver: (i32, i32),
        /// Major and minor version of NVRTC.
        compiler: (i32, i32),
    },
    /// There are fewer devices.
    #[error("device {device}: {}", found(*.count))]
    NoSuchDevice {
        /// The device.
        device: DeviceName,
        /// Devices of its kind that the machine has.
        count: usize,
    },
    /// It has no arithmetic in a number type; burn would give zeros.
    #[error("device {device} does not compute in {found}, expected f32\nhint: leave --dtype out")]
    NumberType {
        /// The device.
        device: DeviceName,
        /// The number type.
        found: String,
    },
    /// The driver refuses a question.
    #[error("device {device}: the driver answers {reason:?} when {asked}")]
    Driver {
        /// The device.
        device: DeviceName,
        /// What was asked.
        asked: &'static str,
        /// Its answer.
        reason: String,
    },
}

impl DeviceError {
    /// Whether the command line is at fault, not the machine.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotBuilt { .. })
    }
}

fn version((major, minor): &(i32, i32)) -> String {
    format!("{major}.{minor}")
}

fn found(count: usize) -> String {
    match count {
        0 => "none was found on this machine".to_owned(),
        1 => "one is on this machine, expected cuda:0".to_owned(),
        count => format!("{count} are on this machine, expected cuda:0 to cuda:{}", count - 1),
    }
}
