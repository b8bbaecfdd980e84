//! An adapter out of a model that was fine-tuned whole.

use std::collections::{BTreeMap, BTreeSet};

use lora_core::{
    Tensor,
    lowrank::{self, Layout, Truncated},
    peft::{Base, Outline, names},
};
use lora_kernels::DType;
use rayon::prelude::*;

use super::{Update, Updates, updates::short_name};
use crate::{Error, Result, error::List, fingerprint};

/// An adapter that was taken out of a tuned model, and what of the tuning it does not hold.
#[derive(Clone, Debug)]
pub struct Extraction {
    /// The adapter. Modules that a model trains whole (a classifier's head) are in it as they are in the tuned model.
    pub updates: Updates,
    /// What each update holds, by module.
    pub modules: BTreeMap<String, Extracted>,
    /// The tensors that changed and that no adapter of these targets can hold, with ‖W' − W‖_F of each, largest first.
    pub left: Vec<(String, f64)>,
}

/// How well an update of low rank stands for W' − W.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extracted {
    /// ‖W‖_F of the base.
    pub base: f64,
    /// ‖W' − W‖_F.
    pub change: f64,
    /// ‖W' − W − B·A‖_F, the least that the rank allows.
    pub error: f64,
}

impl Extraction {
    /// √(Σ error² / Σ change²) over the adapter's modules; 0 where nothing changed.
    pub fn relative_error(&self) -> f64 {
        let (error, change) = self.squares();
        ratio(error, change)
    }

    /// The same over everything that changed: what is left counts as error.
    pub fn relative_error_of_all(&self) -> f64 {
        let left: f64 = self.left.iter().map(|(_, norm)| norm * norm).sum();
        let (error, change) = self.squares();
        ratio(error + left, change + left)
    }

    fn squares(&self) -> (f64, f64) {
        let sum = |of: fn(&Extracted) -> f64| self.modules.values().map(|m| of(m).powi(2)).sum();
        (sum(|m| m.error), sum(|m| m.change))
    }
}

/// A module that an update can be of.
#[derive(Clone)]
struct Place<'a> {
    site: &'a str,
    weight: String,
    layout: Layout,
    embedding: bool,
}

impl Place<'_> {
    fn new(site: &str, layout: Layout, embedding: bool) -> Place<'_> {
        Place { site, weight: format!("{site}.weight"), layout, embedding }
    }
}

fn ratio(error: f64, change: f64) -> f64 {
    if change > 0.0 { (error / change).sqrt() } else { 0.0 }
}

/// The adapter of rank `rank` that is nearest to what `tuned` changed in `base`: of each module that `targets` name, the
/// singular directions of W' − W with the largest values (Eckart and Young 1936), or all where it has fewer. Targets are linear
/// maps, an output head with a matrix of its own, and embeddings that are not the head's matrix too; without any they are
/// all linear maps but the head that changed in at least one layer. `watch` is told of each module that is done.
///
/// Takes an SVD of each weight, O(out·in·min(out, in)).
///
/// # Errors
/// [`Error::Adapters`] for models that differ in more than their numbers, for targets that name nothing or only a part of a
/// module, and when nothing changed; for a rank of 0; for a weight that is no number.
pub fn extract(
    base: &dyn Base,
    tuned: &dyn Base,
    rank: usize,
    targets: &[String],
    watch: &(dyn Fn(&str) + Sync),
) -> Result<Extraction> {
    if rank == 0 {
        return refused("a rank is at least 1".into());
    }
    let outline = base.outline();
    check_alike(outline, tuned.outline())?;
    let before: BTreeMap<&str, &Tensor> = base.tensors().collect();
    let after: BTreeMap<&str, &Tensor> = tuned.tensors().collect();
    let mut left: BTreeMap<&str, f64> = BTreeMap::new();
    for (name, w) in before.iter().filter(|(name, _)| !outline.is_saved_module(name)) {
        let change = change(w, after[name])?;
        if !change.is_finite() {
            return refused(format!("tensor {name} holds a NaN or an infinity in one of the two models"));
        }
        if change > 0.0 {
            left.insert(name, change);
        }
    }
    let linear: Vec<Place> =
        outline.linear_sites().map(|(s, linear)| Place::new(&s.name, linear.layout, false)).collect();
    let head = outline.head_site().map(|(s, linear)| Place::new(&s.name, linear.layout, false));
    // An embedding's weight is stored [tokens, width]: as inputs and outputs.
    let embeddings = outline.embedding_sites().map(|(s, _)| Place::new(&s.name, Layout::InOut, true));
    let tied = outline.tied_embedding();
    let embeddings = embeddings.filter(|place| tied != Some(place.weight.as_str()));
    let places: Vec<Place> = linear.iter().cloned().chain(head).chain(embeddings).collect();
    let targets = match targets {
        [] => {
            let changed = linear.iter().filter(|place| left.contains_key(place.weight.as_str()));
            let of_changed: BTreeSet<&str> = changed.map(|place| short_name(place.site)).collect();
            of_changed.into_iter().map(str::to_owned).collect()
        }
        named => named.to_vec(),
    };
    if targets.is_empty() {
        return refused(match left.is_empty() {
            true => "the tuned model is the base: nothing changed".to_owned(),
            false => format!(
                "no linear map changed, so LoRA could hold nothing of it; what changed: {}",
                List(&left.keys().map(|n| n.to_string()).collect::<Vec<_>>())
            ),
        });
    }
    for target in &targets {
        if !places.iter().any(|place| names(target, place.site)) {
            let all: BTreeSet<&str> = places.iter().map(|place| short_name(place.site)).collect();
            let all: Vec<&str> = all.into_iter().collect();
            return refused(format!(
                "target {target} names nothing that LoRA could hold of this model; that is {}",
                all.join(", ")
            ));
        }
    }
    let chosen: Vec<&Place> = places.iter().filter(|place| targets.iter().any(|t| names(t, place.site))).collect();
    let one = |&&Place { site, ref weight, layout, embedding }: &&Place| -> Result<(String, Update, Extracted)> {
        let name = weight;
        let bad = |reason| Error::Core(lora_core::Error::Merge { name: name.clone(), reason });
        let w = before[name.as_str()].to_array()?.mapv(f64::from);
        let delta = after[name.as_str()].to_array()?.mapv(f64::from) - &w;
        let delta = match layout {
            Layout::OutIn => delta.view(),
            Layout::InOut => delta.t(),
        };
        let norm = |m: &mut dyn Iterator<Item = &f64>| m.map(|x| x * x).sum::<f64>().sqrt();
        let rank = rank.min(delta.nrows()).min(delta.ncols());
        let Truncated { adapter, error } = lowrank::truncate(delta, rank).and_then(narrow).map_err(bad)?;
        let extracted = Extracted { base: norm(&mut w.iter()), change: norm(&mut delta.iter()), error };
        watch(site);
        Ok((site.to_owned(), Update { delta: adapter, embedding }, extracted))
    };
    // Of several errors always the first is told.
    let done: Vec<Result<_>> = chosen.par_iter().map(one).collect();
    let done: Vec<_> = done.into_iter().collect::<Result<_>>()?;

    let mut updates = Updates {
        architecture: Some(outline.architecture.clone()),
        task_type: outline.task_type.map(str::to_owned),
        base_fingerprint: Some(fingerprint::of_base(base)?),
        fan_in_fan_out: chosen.iter().any(|place| place.layout == Layout::InOut && !place.embedding),
        modules_to_save: outline.modules_to_save.clone(),
        targets,
        ..Updates::default()
    };
    for (name, t) in after.iter().filter(|(name, _)| outline.is_saved_module(name)) {
        updates.whole.insert(name.to_string(), t.to_dtype(DType::F32)?);
    }
    let mut modules = BTreeMap::new();
    for (site, update, extracted) in done {
        left.remove(format!("{site}.weight").as_str());
        updates.modules.insert(site.clone(), update);
        modules.insert(site, extracted);
    }
    let mut left: Vec<(String, f64)> = left.into_iter().map(|(name, norm)| (name.to_owned(), norm)).collect();
    left.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(Extraction { updates, modules, left })
}

fn refused<T>(problem: String) -> Result<T> {
    Err(Error::Adapters { problem })
}

/// The same adapter with factors in f32.
fn narrow(cut: Truncated<f64>) -> lowrank::Result<Truncated<f32>> {
    let (a, b, scale) = cut.adapter.into_parts();
    let adapter = lowrank::LowRank::new(a.mapv(|x| x as f32), b.mapv(|x| x as f32), scale)?;
    Ok(Truncated { adapter, error: cut.error })
}

/// Refuses models whose tensors differ in name or shape.
fn check_alike(base: &Outline, tuned: &Outline) -> Result<()> {
    if base.architecture != tuned.architecture {
        return refused(format!(
            "the base is of architecture {}, the tuned model of {}",
            base.architecture, tuned.architecture
        ));
    }
    let shapes = |o: &Outline| -> BTreeMap<String, Vec<usize>> {
        o.tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect()
    };
    let (before, after) = (shapes(base), shapes(tuned));
    for (name, shape) in &before {
        match after.get(name) {
            Some(other) if other == shape => {}
            Some(other) => {
                return refused(format!(
                    "tensor {name} has shape {shape:?} in the base and {other:?} in the tuned model; an adapter cannot hold that"
                ));
            }
            None => return refused(format!("the tuned model has no tensor {name}")),
        }
    }
    match after.keys().find(|name| !before.contains_key(*name)) {
        Some(name) => refused(format!("the base has no tensor {name}, which the tuned model has")),
        None => Ok(()),
    }
}

/// ‖W' − W‖_F.
fn change(w: &Tensor, tuned: &Tensor) -> Result<f64> {
    let (w, tuned) = (w.to_f64()?, tuned.to_f64()?);
    Ok(w.iter().zip(&tuned).map(|(w, t)| (t - w).powi(2)).sum::<f64>().sqrt())
}
