use super::{Attached, BaseTensor, Layers, Method, Outline, Pfeiffer, Plan, Site, Start};
use crate::{Error, Result};

const OPTION: &str = "drop-layers";

/// Adapter_D: [`Pfeiffer`]'s adapters, but none in some layers, by default the lowest (AdapterDrop, Rücklé et al. 2021,
/// section 3). Those layers cost nothing, and the backward pass ends above them.
///
/// By default the lowest ⌊5·L/12⌋ of L layers have none: five of RoBERTa base's twelve, as that paper recommends. The LoRA
/// paper's 894,528 scalars with r = 48 there are those of all twelve layers, with nothing dropped. Adapters that were
/// trained can be dropped at inference too, by [`Adapted::drop_layers`](super::Adapted::drop_layers).
#[derive(Clone, Debug)]
pub struct AdapterDrop {
    adapter: Pfeiffer,
    dropped: Option<Layers>,
}

impl AdapterDrop {
    /// The adapters of `adapter` without those of the layers `dropped`; `None` is the default above.
    ///
    /// # Errors
    /// [`Error::Option`] when all layers are dropped.
    pub fn new(adapter: Pfeiffer, dropped: Option<Layers>) -> Result<AdapterDrop> {
        match dropped {
            Some(Layers::All) => Err(all("all".into())),
            dropped => Ok(AdapterDrop { adapter, dropped }),
        }
    }

    fn dropped(&self, outline: &Outline) -> Result<Vec<usize>> {
        let lowest = || Layers::First(5 * outline.layers / 12);
        self.dropped.clone().unwrap_or_else(lowest).of(OPTION, outline.layers)
    }
}

fn all(value: String) -> Error {
    let why = "an adapter has to be left in at least one layer".into();
    Error::Option { option: OPTION, value, why }
}

impl Method for AdapterDrop {
    fn name(&self) -> &'static str {
        "adapter-d"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.adapter.check_as(self.name(), outline)?;
        match (self.dropped(outline)?.len() == outline.layers, &self.dropped) {
            (true, Some(layers)) => Err(all(layers.to_string())),
            _ => Ok(()),
        }
    }

    fn trains(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        self.adapter.trains(tensor, outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let dropped = self.dropped(plan.outline())?;
        match site.layer.is_some_and(|layer| dropped.contains(&layer)) {
            true => Ok(None),
            false => self.adapter.attach(site, plan),
        }
    }

    fn start(&self) -> Start {
        self.adapter.start()
    }
}
