use std::{collections::BTreeMap, ops::Range, sync::Arc};

use lora_kernels::{Device, axpby};

use super::{Adapted, Adapter, Attached, Linear, LinearAdapter, Outline};
use crate::{Error, Params, Result, Tape, Tensor, Var};

/// Rows that one head serves, and what it belongs to.
pub type HeadRows<'a> = (Range<usize>, &'a Adapted);

impl Adapted {
    /// Several adapters over one base in one pass, for inference: sequence i of every batch has adapter `of[i]` of these, or
    /// none. What they adapt may differ, and so may their ranks. The base's product is computed for all rows at once; an
    /// adapter that adds to it (LoRA) is computed for its own rows beside it, another (DoRA, IA³) with the base for those. So
    /// is a linear map that an adapter has trained whole, such as a classifier's head.
    ///
    /// # Errors
    /// [`Error::Mixed`] for an adapter that does more than to change linear maps: one that trains other tensors of the base,
    /// changes the stream or has virtual tokens.
    ///
    /// # Panics
    /// When `of` names an adapter that is not there.
    pub fn mixed(
        adapters: &[Arc<Adapted>],
        of: &[Option<usize>],
        outline: &Outline,
        device: &Device,
    ) -> Result<Adapted> {
        assert!(of.iter().flatten().all(|&i| i < adapters.len()), "adapters {of:?} of {}", adapters.len());
        for (i, adapter) in adapters.iter().enumerate() {
            if let Some(why) = adapter.more_than_linear(outline) {
                return Err(Error::Mixed { adapter: i, why });
            }
        }
        let mut mixed = Adapted::none(device)?;
        for adapter in adapters {
            let whole = adapter.trained().map(|name| (module(name), None));
            for (site, layer) in adapter.sites().chain(whole) {
                mixed.attach(site, layer, Box::new(Mixed { site: site.to_owned(), adapters: adapters.into() }));
            }
        }
        mixed.several = Some(Several { adapters: adapters.into(), of: of.into() });
        Ok(mixed)
    }

    /// Which of `rows` rows each head serves, where they have different adapters and some of those have changed the head
    /// with the weight `name`: neighbouring rows, and what their head belongs to. Otherwise one head serves all of them.
    ///
    /// # Errors
    /// [`Error::Structure`] where nothing says whose the rows are.
    pub fn heads(&self, t: &Tape, name: &str, rows: usize) -> Result<Option<Vec<HeadRows<'_>>>> {
        let Some(Several { adapters, .. }) = &self.several else { return Ok(None) };
        let has_own = |adapter: &Adapted| {
            let beside = adapter.attached(module(name)).is_some_and(|a| matches!(a, Attached::Head(_)));
            beside || adapter.trained().any(|trained| module(trained) == module(name))
        };
        if rows == 0 || !adapters.iter().any(|a| has_own(a)) {
            return Ok(None);
        }
        let shares = t.shares().ok_or_else(|| of_all(module(name)))?;
        let (mut heads, mut at): (Vec<HeadRows<'_>>, usize) = (Vec::new(), 0);
        for share in shares.iter().filter(|share| has_own(&adapters[share.adapter])) {
            heads.push((at..share.rows.start, self));
            heads.push((share.rows.clone(), &adapters[share.adapter]));
            at = share.rows.end;
        }
        heads.push((at..rows, self));
        heads.retain(|(rows, _)| !rows.is_empty());
        Ok(Some(heads))
    }

    /// The adapter of each sequence, where they have different ones.
    pub fn of_sequences(&self) -> Option<&[Option<usize>]> {
        self.several.as_ref().map(|several| &*several.of)
    }

    /// What is more than a change of linear maps, in words.
    fn more_than_linear(&self, outline: &Outline) -> Option<String> {
        if self.several.is_some() {
            return Some("it is several itself".into());
        }
        // What a classifier has for its head are linear maps too.
        let of_classifier = |name: &str| outline.task_type == Some("SEQ_CLS") && outline.is_saved_module(name);
        let linear = |name: &str| {
            let mut sites = outline.linear_sites().chain(outline.head_site());
            of_classifier(name) || sites.any(|(site, _)| site.name == module(name))
        };
        if let Some(name) = self.trained().find(|name| !linear(name)) {
            return Some(format!("it trains {name} of the base itself; run its texts alone"));
        }
        let change = |site: &str| matches!(self.attached(site), Some(Attached::Linear(_) | Attached::Head(_)));
        let other = self.sites().find(|(site, _)| !change(site));
        other.map(|(site, _)| format!("what it attaches at {site} is no change of a linear map; run its texts alone"))
    }
}

/// Several adapters of one batch.
#[derive(Debug)]
pub(super) struct Several {
    adapters: Arc<[Arc<Adapted>]>,
    /// The one of each sequence.
    of: Box<[Option<usize>]>,
}

/// The module that a tensor belongs to.
fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// Refuses rows that are no sequence's.
fn of_all(site: &str) -> Error {
    let why = "its rows belong to all sequences, which have different adapters; run the texts of each alone".into();
    Error::Structure { name: site.to_owned(), why }
}

/// What several adapters do to one linear map.
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
        let shares = t.shares().ok_or_else(|| of_all(&self.site))?;
        let mut y = base.apply(t, x)?.into_value();
        for share in shares.iter() {
            let adapted = &self.adapters[share.adapter];
            let whole = adapted.trained().any(|name| module(name) == self.site);
            let own = x.value().rows_in(share.rows.clone());
            match adapted.linear(&self.site) {
                None if !whole => continue,
                Some(adapter) if !whole => {
                    let y = y.make_mut()?.rows_in(share.rows.clone());
                    if adapter.add(&adapted.params, own.mat(), y)? {
                        continue;
                    }
                }
                _ => {}
            }
            let mut t = Tape::inference(&adapted.params);
            let weight = |name: &str, of: &Var| adapted.weight(&t, &format!("{}.{name}", self.site), of.value());
            let bias = base.bias.as_ref().map(|b| weight("bias", b)).transpose()?;
            let base = Linear { w: weight("weight", &base.w)?, layout: base.layout, bias };
            let own = t.constant(&own);
            let own = adapted.project(&mut t, &self.site, &own, &base)?;
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
