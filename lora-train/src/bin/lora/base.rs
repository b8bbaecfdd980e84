//! A model, with or without an adapter: what evaluation, generation and merging begin with.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use lora_core::peft::Adapted;
use lora_model::{Model, adapter, config::CONFIG_FILE};
use lora_train::{Place, hub};

use crate::ui;

#[derive(Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct BaseArgs {
    /// Folder of the model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: PathBuf,
    /// Folder of an adapter for it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct PlaceArgs {
    /// Where to compute: cpu, cuda, cuda:N, or auto, which is CUDA when there is a device
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Type of the base's weights and of activations: f32, bf16, f16, or auto, which is bf16 on CUDA and else f32
    #[arg(long, default_value = "auto")]
    pub(crate) dtype: String,
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
        let place = Place::open(&self.place.device, &self.place.dtype)?;
        if let Some(note) = &place.note {
            ui::say(format_args!("note: {note}"));
        }
        load(&self.model, self.adapter.as_deref(), &place)
    }
}

/// Reads a model and what is attached to it.
pub(crate) fn load(model: &Path, adapter: Option<&Path>, place: &Place) -> anyhow::Result<Loaded> {
    let dir = hub::resolve(model)?;
    let device = &place.device;
    let model = lora_model::load_as(&dir, device, place.dtype)?;
    let adapted = match adapter {
        None => Adapted::none(device)?,
        Some(dir) if !adapter::is_adapter(dir) && dir.join(CONFIG_FILE).exists() => {
            bail!("{} is a whole model, not an adapter: give it as --model", dir.display())
        }
        Some(dir) => adapter::attach(dir, &*model, device)?,
    };
    Ok(Loaded { dir, model, adapted })
}
