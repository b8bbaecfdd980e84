//! The core of low-rank adaptation: tensors, a tape that spends nothing on frozen weights, the low-rank mathematics and
//! the adaptation methods.
//!
//! - [`Tensor`], [`Tape`], [`Var`], [`Params`], [`Grads`] and the differentiable operations [`ops`]: coarse operations
//!   with hand-written backwards. A constant has no slot: no gradient, no saved input, no optimiser state.
//! - [`peft`]: LoRA and the other methods, each one file.
//! - [`lowrank`]: ΔW, merging, SVD and subspaces, on `ndarray` arrays, useful alone.
//!
//! ```
//! use lora_core::{Grads, Init, ParamsBuilder, Tape, Tensor, lowrank::Layout, ops};
//! use lora_kernels::{DType, Device};
//!
//! // y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ with a frozen W: only A and B get gradients.
//! let cpu = Device::Cpu;
//! let mut builder = ParamsBuilder::new();
//! let a = builder.add("lora_A.weight", &[1, 2], Init::Ones);
//! let b = builder.add("lora_B.weight", &[2, 1], Init::Zeros);
//! let params = builder.build(&cpu, DType::F32, 0)?;
//!
//! let mut t = Tape::new(&params);
//! let x = t.constant(&Tensor::from_slice(&cpu, &[1, 2], &[1f32, 2.0])?);
//! let w = t.constant(&Tensor::from_slice(&cpu, &[2, 2], &[1f32, 0.0, 0.0, 1.0])?);
//! let y = ops::linear(&mut t, &x, &w, Layout::OutIn, None)?;
//! let (a_var, b_var) = (t.param(a)?, t.param(b)?);
//! let u = ops::linear(&mut t, &x, &a_var, Layout::OutIn, None)?;
//! let y = ops::linear_onto(&mut t, y, 0..2, &u, &b_var, 0.5)?;
//! assert_eq!(y.value().to_vec::<f32>()?, [1.0, 2.0]); // B = 0: the base's output
//!
//! let dy = Tensor::from_slice(&cpu, &[1, 2], &[1f32, -1.0])?;
//! let mut grads = Grads::new(&params)?;
//! t.backward_from(y, dy, &mut grads)?;
//! assert_eq!(grads.get(b)?.unwrap().to_vec::<f32>()?, [1.5, -1.5]); // s·dyᵀ·u, u = 3
//! # Ok::<(), lora_core::Error>(())
//! ```

mod error;
mod gradcheck;
pub mod lowrank;
pub mod ops;
mod params;
pub mod peft;
mod shares;
mod tape;
mod tensor;

pub use error::{Error, Result};
pub use gradcheck::{Worst, gradcheck, gradcheck_some};
pub use lora_kernels::hash;
pub use params::{Grads, Init, Marks, ParamId, Params, ParamsBuilder};
pub use shares::{Share, Shares};
pub use tape::{Backward, Noise, Open, Slot, Tape, Var};
pub use tensor::Tensor;
