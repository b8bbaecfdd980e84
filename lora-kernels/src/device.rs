use std::fmt;

/// Where memory lies and kernels run. A closed set: every kernel dispatches on it once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The host's processor, all cores of rayon's current pool.
    #[default]
    Cpu,
}

impl Device {
    /// A short name for messages: `cpu`.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision: what models compute in.
    F32,
    /// IEEE double precision: the same kernels, checked against finite differences.
    F64,
    /// Token ids, positions and row numbers.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F64 => 8,
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
    impl Plain for f64 {}
    impl Plain for u32 {}
}
