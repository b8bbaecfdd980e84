use std::{collections::BTreeMap, sync::Arc};

use lora_kernels::{Device, axpby};

use super::{Adapted, Adapter, Linear, LinearAdapter};
use crate::{Error, Params, Result, Tape, Tensor, Var};

impl Adapted {
    /// Several adapters over one base in one pass, for inference: sequence i of every batch has adapter `of[i]` of these, or
    /// none. What they adapt may differ, and so may their ranks. The base's product is computed for all rows at once; an
    /// adapter that adds to it (LoRA) is computed for its own rows beside it, another (DoRA, IA³) with the base for those.
    ///
    /// # Errors
    /// [`Error::Mixed`] for an adapter that does more than to adapt linear maps: one that trains tensors of the base itself,
    /// changes the stream or has virtual tokens.
    ///
    /// # Panics
    /// When `of` names an adapter that is not there.
    pub fn mixed(adapters: &[Arc<Adapted>], of: &[Option<usize>], device: &Device) -> Result<Adapted> {
        assert!(of.iter().flatten().all(|&i| i < adapters.len()), "adapters {of:?} of {}", adapters.len());
        for (i, adapter) in adapters.iter().enumerate() {
            if let Some(why) = adapter.more_than_linear() {
                return Err(Error::Mixed { adapter: i, why });
            }
        }
        let mut mixed = Adapted::none(device)?;
        for (site, layer) in adapters.iter().flat_map(|a| a.sites()) {
            mixed.attach(site, layer, Box::new(Mixed { site: site.to_owned(), adapters: adapters.into() }));
        }
        mixed.of_sequences = Some(of.into());
        Ok(mixed)
    }

    /// The adapter of each sequence, where they have different ones.
    pub fn of_sequences(&self) -> Option<&[Option<usize>]> {
        self.of_sequences.as_deref()
    }

    /// What is more than adapters beside linear maps, in words.
    fn more_than_linear(&self) -> Option<String> {
        if self.of_sequences.is_some() {
            return Some("it is several itself".into());
        }
        if let Some(name) = self.trained().next() {
            return Some(format!("it trains {name} of the base itself; run its texts alone"));
        }
        let other = self.sites().find(|(site, _)| self.linear(site).is_none());
        other.map(|(site, _)| format!("what it attaches at {site} is no change of a linear map; run its texts alone"))
    }
}

/// What several adapters attach to one linear map.
#[derive(Debug)]
struct Mixed {
    site: String,
    adapters: Arc<[Arc<Adapted>]>,
}

impl Mixed {
    fn not_one(&self) -> Error {
        let why = "the rows of a batch have different adapters here; save, load or merge each by itself".into();
        Error::Structure { name: self.site.clone(), why }
    }
}

impl LinearAdapter for Mixed {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        assert!(!x.is_tracked() && !base.w.is_tracked(), "a batch with several adapters is for inference");
        let Some(shares) = t.shares() else {
            let why =
                "its rows belong to all sequences, which have different adapters; run the texts of each alone".into();
            return Err(Error::Structure { name: self.site.clone(), why });
        };
        let mut y = base.apply(t, x)?.into_value();
        for share in shares.iter() {
            let adapted = &self.adapters[share.adapter];
            let Some(adapter) = adapted.linear(&self.site) else { continue };
            let own = x.value().rows_in(share.rows.clone());
            if adapter.add(&adapted.params, own.mat(), y.make_mut()?.rows_in(share.rows.clone()))? {
                continue;
            }
            let mut t = Tape::inference(&adapted.params);
            let own = t.constant(&own);
            let own = adapter.apply(&mut t, &own, base)?;
            axpby(1.0, own.value().mat(), 0.0, y.make_mut()?.rows_in(share.rows.clone()))?;
        }
        Ok(t.constant(&y))
    }

    fn merge(&self, _params: &Params, _w: &Tensor) -> Result<Tensor> {
        Err(self.not_one())
    }
}

impl Adapter for Mixed {
    fn save(&self, _params: &Params) -> Result<Vec<(String, Tensor)>> {
        Err(self.not_one())
    }

    fn load(&self, _params: &mut Params, _site: &str, _tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        Err(self.not_one())
    }
}
