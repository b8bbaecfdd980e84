use crate::DType;

/// What a device or a caller's data can cause; wrong shapes are programmer errors and panic instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device has no room for a buffer.
    #[error(
        "out of memory: {device} has no {bytes} bytes free; lower the batch size or split the batch (gradient accumulation), \
         shorten the sequences, or use a smaller model or 16-bit weights"
    )]
    OutOfMemory {
        /// The size of the buffer that was asked for.
        bytes: usize,
        /// The device's name.
        device: String,
    },
    /// No device has this name.
    #[error(
        "there is no device {name:?}; use cpu, cuda, cuda:N for the device of number N, or auto where it is offered"
    )]
    UnknownDevice {
        /// The name.
        name: String,
    },
    /// A kernel was called on elements of a type that it does not compute on.
    #[error("{kernel}: no kernel for {dtype:?}; convert the tensor to f32 first")]
    DType {
        /// The kernel.
        kernel: &'static str,
        /// The type it was given.
        dtype: DType,
    },
    /// CUDA cannot be used on this machine.
    #[error("CUDA: {what}")]
    Cuda {
        /// What is missing or failed, and what to do.
        what: String,
    },
    /// A kernel that runs on the host only was given matrices on a CUDA device.
    #[error("{kernel} has no CUDA version; run this model on the CPU (device cpu)")]
    NoCuda {
        /// What has none.
        kernel: &'static str,
    },
    /// A borrowed range lies outside its owner's bytes.
    #[error("bytes {start}..{end} lie outside a source of {len} bytes; the file is truncated or its header is wrong")]
    Range {
        /// First byte of the range.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Length of the source.
        len: usize,
    },
}

/// The result of a kernel.
pub type Result<T> = std::result::Result<T, Error>;
