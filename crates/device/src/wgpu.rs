//! Graphics processors of all makers, through Vulkan, Metal or Direct3D.

use burn::tensor::{Device, DeviceKind, DeviceType};

use crate::{DeviceError, DeviceName};

/// The processor that the system prefers.
pub(crate) fn open() -> Result<Device, DeviceError> {
    let found = Device::enumerate(DeviceType::Wgpu).into_vec().len();
    if found == 0 {
        return Err(DeviceError::Missing {
            device: DeviceName::Wgpu,
            missing: "a graphics processor",
            hint: "install its driver with Vulkan (on Linux also libvulkan1)",
        });
    }
    Ok(Device::wgpu(DeviceKind::DefaultDevice))
}
