//! Kernels for transformers and low-rank adaptation.
//!
//! Memory ([`Buffer`], pooled), views of it ([`Mat`], [`MatMut`]) and every piece of arithmetic on them: matrix
//! products, attention, norms, activations, embeddings, the loss head, AdamW. No autograd, no layers, no file formats:
//! those stand in the crates above.
//!
//! Every kernel is a safe function on views, runs on all cores of rayon's current pool, and gives the same bits for any
//! number of threads. Kernels compute in f32, and in f64 too, so that the very same code can be checked against finite
//! differences.
//!
//! ```
//! use lora_kernels::{Buffer, Device, Mat, MatMut, gemm};
//!
//! // y = x·Wᵀ with x [1, 2] and W [2, 2]
//! let x = Buffer::from_slice(&Device::Cpu, &[1.0f32, 2.0])?;
//! let w = Buffer::from_slice(&Device::Cpu, &[1.0f32, 0.0, 3.0, 4.0])?;
//! let mut y = Buffer::zeros(&Device::Cpu, x.dtype(), 2)?;
//! gemm(1.0, Mat::new(&x, 0, 1, 2), Mat::new(&w, 0, 2, 2).t(), 0.0, MatMut::new(&mut y, 0, 1, 2))?;
//! assert_eq!(y.to_vec::<f32>(0..2)?, [1.0, 11.0]);
//! # Ok::<(), lora_kernels::Error>(())
//! ```

mod activation;
mod adamw;
mod attention;
mod buffer;
mod columns;
#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod dropout;
mod elementwise;
mod error;
mod gather;
mod gemm;
pub mod hash;
mod heap;
mod host;
mod lora;
mod loss;
mod mat;
mod mix;
mod norm;
mod pool;
mod real;
mod reduce;
mod rope;
#[cfg(test)]
mod testing;
mod transpose;
mod unfold;

pub use activation::{Activation, activation, activation_backward, silu_gate, silu_gate_backward};
pub use adamw::{AdamW, adamw, adamw_clipped, all_finite, clip_factor, sum_squares, sum_squares_into};
pub use attention::{
    Attention, CachedRows, Disentangled, DisentangledGrads, DisentangledInputs, RelativePositions, Sequences,
    attention, attention_backward, attention_cached, disentangled, disentangled_backward,
};
pub use buffer::Buffer;
pub use columns::{dot_columns, reciprocal_norms, scale_columns};
pub use device::{DType, Device, Element};
pub use dropout::{Dropout, dropout, philox};
pub use elementwise::{add_bias, axpby, fill, scale, scale_by, sum_rows};
pub use error::{Error, Result};
pub use gather::{gather, put_rows, scatter};
pub use gemm::{Batch, Epilogue, Stack, cpu_instructions, gemm, gemm_batched, gemm_with};
pub use heap::{CountingHeap, HeapStats, heap_stats};
pub use host::log_softmax;
pub use lora::{
    LoraAdapter, LoraPart, lora_backward_down, lora_backward_input, lora_backward_up, lora_down, lora_forward,
    lora_grouped,
};
pub use loss::{HeadTerm, cross_entropy, loss_head, loss_head_of, nll};
pub use mat::{Acc, Mat, MatMut};
pub use mix::{mix, mix_backward};
pub use norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use pool::{DryPool, PoolStats, pool_stats, release_idle_memory};
pub use rope::rope;
pub use transpose::transpose;
pub use unfold::{unfold, unfold_backward};
