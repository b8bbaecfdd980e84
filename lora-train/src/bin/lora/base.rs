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

impl BaseArgs {
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        load(&self.model, self.adapter.as_deref())
    }
}

/// Reads a model and what is attached to it.
pub(crate) fn load(model: &Path, adapter: Option<&Path>) -> anyhow::Result<Loaded> {
    if adapter::is_adapter(model) && !model.join(CONFIG_FILE).exists() {
        bail!("{} is an adapter: give its base as --model, and this folder as --adapter", model.display());
    }
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
