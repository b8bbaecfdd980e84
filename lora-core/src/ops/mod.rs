//! The differentiable operations. Each is coarse, has a hand-written backward, and spends nothing on a constant: what has
//! no slot gets no gradient, and what only its gradient would need is not saved.
//!
//! An operation gives an error where memory is wanting or a device fails; shapes that do not fit are a programmer's error.

mod attention;
mod blocks;
mod columns;
mod disentangled;
mod elementwise;
mod gather;
mod linear;
mod lora;
mod loss;
mod mix;
mod norm;
mod orthogonality;
mod parts;
mod rope;
mod unfold;

pub use attention::{Qkv, attention};
pub use blocks::{linear_blocks, reshape};
pub use columns::scale_columns;
pub use disentangled::{DisentangledInputs, disentangled};
pub use elementwise::{activation, add, add_bias, dropout, dropout_by, silu_gate, subtract};
pub use gather::gather;
pub use linear::{linear, linear_onto, linear_wide};
pub use lora::{LoraPart, lora_linear};
pub use loss::{BesideHead, loss_head, loss_head_beside, squared_error};
pub use mix::mix;
pub use norm::{layer_norm, rms_norm};
pub use orthogonality::orthogonality;
pub use parts::{columns, concat_rows};
pub use rope::rope;
pub use unfold::{convolution, unfold};
