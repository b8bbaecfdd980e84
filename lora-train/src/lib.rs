//! Fine-tuning from a program of your own: data, optimisation, checkpoints. The `lora` command is this crate's binary.
//!
//! - [`data`] reads files and makes batches without padding.
//! - [`Trainer`] does optimiser steps; [`evaluate`] measures held-out loss.
//! - [`train`] is a whole run in a folder: log, checkpoints, resuming, the finished adapter.

pub mod checkpoint;
mod config;
pub mod data;
pub mod demo;
pub mod demo_data;
mod encoder;
mod error;
pub mod hub;
mod log;
mod output;
mod pretrain;
mod run;
pub mod schedule;
mod trainer;

pub use config::TrainConfig;
pub use encoder::{Encoder, load_data};
pub use error::{Error, Result};
pub use log::Log;
pub use pretrain::{PretrainConfig, pretrain};
pub use output::RUN_FILE;
pub use run::{Observer, RunInfo, Summary, save_result, train};
pub use trainer::{Evaluation, Step, Trainer, evaluate};

/// The examples of the workspace's README, compiled and run as doctests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
