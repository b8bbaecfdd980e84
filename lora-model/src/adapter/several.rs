use std::{collections::BTreeMap, path::Path, sync::Arc};

use lora_core::peft::{Adapted, Base};
use lora_kernels::Device;

use super::attach;
use crate::{Error, Result};

/// Adapters over one base, by name: loaded and replaced while others are in use, handed out one by one, or put together for
/// a batch whose sequences have different ones. The base holds nothing of them, and nothing of it is written.
///
/// ```
/// # use std::path::Path;
/// # use lora_core::peft::{Adapted, Lora, LoraConfig};
/// # use lora_kernels::{DType, Device};
/// # use lora_model::{Gpt2, adapter::Adapters, config::Gpt2Config, generate::{GenerationConfig, generate}};
/// # let small = Gpt2Config { vocab_size: 40, n_positions: 24, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::small() };
/// # let model = Gpt2::init(small, Path::new(""), 0, &Device::Cpu)?;
/// # let lora = |rank| Lora::new(LoraConfig { rank, ..LoraConfig::default() });
/// # let german = Adapted::new(&lora(4)?, &model, &Device::Cpu, DType::F32, 1)?;
/// # let french = Adapted::new(&lora(8)?, &model, &Device::Cpu, DType::F32, 2)?;
/// let mut adapters = Adapters::new();
/// adapters.insert("de", german); // or `load("de", folder, &model, &device)`
/// adapters.insert("fr", french);
///
/// // Three prompts in one batch: one in German, one in French, one by the bare base.
/// let mixed = adapters.mixed(&[Some("de"), Some("fr"), None], &model, &Device::Cpu)?;
/// let texts = generate(&model, &mixed, &[vec![1, 2], vec![3], vec![1, 2]], &GenerationConfig::default(), None)?;
/// assert_eq!(texts.len(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Adapters {
    loaded: BTreeMap<String, Arc<Adapted>>,
}

impl Adapters {
    /// None yet.
    pub fn new() -> Adapters {
        Adapters::default()
    }

    /// Loads the adapter in a folder under a name. What had that name is given back, and whoever uses it goes on with it.
    ///
    /// # Errors
    /// Those of [`attach`]; all is then as it was.
    pub fn load(&mut self, name: &str, dir: &Path, base: &dyn Base, device: &Device) -> Result<Option<Arc<Adapted>>> {
        let adapted = attach(dir, base, device)?;
        Ok(self.insert(name, adapted))
    }

    /// An adapter under a name, as [`Adapters::load`].
    pub fn insert(&mut self, name: &str, adapted: Adapted) -> Option<Arc<Adapted>> {
        self.loaded.insert(name.to_owned(), Arc::new(adapted))
    }

    /// Takes one away; whoever uses it goes on with it.
    pub fn remove(&mut self, name: &str) -> Option<Arc<Adapted>> {
        self.loaded.remove(name)
    }

    /// The names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.loaded.keys().map(String::as_str)
    }

    /// The adapter of that name: to generate with, to evaluate, or to merge.
    ///
    /// # Errors
    /// [`Error::Adapters`] with the names that there are.
    pub fn get(&self, name: &str) -> Result<&Arc<Adapted>> {
        self.loaded.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            let there =
                if names.is_empty() { "none is loaded".into() } else { format!("there are {}", names.join(", ")) };
            Error::Adapters { problem: format!("there is no adapter `{name}`; {there}") }
        })
    }

    /// For batches on `base` whose sequence i has adapter `of[i]`, or none: see [`Adapted::mixed`].
    ///
    /// # Errors
    /// [`Error::Adapters`] for a name that is not there, and for an adapter that cannot share a batch.
    pub fn mixed(&self, of: &[Option<&str>], base: &dyn Base, device: &Device) -> Result<Adapted> {
        let mut names: Vec<&str> = of.iter().copied().flatten().collect();
        names.sort_unstable();
        names.dedup();
        let adapters = names.iter().map(|name| self.get(name).cloned()).collect::<Result<Vec<_>>>()?;
        let number = |name: &Option<&str>| name.map(|name| names.partition_point(|n| *n < name));
        let of: Vec<Option<usize>> = of.iter().map(number).collect();
        Adapted::mixed(&adapters, &of, base.outline(), device).map_err(|e| match e {
            lora_core::Error::Mixed { adapter, why } => {
                let problem = format!("adapter `{}` cannot share a batch with others: {why}", names[adapter]);
                Error::Adapters { problem }
            }
            e => e.into(),
        })
    }
}
