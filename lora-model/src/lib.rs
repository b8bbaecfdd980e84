//! Transformers from scratch, with Hugging Face weights, tokenisation and KV-cached generation.
//!
//! - [`load`] reads a model's folder: `config.json` and safetensors, single or sharded, mapped rather than read.
//! - [`Model`] is what an architecture implements ([`Gpt2`]): the forward pass. Backward passes come from the tape,
//!   adapters from the method that was applied to it ([`lora_core::peft::Adapted`]).
//! - [`generate`] continues texts: greedy, sampled or by beam search, over cached keys and values.
//! - [`tokenizer`] turns text into tokens and back.

pub mod adapter;
mod batch;
mod cache;
pub mod checkpoint;
pub mod config;
mod error;
pub mod files;
pub mod generate;
mod gpt2;
mod layers;
mod model;
pub mod tokenizer;

pub use batch::{Batch, Limits};
pub use cache::{Context, KvCache};
pub use error::{Error, Result};
pub use gpt2::Gpt2;
pub use model::{Model, load};
