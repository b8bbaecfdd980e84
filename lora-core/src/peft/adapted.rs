use std::{
    collections::{BTreeMap, HashMap},
    mem,
};

use lora_kernels::{DType, Device};

use super::{
    Attached, Base, BaseTensor, Budget, Layers, Linear, LinearAdapter, Method, Norm, Outline, Plan, VirtualTokens,
    join, mixed::Several,
};
use crate::{Error, Grads, Init, ParamId, Params, ParamsBuilder, Result, Tape, Tensor, Var, ops};

/// A method applied to one base: its parameters, which of the base's tensors train, and what is attached where. The
/// base itself is not held and never written.
#[derive(Debug)]
pub struct Adapted {
    /// The trainable parameters.
    pub params: Params,
    trained: BTreeMap<String, ParamId>,
    places: Places,
    budget: Option<Budget>,
    /// Where it is several ([`Adapted::mixed`]).
    pub(super) several: Option<Several>,
}

/// What is attached where.
#[derive(Debug, Default)]
struct Places {
    /// By the name of the site, or of an embedding by that of its weight: virtual tokens have the site's name there.
    attached: HashMap<String, Attached>,
    /// The sites with an adapter, in the base's order.
    sites: Vec<Place>,
    tokens: Option<String>,
    keys_values: Option<String>,
}

/// A site with an adapter.
#[derive(Debug)]
struct Place {
    /// The site's name.
    site: String,
    /// Its key among what is attached.
    key: String,
    layer: Option<usize>,
}

/// What `method` trains on a base that looks like this: names and shapes, before any memory is taken.
fn plan(
    method: &dyn Method,
    outline: &Outline,
    base: Option<&dyn Base>,
    seed: u64,
) -> Result<(ParamsBuilder, BTreeMap<String, ParamId>, Places)> {
    method.check(outline)?;
    let mut plan = Plan { params: ParamsBuilder::new(), outline, base, seed, shared: BTreeMap::new() };
    let (mut trained, mut places) = (BTreeMap::new(), Places::default());
    for tensor in &outline.tensors {
        if method.trains(tensor, outline) || outline.is_saved_module(&tensor.name) {
            let init = plan.base_tensor(&tensor.name).map_or(Init::Zeros, |t| Init::Copy(t.clone()));
            let id = plan.add(&tensor.name, &tensor.shape, init);
            trained.insert(tensor.name.clone(), id);
        }
    }
    let of_tensors = plan.params.count();
    for site in &outline.sites {
        let Some(attached) = method.attach(site, &mut plan)? else { continue };
        match attached {
            Attached::Tokens(_) => places.tokens = Some(site.name.clone()),
            Attached::KeysValues(_) => places.keys_values = Some(site.name.clone()),
            _ => {}
        }
        let key = match attached {
            Attached::Embedding(_) => format!("{}.weight", site.name),
            _ => site.name.clone(),
        };
        places.attached.insert(key.clone(), attached);
        places.sites.push(Place { site: site.name.clone(), key, layer: site.layer });
    }
    if places.tokens.is_some() && places.keys_values.is_some() {
        let (method, architecture) = (method.name().into(), outline.architecture.clone());
        let why = "virtual tokens stand among the tokens or in attention alone, not in both".into();
        return Err(Error::DoesNotFit { method, architecture, why });
    }
    // A head that trains with every method is none of the method's own doing.
    let own = |t: &&BaseTensor| method.trains(t, outline);
    if plan.params.count() == of_tensors && !outline.tensors.iter().any(|t| own(&t)) {
        let (method, architecture) = (method.name().into(), outline.architecture.clone());
        return Err(Error::NothingTrainable { method, architecture });
    }
    Ok((plan.params, trained, places))
}

/// The names and shapes of all that `method` trains on a base that looks like this, its head included. Takes no memory for
/// weights.
///
/// # Errors
/// Those of [`Adapted::new`].
pub fn parameters(method: &dyn Method, outline: &Outline) -> Result<Vec<(String, Vec<usize>)>> {
    Ok(plan(method, outline, None, 0)?.0.into_shapes())
}

/// How many scalars `method` trains on a base that looks like this, its head included. Takes no memory for weights.
///
/// # Errors
/// Those of [`Adapted::new`].
pub fn trainable(method: &dyn Method, outline: &Outline) -> Result<usize> {
    Ok(plan(method, outline, None, 0)?.0.count())
}

impl Adapted {
    /// Applies `method` to `base`; the parameters begin as the method says, drawn from `seed`. They lie on `device`, where the
    /// base is, and are computed with in `dtype`, which is the base's ([`Base::dtype`]); beside a base of 16 bits they are kept
    /// in f32.
    ///
    /// Tensors of the base that train begin at its values. Of a base that was loaded in 16 bits, [`Adapted::begin_at`] gives
    /// them the digits that it lost.
    ///
    /// # Errors
    /// Options that do not fit the base, or a method that trains nothing on it.
    pub fn new(method: &dyn Method, base: &dyn Base, device: &Device, dtype: DType, seed: u64) -> Result<Adapted> {
        let (builder, trained, places) = plan(method, base.outline(), Some(base), seed)?;
        let (mut params, mut budget) = (builder.build(device, dtype, seed)?, method.budget(base.outline())?);
        for Place { site, key, .. } in &places.sites {
            if let Attached::Linear(adapter) = &places.attached[key]
                && let Some(w) = base.tensor(&format!("{site}.weight"))
            {
                adapter.begin(&mut params, w)?;
            }
        }
        if let Some(budget) = &mut budget {
            budget.bind(&params)?;
        }
        Ok(Adapted { params, trained, places, budget, several: None })
    }

    /// The bare base: nothing trains, nothing is attached.
    pub fn none(device: &Device) -> Result<Adapted> {
        let (params, places) = (Params::none(device)?, Places::default());
        Ok(Adapted { params, trained: BTreeMap::new(), places, budget: None, several: None })
    }

    /// The sites with an adapter, each by its key among what is attached, with its layer.
    pub(super) fn sites(&self) -> impl Iterator<Item = (&str, Option<usize>)> {
        self.places.sites.iter().map(|place| (place.key.as_str(), place.layer))
    }

    /// What is attached at a site, by its key.
    pub(super) fn attached(&self, site: &str) -> Option<&Attached> {
        self.places.attached.get(site)
    }

    /// What is attached to the linear map of a site.
    pub(super) fn linear(&self, site: &str) -> Option<&dyn LinearAdapter> {
        match self.attached(site) {
            Some(Attached::Linear(a)) => Some(a.as_ref()),
            _ => None,
        }
    }

    /// Attaches something to a linear map, unless there is something already.
    pub(super) fn attach(&mut self, site: &str, layer: Option<usize>, attached: Box<dyn LinearAdapter>) {
        if !self.places.attached.contains_key(site) {
            self.places.attached.insert(site.to_owned(), Attached::Linear(attached));
            self.places.sites.push(Place { site: site.to_owned(), key: site.to_owned(), layer });
        }
    }

    /// A weight of the base as a variable of the tape: trainable when the method trains it, else the constant `base`.
    pub fn weight(&self, t: &Tape, name: &str, base: &Tensor) -> Result<Var> {
        match self.trained.get(name) {
            Some(&id) => t.param(id),
            None => Ok(t.constant(base)),
        }
    }

    /// The output of a site's linear map, with what is attached there.
    pub fn project(&self, t: &mut Tape, site: &str, x: &Var, base: &Linear) -> Result<Var> {
        match self.linear(site) {
            Some(a) => a.apply(t, x, base),
            None => base.apply(t, x),
        }
    }

    /// The rows of the table of embeddings with the weight `name` that `ids` name, with what is attached there.
    pub fn embed(&self, t: &mut Tape, name: &str, table: &Var, ids: &Tensor) -> Result<Var> {
        match self.places.attached.get(name) {
            Some(Attached::Embedding(a)) => a.apply(t, table, ids),
            _ => ops::gather(t, table, ids),
        }
    }

    /// What adds to the logits of the output head with the weight `name`, of its input x.
    pub fn beside_head(&self, t: &mut Tape, name: &str, x: &Var) -> Result<Vec<ops::BesideHead>> {
        match name.strip_suffix(".weight").and_then(|site| self.places.attached.get(site)) {
            Some(Attached::Head(a)) => a.beside(t, x),
            _ => Ok(Vec::new()),
        }
    }

    /// The stream after a sublayer with output f, where it was x before, with what is attached there; `norm` follows in
    /// architectures that normalise after the sum.
    pub fn join(&self, t: &mut Tape, site: &str, x: Var, f: Var, norm: Norm) -> Result<Var> {
        match self.places.attached.get(site) {
            Some(Attached::Sublayer(a)) => a.join(t, x, f, norm),
            _ => join(t, x, f, norm),
        }
    }

    /// The virtual tokens that stand among the tokens: all layers compute them.
    pub fn stream_tokens(&self) -> VirtualTokens {
        match self.places.tokens.as_ref().map(|site| &self.places.attached[site]) {
            Some(Attached::Tokens(a)) => a.virtual_tokens(),
            _ => VirtualTokens::default(),
        }
    }

    /// Their embeddings [prefix + infix, width].
    pub fn token_embeddings(&self, t: &mut Tape) -> Result<Option<Var>> {
        match self.places.tokens.as_ref().map(|site| &self.places.attached[site]) {
            Some(Attached::Tokens(a)) => a.embeddings(t).map(Some),
            _ => Ok(None),
        }
    }

    /// The virtual tokens of which there are only keys and values.
    pub fn attention_tokens(&self) -> VirtualTokens {
        match self.places.keys_values.as_ref().map(|site| &self.places.attached[site]) {
            Some(Attached::KeysValues(a)) => a.virtual_tokens(),
            _ => VirtualTokens::default(),
        }
    }

    /// Their keys and values [prefix + infix, layers · 2 · cols]: for each layer its keys, then its values.
    pub fn keys_values(&self, t: &mut Tape) -> Result<Option<Var>> {
        match self.places.keys_values.as_ref().map(|site| &self.places.attached[site]) {
            Some(Attached::KeysValues(a)) => a.keys_values(t).map(Some),
            _ => Ok(None),
        }
    }

    /// Number of sites with an adapter.
    pub fn site_count(&self) -> usize {
        self.places.sites.len()
    }

    /// The names of the base's tensors that train.
    pub fn trained(&self) -> impl Iterator<Item = &str> {
        self.trained.keys().map(String::as_str)
    }

    /// Lets the base's tensors that train begin at the values of another copy of the base, one with more digits.
    ///
    /// # Errors
    /// [`Error::Missing`] for a tensor that the copy lacks, and what copying to the device can cause.
    pub fn begin_at(&mut self, base: &dyn Base) -> Result<()> {
        for (name, &id) in &self.trained {
            let value = base.tensor(name).ok_or_else(|| Error::Missing { name: name.clone() })?;
            self.params.set(id, value)?;
        }
        Ok(())
    }

    /// Takes the adapters out of some layers, for inference (AdapterDrop, Rücklé et al. 2021): their parameters stay, and
    /// nothing uses them.
    ///
    /// # Errors
    /// [`Error::Option`] for layers that the base does not have, or that have no adapter; nothing is dropped then.
    pub fn drop_layers(&mut self, layers: &Layers, outline: &Outline) -> Result<()> {
        const OPTION: &str = "drop-layers";
        let dropped = layers.of(OPTION, outline.layers)?;
        if let Some(layer) = dropped.iter().find(|n| !self.places.sites.iter().any(|p| p.layer == Some(**n))) {
            let why = format!("layer {layer} has no adapter that could be dropped");
            return Err(Error::Option { option: OPTION, value: layers.to_string(), why });
        }
        let gone = |layer: Option<usize>| layer.is_some_and(|layer| dropped.contains(&layer));
        let (gone, left): (Vec<_>, Vec<_>) =
            mem::take(&mut self.places.sites).into_iter().partition(|p: &Place| gone(p.layer));
        self.places.sites = left;
        for place in gone {
            self.places.attached.remove(&place.key);
        }
        Ok(())
    }

    /// How ranks are chosen while the method trains, where it does that.
    pub fn budget(&self) -> Option<&Budget> {
        self.budget.as_ref()
    }

    /// The same, to set its state.
    pub fn budget_mut(&mut self) -> Option<&mut Budget> {
        self.budget.as_mut()
    }

    /// Says how many steps training has, before the first of them.
    ///
    /// # Errors
    /// [`Error::Option`] where the method has a schedule that does not fit into them.
    pub fn set_total_steps(&mut self, steps: u64) -> Result<()> {
        self.budget.as_mut().map_or(Ok(()), |budget| budget.set_total_step(steps))
    }

    /// What the method adds to the loss of each optimiser step \[1\].
    pub fn penalty(&self, t: &mut Tape) -> Result<Option<Var>> {
        self.budget.as_ref().map_or(Ok(None), |budget| budget.penalty(t))
    }

    /// What the method does after the optimiser's step `step`, counted from 1, in which `grads` times `factor` were applied.
    ///
    /// # Errors
    /// What reading from a device can cause.
    pub fn after_step(&mut self, step: u64, grads: &mut Grads, factor: f64) -> Result<()> {
        match &mut self.budget {
            Some(budget) => budget.allocate(step, &mut self.params, grads, factor),
            None => Ok(()),
        }
    }

    /// The tensors to save: of the adapters by PEFT's names (`{site}.lora_A.weight`), of the base's own that train by
    /// theirs.
    pub fn adapter_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all: Vec<_> = self.trained.iter().map(|(name, &id)| (name.clone(), self.params.tensor(id))).collect();
        for Place { site, key, .. } in &self.places.sites {
            for (name, tensor) in self.places.attached[key].adapter().save(&self.params)? {
                all.push((format!("{site}.{name}"), tensor));
            }
        }
        match &self.budget {
            Some(budget) => budget.cut(all),
            None => Ok(all),
        }
    }

    /// Takes over saved tensors ([`Adapted::adapter_tensors`]).
    ///
    /// # Errors
    /// A missing tensor, one of a wrong shape, or one that nothing uses: an adapter takes effect wholly or not at all.
    pub fn load_adapter_tensors(&mut self, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
        // Into a copy: an error half way leaves everything as it was.
        let mut params = self.params.clone();
        for (name, &id) in &self.trained {
            let value = super::take(&mut tensors, name, params.shape(id))?;
            params.set(id, &value)?;
        }
        for Place { site, key, .. } in &self.places.sites {
            self.places.attached[key].adapter().load(&mut params, site, &mut tensors)?;
        }
        if !tensors.is_empty() {
            return Err(Error::Unexpected { names: tensors.into_keys().collect() });
        }
        self.params = params;
        Ok(())
    }

    /// Whether the base can take the adapter into its weights, so that nothing is left beside it.
    pub fn is_mergeable(&self) -> bool {
        self.places
            .attached
            .values()
            .all(|a| matches!(a, Attached::Linear(_) | Attached::Embedding(_) | Attached::Head(_)))
    }

    /// The base's tensors that this method changes, as they are now, under their names: those that train, and the weights
    /// that adapters are merged into. All others are the base's own. Where the table of an embedding is the output head's
    /// matrix too, which the adapter leaves as it is, that is among them as `lm_head.weight`, a tensor of its own.
    ///
    /// # Errors
    /// A kind of adapter that cannot be merged; [`Error::Merge`] for a weight or an adapter that is not finite.
    pub fn merged(&self, base: &dyn Base) -> Result<BTreeMap<String, Tensor>> {
        let mut changed: BTreeMap<String, Tensor> =
            self.trained.iter().map(|(name, &id)| (name.clone(), self.params.tensor(id))).collect();
        let tensors: HashMap<&str, &Tensor> = base.tensors().collect();
        let mut head: Option<(String, Tensor)> = None;
        for Place { site, key, .. } in &self.places.sites {
            let name = format!("{site}.weight");
            // A method may train the very weight that it adapts.
            let w = changed.get(&name).or_else(|| tensors.get(name.as_str()).copied());
            let weight = || w.ok_or_else(|| Error::Missing { name: name.clone() });
            let merged = match &self.places.attached[key] {
                Attached::Linear(adapter) => adapter.merge(&self.params, weight()?),
                Attached::Head(adapter) => adapter.merge(&self.params, weight()?),
                Attached::Embedding(adapter) => {
                    head = head.or(untied_head(base, &name)?);
                    adapter.merge(&self.params, weight()?)
                }
                _ => {
                    return Err(Error::Structure {
                        name: site.clone(),
                        why: "this kind of adapter is no change of a weight, so it cannot be merged into one; keep it \
                              beside the base"
                            .into(),
                    });
                }
            };
            let merged = merged.map_err(|e| match e {
                Error::LowRank(reason) => Error::Merge { name: name.clone(), reason },
                e => e,
            })?;
            changed.insert(name, merged);
            let Attached::Linear(adapter) = &self.places.attached[key] else { continue };
            let name = format!("{site}.bias");
            if let Some(b) = changed.get(&name).or_else(|| tensors.get(name.as_str()).copied())
                && let Some(merged) = adapter.merge_bias(&self.params, b)?
            {
                changed.insert(name, merged);
            }
        }
        changed.extend(head);
        Ok(changed)
    }
}

/// The name and the matrix of an output head of its own, where that of the base is the table of embeddings of this name,
/// which changes without it.
///
/// # Errors
/// [`Error::Structure`] for a head that can have none.
pub fn untied_head(base: &dyn Base, table: &str) -> Result<Option<(String, Tensor)>> {
    let outline = base.outline();
    if outline.tied_embedding() != Some(table) {
        return Ok(None);
    }
    if outline.task_type != Some("CAUSAL_LM") {
        let why = "the head that fills in tokens has it for its matrix too, which the adapter does not change, and can have no \
                   other; keep the adapter beside the base";
        return Err(Error::Structure { name: table.into(), why: why.into() });
    }
    let own = base.tensor(table).ok_or_else(|| Error::Missing { name: table.into() })?;
    Ok(Some(("lm_head.weight".into(), own.clone())))
}
