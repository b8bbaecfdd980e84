//! Tests from outside, all in one program: it links once.

mod cpu;
#[cfg(feature = "cuda")]
mod gpu;
