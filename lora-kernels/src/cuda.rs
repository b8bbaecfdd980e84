//! CUDA devices through `cudarc` (feature `cuda`): which ones there are. The library is loaded at run time, so a build
//! needs no toolkit and a machine without a driver gets an error that says so.

#![allow(unsafe_code)]

use cudarc::driver::{CudaContext, result, sys};

use crate::{Error, Result};

/// A CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub memory: usize,
    /// Its compute capability, such as (9, 0).
    pub compute_capability: (u32, u32),
}

/// The CUDA devices of this machine.
///
/// # Errors
/// [`Error::Cuda`] when there is no driver, or it cannot be used. No device is an empty list.
pub fn devices() -> Result<Vec<Gpu>> {
    // Asked first, because cudarc panics on the first call into a library that is not there.
    // SAFETY: looks for a shared library by name; the driver's initialisers run if it is found.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Cuda {
            what: "no CUDA driver was found; install the NVIDIA driver, or use --device cpu".into(),
        });
    }
    let failed = |e: result::DriverError| Error::Cuda { what: format!("{e}; is the driver running?") };
    result::init().map_err(failed)?;
    let count = CudaContext::device_count().map_err(failed)?;
    (0..count).map(|i| gpu(i).map_err(failed)).collect()
}

fn gpu(ordinal: i32) -> std::result::Result<Gpu, result::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    let attribute = |a: Attribute| {
        // SAFETY: `device` was just given out by the driver.
        unsafe { result::device::get_attribute(device, a) }.map(|v| v as u32)
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device)? };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let name = result::device::get_name(device)?;
    Ok(Gpu { ordinal: ordinal as usize, name, memory, compute_capability: (major, minor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_an_error_and_no_panic() {
        match devices() {
            Ok(gpus) => println!("{gpus:?}"),
            Err(e) => {
                println!("skipped: no CUDA device ({e})");
                assert!(matches!(e, Error::Cuda { .. }) && e.to_string().contains("driver"), "{e}");
            }
        }
    }
}
