//! Transformers from scratch, with Hugging Face weights, tokenisation and KV-cached generation.
//!
//! - [`load`] reads a model's folder: `config.json` and safetensors, single or sharded, mapped rather than read.
//! - [`Model`] is what an architecture implements ([`ARCHITECTURES`] lists them): the forward pass. Backward passes come from the
//!   tape, adapters from the method that was applied to it ([`lora_core::peft::Adapted`]).
//! - [`generate`] continues texts: greedy, sampled or by beam search, over cached keys and values.
//! - [`tokenizer`] turns text into tokens and back.
//! - [`adapter`] saves and loads adapters as PEFT does, and merges, extracts and compares them; [`convert`] reads and writes
//!   those of other programs.
//! - [`checkpoint`] is the files of weights, [`config`] those of configurations, and [`fingerprint`](mod@fingerprint) tells
//!   whether a base is the one that an adapter was trained on.
//!
//! ```
//! use lora_core::peft::{Adapted, Lora, LoraConfig, Options};
//! use lora_kernels::{DType, Device};
//! use lora_model::{
//!     Gpt2, Model, adapter, config::Gpt2Config, generate, generate::GenerationConfig, load, tokenizer::Tokenizer,
//! };
//!
//! # let temporary = tempfile::tempdir().expect("a folder for temporary files");
//! # let folder = temporary.path();
//! let cpu = Device::Cpu;
//! // A folder as Hugging Face has them, here with a small model that has learnt nothing.
//! let tokenizer = Tokenizer::train_bpe(["to be or not to be"].into_iter(), 260)?;
//! let config = Gpt2Config {
//!     vocab_size: tokenizer.vocab_size(),
//!     n_positions: 32,
//!     n_embd: 16,
//!     n_layer: 1,
//!     n_head: 2,
//!     ..Gpt2Config::default()
//! };
//! Gpt2::init(config, folder, 0, &cpu)?.save(folder, &Default::default())?;
//! tokenizer.save(folder)?;
//!
//! // From a folder to text, through a LoRA adapter.
//! let model = load(folder, &cpu)?;
//! let targets = ["c_attn"].into_iter().collect();
//! let lora = Lora::new(LoraConfig { rank: 4, alpha: 8.0, targets, ..LoraConfig::default() })?;
//! let adapted = Adapted::new(&lora, &*model, &cpu, DType::F32, 0)?;
//! assert_eq!(adapted.params.count(), 4 * (16 + 48)); // A [4, 16] and B [48, 4]
//! let tokenizer = Tokenizer::from_dir(folder)?;
//! let prompt = tokenizer.encode("to be")?;
//! let config = GenerationConfig { max_new_tokens: 5, ..GenerationConfig::default() };
//! let texts = generate::generate(&*model, &adapted, &[prompt], &config, None)?;
//! println!("{}", tokenizer.decode(&texts[0].tokens, true)?);
//! # assert_eq!(texts[0].tokens.len(), 5);
//!
//! // The adapter in PEFT's two files, and from there onto a base again.
//! let options = Options { rank: 4, alpha: 8.0, targets: ["c_attn"].into_iter().collect(), ..Options::default() };
//! adapter::save(&folder.join("adapter"), "lora", &options, &adapted, &*model, None)?;
//! let again = adapter::attach(&folder.join("adapter"), &*model, &cpu)?;
//! assert_eq!(again.params.count(), adapted.params.count());
//! # Ok::<(), lora_model::Error>(())
//! ```

pub mod adapter;
mod architectures;
mod batch;
mod bert;
mod build;
mod cache;
pub mod checkpoint;
pub mod config;
pub mod convert;
mod deberta_v2;
mod error;
pub mod files;
pub mod fingerprint;
pub mod generate;
mod gpt2;
mod heads;
mod input;
mod layers;
mod llama;
mod model;
#[cfg(feature = "cuda")]
mod recorded;
mod roberta;
pub mod rope;
pub mod tokenizer;
mod virtual_rows;

pub use architectures::{
    ARCHITECTURES, ArchitectureRow, Assemble, Fetch, Load, LoadOptions, assemble, load, load_as, load_with, outline,
};
pub use batch::{Batch, Limits, Targets, Texts};
pub use bert::Bert;
pub use build::Parts;
pub use cache::{KvCache, KvShape};
pub use deberta_v2::DebertaV2;
pub use error::{Error, Result};
pub use gpt2::Gpt2;
pub use input::Input;
pub use layers::Weight;
pub use llama::Llama;
pub use model::{Head, Model, Task};
pub use roberta::Roberta;
