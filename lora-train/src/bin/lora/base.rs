//! A model, with or without an adapter: what evaluation, generation and merging begin with.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use lora_core::peft::Adapted;
use lora_kernels::Device;
use lora_model::{Model, adapter, config::CONFIG_FILE};
use lora_train::hub;

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct BaseArgs {
    /// Folder of the model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: PathBuf,
    /// Folder of an adapter for it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
}

pub(crate) struct Loaded {
    pub(crate) dir: PathBuf,
    pub(crate) model: Box<dyn Model>,
    pub(crate) adapted: Adapted,
}

impl std::fmt::Display for BaseArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.adapter {
            None => write!(f, "{}", self.model.display()),
            Some(adapter) => write!(f, "{} with {}", self.model.display(), adapter.display()),
        }
    }
}

impl BaseArgs {
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        load(&self.model, self.adapter.as_deref())
    }
}

/// Reads a model and what is attached to it.
pub(crate) fn load(model: &Path, adapter: Option<&Path>) -> anyhow::Result<Loaded> {
    let dir = hub::resolve(model)?;
    let device = Device::Cpu;
    let model = lora_model::load(&dir, &device)?;
    let adapted = match adapter {
        None => Adapted::none(&device)?,
        Some(dir) if !adapter::is_adapter(dir) && dir.join(CONFIG_FILE).exists() => {
            bail!("{} is a whole model, not an adapter: give it as --model", dir.display())
        }
        Some(dir) => adapter::attach(dir, &*model, &device)?,
    };
    Ok(Loaded { dir, model, adapted })
}
