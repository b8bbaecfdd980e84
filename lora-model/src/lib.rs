//! model

pub mod config;
mod error;
pub mod files;
pub mod tokenizer;

pub use error::{Error, Result};
