//! CUDA devices through `cudarc` (feature `cuda`). The driver, NVRTC and cuBLASLt are loaded at run time, so a build needs
//! no toolkit, and a machine without one gets an error that says what is missing.
//!
//! A [`Gpu`] is one device with everything that belongs to it: one stream in whose order all work is done, a pool of its
//! memory, and the kernels loaded so far. Kernels are called through the same functions as on the CPU; which device runs
//! them follows from where their matrices lie.

mod driver;
#[cfg(feature = "emulator")]
mod emulated;
#[cfg(feature = "emulator")]
mod emulator;
mod gpu;
mod graph;
mod launch;
pub(crate) mod map;
mod memory;
mod module;
#[cfg(test)]
pub(crate) mod modules;
#[cfg(test)]
pub(crate) mod testing;

pub use driver::{GpuInfo, devices};
pub use gpu::Gpu;
pub use graph::Graph;

pub use crate::gemm::engines::{GemmEngine, GemmFamily, gemm_by, gemm_engines};

pub(crate) use driver::{Captured, Driver, Function, guard};
pub(crate) use launch::{Arguments, Launch, suffix};
pub(crate) use memory::DeviceBlock;
pub(crate) use module::{Arch, Module};
