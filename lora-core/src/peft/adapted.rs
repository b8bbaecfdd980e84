use std::collections::{BTreeMap, HashMap};

use lora_kernels::{DType, Device};

use super::{Adapter, Base, Linear, Method};
use crate::{Error, Init, ParamId, Params, ParamsBuilder, Result, Tape, Tensor, Var};

/// A method applied to one base: its parameters, which of the base's tensors train, and what is attached where. The
/// base itself is not held and never written.
#[derive(Debug)]
pub struct Adapted {
    /// The trainable parameters.
    pub params: Params,
    trained: HashMap<String, ParamId>,
    adapters: HashMap<String, Box<dyn Adapter>>,
    /// The sites with an adapter, in the base's order.
    sites: Vec<String>,
}

impl Adapted {
    /// Applies `method` to `base`; the parameters begin as the method says, drawn from `seed`.
    ///
    /// # Errors
    /// Options that do not fit the base, or a method that trains nothing on it.
    pub fn new(method: &dyn Method, base: &dyn Base, device: &Device, dtype: DType, seed: u64) -> Result<Adapted> {
        method.check(base)?;
        let mut builder = ParamsBuilder::new();
        let (mut trained, mut adapters, mut sites) = (HashMap::new(), HashMap::new(), Vec::new());
        for (name, tensor) in base.tensors() {
            if method.trains(name) {
                let id = builder.add(name, tensor.shape(), Init::Copy(tensor.clone()));
                trained.insert(name.to_owned(), id);
            }
        }
        for site in base.sites() {
            if let Some(adapter) = method.attach(site, &mut builder)? {
                adapters.insert(site.name.clone(), adapter);
                sites.push(site.name.clone());
            }
        }
        if builder.count() == 0 {
            return Err(Error::NothingTrainable { method: method.name().into() });
        }
        Ok(Adapted { params: builder.build(device, dtype, seed)?, trained, adapters, sites })
    }

    /// The bare base: nothing trains, nothing is attached.
    pub fn none(device: &Device) -> Result<Adapted> {
        let (trained, adapters) = (HashMap::new(), HashMap::new());
        Ok(Adapted { params: Params::none(device)?, trained, adapters, sites: Vec::new() })
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
        match self.adapters.get(site) {
            Some(a) => a.apply(t, x, base),
            None => base.apply(t, x),
        }
    }

    /// Number of sites with an adapter.
    pub fn site_count(&self) -> usize {
        self.sites.len()
    }

    /// The adapters' tensors to save, by PEFT's names: `{site}.lora_A.weight`.
    pub fn adapter_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        for site in &self.sites {
            for (name, tensor) in self.adapters[site].save(&self.params)? {
                all.push((format!("{site}.{name}"), tensor));
            }
        }
        Ok(all)
    }

    /// Takes over saved adapter tensors ([`Adapted::adapter_tensors`]).
    ///
    /// # Errors
    /// A missing tensor, one of a wrong shape, or one that nothing uses: an adapter takes effect wholly or not at all.
    pub fn load_adapter_tensors(&mut self, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
        // Into a copy: an error half way leaves everything as it was.
        let mut params = self.params.clone();
        for site in &self.sites {
            self.adapters[site].load(&mut params, site, &mut tensors)?;
        }
        if !tensors.is_empty() {
            return Err(Error::Unexpected { names: tensors.into_keys().collect() });
        }
        self.params = params;
        Ok(())
    }

    /// The base's tensors that this method changes, as they are now, under their names: those that train, and the weights
    /// that adapters are merged into. All others are the base's own.
    ///
    /// # Errors
    /// A kind of adapter that cannot be merged; [`Error::Merge`] for a weight or an adapter that is not finite.
    pub fn merged(&self, base: &dyn Base) -> Result<BTreeMap<String, Tensor>> {
        let mut changed: BTreeMap<String, Tensor> =
            self.trained.iter().map(|(name, &id)| (name.clone(), self.params.tensor(id))).collect();
        let tensors: HashMap<&str, &Tensor> = base.tensors().collect();
        for site in &self.sites {
            let name = format!("{site}.weight");
            // A method may train the very weight that it adapts.
            let w = changed.get(&name).or_else(|| tensors.get(name.as_str()).copied());
            let w = w.ok_or_else(|| Error::Missing { name: name.clone() })?;
            let merged = self.adapters[site].merge(&self.params, w).map_err(|e| match e {
                Error::LowRank(reason) => Error::Merge { name: name.clone(), reason },
                e => e,
            })?;
            let merged = merged.ok_or_else(|| Error::Structure {
                name: name.clone(),
                why: "this kind of adapter cannot be merged into a weight; keep it beside the base".into(),
            })?;
            changed.insert(name, merged);
        }
        Ok(changed)
    }
}
