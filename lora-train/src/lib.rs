//! Fine-tuning from a program of your own: data, optimisation, checkpoints. The `lora` command is this crate's binary.
//!
//! - [`data`] reads files and makes batches without padding.
//! - [`Trainer`] does optimiser steps; [`evaluate`] measures held-out loss and, by [`metrics`], predictions.
//! - [`task`] gives an encoder what it needs to learn a task; [`generation`] makes texts that are judged by their references.
//! - [`compare`] makes the paper's table of methods and seeds.
//! - [`analysis`] measures what an adapter has learnt.
//! - [`plan`] tells what training takes, from a configuration alone; [`latency`] measures what methods cost at inference.
//! - [`train`] is a whole run in a folder: log, checkpoints, resuming, the finished adapter.
//!
//! ```
//! use lora_kernels::Device;
//! use lora_train::{PretrainConfig, TrainConfig, pretrain, train};
//!
//! # let temporary = tempfile::tempdir()?;
//! # let folder = temporary.path();
//! let lines = "name : The Vaults||The Vaults is a pub .\nname : The Mill||The Mill is a restaurant .\n";
//! std::fs::write(folder.join("data.txt"), lines)?;
//! // Any folder with a model will do; this one is small and made on the spot.
//! let base = PretrainConfig {
//!     text: vec![folder.join("data.txt")],
//!     out: folder.join("base"),
//!     vocab: 270,
//!     layers: 1,
//!     dim: 16,
//!     heads: 2,
//!     context: 64,
//!     steps: Some(1),
//!     ..PretrainConfig::default()
//! };
//! pretrain(&base, false, &mut ())?;
//!
//! let config = TrainConfig {
//!     model: folder.join("base"),
//!     data: folder.join("data.txt"),
//!     out: folder.join("adapter"),
//!     rank: 4,
//!     steps: Some(2),
//!     ..TrainConfig::default()
//! };
//! let summary = train(&config, false, &mut ())?; // `()` watches nothing: see `Observer`
//!
//! let model = lora_model::load(&config.model, &Device::Cpu)?;
//! let adapted = lora_model::adapter::attach(&config.out, &*model, &Device::Cpu)?;
//! assert_eq!((summary.steps, summary.trainable), (2, adapted.params.count()));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod analysis;
pub mod checkpoint;
pub mod compare;
mod config;
pub mod data;
pub mod demo;
pub mod demo_data;
mod encoder;
mod error;
mod evaluation;
pub mod generation;
mod groups;
pub mod hub;
pub mod latency;
mod log;
mod method;
pub mod metrics;
mod output;
mod passes;
mod place;
pub mod plan;
mod pretrain;
mod resources;
mod run;
pub mod schedule;
pub mod tables;
pub mod task;
mod trainer;

pub use config::TrainConfig;
pub use encoder::{Encoder, TextJoiner, load_data};
pub use error::{Error, Result};
pub use evaluation::{Evaluation, evaluate};
pub use log::Log;
pub use output::RUN_FILE;
pub use place::Place;
pub use pretrain::{PretrainConfig, pretrain};
pub use resources::{peak_memory, weight_bytes};
pub use run::{Observer, RunInfo, Summary, save_result, train};
pub use trainer::{Step, Trainer};

/// The examples of the workspace's README, compiled and run as doctests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
