use std::fmt;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use half::{bf16, f16};

#[cfg(feature = "cuda")]
use crate::cuda::Gpu;
use crate::{Error, Result};

/// Where memory lies and kernels run. A closed set: every kernel dispatches on it once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The host's processor, all cores of rayon's current pool.
    #[default]
    Cpu,
    /// A CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Gpu>),
}

impl Device {
    /// The device that a person means by `cpu`, `cuda` (the first one) or `cuda:N`. With the feature `emulator`, `emulated`
    /// is one emulated device for the whole process: tests drive programs on it.
    ///
    /// # Errors
    /// [`Error::UnknownDevice`] for any other name; [`Error::Cuda`] when CUDA cannot be used here, with what to install
    /// or to change.
    pub fn open(name: &str) -> Result<Device> {
        if name == "cpu" {
            return Ok(Device::Cpu);
        }
        #[cfg(feature = "emulator")]
        if name == "emulated" {
            static EMULATED: std::sync::OnceLock<Arc<Gpu>> = std::sync::OnceLock::new();
            // Of two that are made at the same time one is used.
            let gpu = match EMULATED.get() {
                Some(gpu) => gpu.clone(),
                None => Gpu::emulated(0).map(|gpu| EMULATED.get_or_init(|| gpu).clone())?,
            };
            return Ok(Device::Cuda(gpu));
        }
        let ordinal = name.strip_prefix("cuda").and_then(|n| match n.strip_prefix(':') {
            Some(number) => number.parse().ok(),
            None => n.is_empty().then_some(0),
        });
        match ordinal {
            Some(ordinal) => Device::cuda(ordinal),
            None => Err(Error::UnknownDevice { name: name.into() }),
        }
    }

    /// The first CUDA device, or the CPU and the reason why CUDA cannot be used.
    pub fn auto() -> (Device, Option<Error>) {
        match Device::cuda(0) {
            Ok(device) => (device, None),
            Err(why) => (Device::Cpu, Some(why)),
        }
    }

    /// The CUDA device of that number.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn cuda(ordinal: usize) -> Result<Device> {
        #[cfg(feature = "cuda")]
        return Ok(Device::Cuda(Gpu::open(ordinal)?));
        #[cfg(not(feature = "cuda"))]
        Err(Error::Cuda { what: format!("this build cannot use cuda:{ordinal}; build with --features cuda") })
    }

    /// The CUDA device, if it is one.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(gpu),
        }
    }

    /// The type of activations where frozen weights are of the given type: on the CPU, whose kernels but for products and
    /// [`gather`](crate::gather()) know no 16-bit types, its [accumulator](DType::accumulator), else the type itself.
    pub fn activations(&self, weights: DType) -> DType {
        if self.is_cpu() { weights.accumulator() } else { weights }
    }

    /// Runs `f`, which calls many kernels: where they run on the host, on a thread of rayon's current pool, so that it hands
    /// work to the others without going to sleep over it.
    ///
    /// A thread outside the pool sleeps through every kernel that it calls and has to be woken after it, which for small
    /// kernels costs as much as the arithmetic. The order of all sums is the same.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if self.is_cpu() { rayon::scope(|_| f()) } else { f() }
    }

    /// Whether kernels run on the host.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Device::Cpu)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu) => gpu.fmt(f),
        }
    }
}

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision: what models compute in on the CPU, and what trainable parameters are kept in.
    F32,
    /// The upper half of an f32: weights and activations on CUDA devices, frozen matrices on the CPU.
    Bf16,
    /// IEEE half precision: weights and activations on CUDA devices.
    F16,
    /// IEEE double precision: the same kernels, checked against finite differences; CPU only.
    F64,
    /// Token ids, positions and row numbers.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::Bf16 | DType::F16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::F64 => 8,
        }
    }

    /// The type of sums over elements of this type, and of what must not lose digits to it: gradients and values of
    /// trainable parameters, losses, statistics of norms. f32 for the 16-bit types, else the type itself.
    pub fn accumulator(self) -> DType {
        match self {
            DType::Bf16 | DType::F16 => DType::F32,
            other => other,
        }
    }
}

/// A Rust type that a buffer can hold. Sealed: exactly the types of [`DType`].
pub trait Element: Copy + Default + Send + Sync + fmt::Debug + sealed::Plain + 'static {
    /// The tag of this type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

mod sealed {
    /// Types for which every bit pattern is a value, so that pooled and mapped bytes may be read as them.
    pub trait Plain {}
    impl Plain for f32 {}
    impl Plain for half::bf16 {}
    impl Plain for half::f16 {}
    impl Plain for f64 {}
    impl Plain for u32 {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!(Device::open("cpu").unwrap(), Device::Cpu);
        for name in ["gpu", "cuda:", "cuda:x", "cuda0", ""] {
            assert!(matches!(Device::open(name), Err(Error::UnknownDevice { .. })), "{name}");
        }
        match Device::open("cuda:4095") {
            Err(e @ Error::Cuda { .. }) => println!("{e}"),
            other => panic!("{other:?}"),
        }
        let (device, why) = Device::auto();
        assert_eq!(device.is_cpu(), why.is_some());
    }
}
