//! The table of all kernels' sources, which the compile gate and the mutation check go through.

use super::Module;

/// Every module, in the order of their names.
pub(crate) const ALL: &[&Module] = &[
    &crate::activation::cuda::MODULE,
    &crate::adamw::cuda::MODULE,
    &crate::attention::cuda::FORWARD,
    &crate::attention::cuda::BACKWARD,
    &crate::attention::cuda::CACHED,
    &crate::columns::cuda::MODULE,
    &crate::dropout::cuda::MODULE,
    &crate::elementwise::cuda::MODULE,
    &crate::gather::cuda::MODULE,
    &crate::gemm::cuda::MMA_BF16,
    &crate::gemm::cuda::MMA_F16,
    &crate::gemm::cuda::MMA_TF32,
    &crate::gemm::cuda::SIMT,
    &crate::gemm::cuda::GEMV,
    &crate::gemm::wgmma::NN,
    &crate::gemm::wgmma::NT,
    &crate::gemm::wgmma::TN,
    &crate::lora::cuda::LORA_BF16,
    &crate::lora::cuda::LORA_F16,
    &crate::lora::cuda::LORA_F32,
    &crate::loss::cuda::MODULE,
    &crate::mix::cuda::MODULE,
    &crate::norm::cuda::MODULE,
    &crate::rope::cuda::MODULE,
    &crate::transpose::cuda::MODULE,
];
