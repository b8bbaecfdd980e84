//! Tests from outside, all in one program: it links once.

mod bf16;
#[cfg(feature = "cli")]
mod cli;
mod common;
mod data;
mod demo;
#[cfg(feature = "cuda")]
mod device;
mod loraplus;
mod methods;
mod metrics;
mod real_data;
mod runs;
#[cfg(feature = "cuda")]
mod task_device;
mod tasks;
mod trainer;
