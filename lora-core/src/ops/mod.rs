//! The differentiable operations. Each is coarse, has a hand-written backward, and spends nothing on a constant: what has
//! no slot gets no gradient, and what only its gradient would need is not saved.

mod attention;
mod elementwise;
mod gather;
mod linear;
mod lora;
mod loss;
mod norm;

pub use attention::attention;
pub use elementwise::{activation, add, dropout, dropout_by};
pub use gather::gather;
pub use linear::{linear, linear_onto};
pub use lora::{LoraPart, lora_linear};
pub use loss::loss_head;
pub use norm::{layer_norm, rms_norm};
