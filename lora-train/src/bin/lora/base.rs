//! A model, with or without an adapter: what evaluation, generation and merging begin with.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use lora_core::peft::{Adapted, Layers};
use lora_kernels::Device;
use lora_model::{LoadOptions, Model, Task, adapter, config::CONFIG_FILE};
use lora_train::{
    Place,
    data::TaskRow,
    hub,
    task::{self, Fitted},
};

use crate::ui;

/// The group of the flags that name adapters.
pub(crate) const ADAPTERS: &str = "adapters-of-the-model";

#[derive(Args)]
#[command(next_help_heading = "Model")]
// Where they are optional, they are there when the model is.
#[group(args = ["model"])]
pub(crate) struct BaseArgs {
    /// Folder of the model, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: PathBuf,
    /// Folder of an adapter for it
    #[arg(long, value_name = "DIR", group = ADAPTERS)]
    adapter: Option<PathBuf>,
    /// Refuse an adapter that was trained on another base than this one, rather than warn of it
    #[arg(long, requires = ADAPTERS)]
    strict: bool,
    /// Layers to take the adapter out of (AdapterDrop): first:N, last:N, or numbers from 0 such as 0,2,4-7
    #[arg(long, value_name = "LAYERS", requires = "adapter", value_parser = layers)]
    drop_layers: Option<Layers>,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct PlaceArgs {
    /// Where to compute: cpu, cuda, cuda:N, or auto, which is CUDA when there is a device
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// Type of the base's weights and of activations: f32, bf16 (on the CPU for matrices and their products), f16 (CUDA),
    /// or auto, which is bf16 on CUDA and else f32
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
        let loaded = load(&self.model, self.adapter.as_deref(), &self.place()?, self.strict)?;
        self.dropped(loaded)
    }

    /// An adapter for a model that was loaded.
    pub(crate) fn attach(&self, dir: &Path, model: &dyn Model) -> anyhow::Result<Adapted> {
        attach(dir, model, self.strict)
    }

    /// A model that continues text, without a task or for one of completions.
    pub(crate) fn load_causal(&self, task: Option<&TaskRow>) -> anyhow::Result<Loaded> {
        task::check_causal(&hub::resolve(&self.model)?, task)?;
        self.load()
    }

    /// A model that has learned a task.
    pub(crate) fn load_task(&self, task: &'static TaskRow) -> anyhow::Result<(Fitted, Loaded)> {
        let dir = hub::resolve(&self.model)?;
        let adapter = self.adapter.as_deref();
        adapter.map_or(Ok(()), check_adapter)?;
        let fitted = Fitted::trained(task, &dir, adapter)?;
        let loaded = load_for(dir, adapter, &self.place()?, Some(fitted.head()), self.strict)?;
        Ok((fitted, self.dropped(loaded)?))
    }

    /// Without the adapters of the layers that are to have none.
    fn dropped(&self, mut loaded: Loaded) -> anyhow::Result<Loaded> {
        if let Some(layers) = &self.drop_layers {
            loaded.adapted.drop_layers(layers, loaded.model.outline())?;
        }
        Ok(loaded)
    }

    fn place(&self) -> anyhow::Result<Place> {
        let place = Place::open(&self.place.device, &self.place.dtype)?;
        if let Some(note) = &place.note {
            ui::note(note);
        }
        Ok(place)
    }
}

fn layers(text: &str) -> lora_core::Result<Layers> {
    Layers::parse("drop-layers", text)
}

/// Reads a model and what is attached to it; for an adapter that was trained for a task, with a head for that.
pub(crate) fn load(model: &Path, adapter: Option<&Path>, place: &Place, strict: bool) -> anyhow::Result<Loaded> {
    let task = adapter.map(task::of_adapter).transpose()?.flatten();
    load_for(hub::resolve(model)?, adapter, place, task.map(|task| task.head()), strict)
}

/// Reads a model on the CPU, with a head for a task, which `head_follows` says that something else brings.
pub(crate) fn load_with_head(model: &Path, task: Option<Task>, head_follows: bool) -> anyhow::Result<Loaded> {
    let dir = hub::resolve(model)?;
    let model =
        lora_model::load_with(&dir, &Device::Cpu, &LoadOptions { task, head_follows, ..LoadOptions::default() })?;
    Ok(Loaded { dir, model, adapted: Adapted::none(&Device::Cpu)? })
}

fn load_for(
    dir: PathBuf,
    adapter: Option<&Path>,
    place: &Place,
    head: Option<Task>,
    strict: bool,
) -> anyhow::Result<Loaded> {
    let device = &place.device;
    let options =
        LoadOptions { dtype: place.dtype, task: head, head_follows: adapter.is_some(), ..LoadOptions::default() };
    let model = lora_model::load_with(&dir, device, &options)?;
    let adapted = match adapter {
        None => Adapted::none(device)?,
        Some(dir) => attach(dir, &*model, strict)?,
    };
    Ok(Loaded { dir, model, adapted })
}

fn attach(dir: &Path, model: &dyn Model, strict: bool) -> anyhow::Result<Adapted> {
    check_adapter(dir)?;
    let file = adapter::load(dir)?;
    if strict {
        file.check_same_base(model).with_context(|| format!("--strict: {}", dir.display()))?;
        say_unchecked(dir, file.base_fingerprint.as_deref());
    }
    Ok(file.attach(model, &model.device())?)
}

/// Says of an adapter that remembers no base that --strict could not check it.
pub(crate) fn say_unchecked(dir: &Path, base_fingerprint: Option<&str>) {
    if base_fingerprint.is_none() {
        ui::note(format_args!("--strict: {}: {}", dir.display(), adapter::UNCHECKED));
    }
}

fn check_adapter(dir: &Path) -> anyhow::Result<()> {
    if !adapter::is_adapter(dir) && dir.join(CONFIG_FILE).exists() {
        bail!("{} is a whole model, not an adapter: give it as --model", dir.display());
    }
    Ok(())
}
