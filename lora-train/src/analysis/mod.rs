//! What an adapter has learnt: singular values, size, amplification and subspaces (sections 7.2 and 7.3 of the LoRA paper).

mod plot;

use std::collections::BTreeMap;

use lora_core::{
    lowrank::{self, Layout, LowRank, Side},
    peft::Base,
};
use lora_model::adapter::Updates;
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use crate::{Error, Result};

/// The measures of all modules of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Analysis {
    /// By module.
    pub modules: BTreeMap<String, Measures>,
    /// Modules that the other adapter does not adapt, so that there is nothing to compare.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_compared: Vec<String>,
}

/// What is measured of one module's update ΔW = s·B·A.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measures {
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f64,
    /// The singular values of ΔW, descending.
    pub singular_values: Vec<f64>,
    /// exp(−Σ pᵢ·ln pᵢ) with pᵢ = σᵢ/Σσ: r for equal values, 1 for a single one, 0 for ΔW = 0 (Roy and Vetterli 2007).
    pub effective_rank: f64,
    /// ‖ΔW‖_F.
    pub delta_norm: f64,
    /// What needs the base's weight W.
    #[serde(flatten)]
    pub against_base: Option<AgainstBase>,
    /// What needs another adapter.
    #[serde(flatten)]
    pub similarity: Option<Similarity>,
}

/// ΔW beside the weight W that it is added to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AgainstBase {
    /// ‖W‖_F.
    pub base_norm: f64,
    /// ‖ΔW‖_F/‖W‖_F.
    pub relative_norm: f64,
    /// ‖Uᵀ·W·V‖_F with the singular directions U, V of ΔW; `None` for ΔW = 0, which has none.
    pub projected_norm: Option<f64>,
    /// ‖ΔW‖_F/‖Uᵀ·W·V‖_F: how strongly ΔW amplifies what W has in its directions (section 7.3).
    pub amplification: Option<f64>,
}

/// φ(i, j) of this adapter's first i and another's first j directions (section 7.2, equation 4): row i − 1, column j − 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Similarity {
    /// Of the right singular directions of A, in the input.
    pub phi_a: Vec<Vec<f64>>,
    /// Of the left singular directions of B, in the output.
    pub phi_b: Vec<Vec<f64>>,
}

/// Measures an adapter, with a base what it does to that, with another adapter how much their directions have in common.
///
/// # Errors
/// A base that the adapter does not fit; adapters of different shapes, or without a module in common.
pub fn analyse(adapter: &Updates, base: Option<&dyn Base>, against: Option<&Updates>) -> Result<Analysis> {
    if let Some(base) = base {
        adapter.check_base(base.outline())?;
        adapter.check_repeated(base)?;
    }
    let weights: BTreeMap<&str, _> = base.iter().flat_map(|base| base.tensors()).collect();
    let layouts: BTreeMap<&str, Layout> = base
        .iter()
        .flat_map(|base| base.outline().linear_sites().chain(base.outline().head_site()))
        .map(|(site, linear)| (site.name.as_str(), linear.layout))
        .collect();
    let one = |(name, update): (&String, &lora_model::adapter::Update)| -> Result<(String, Measures)> {
        let delta = &update.delta;
        let failed =
            |e: lowrank::Error| Error::from(lora_model::Error::Adapters { problem: format!("module {name}: {e}") });
        let sigma = lowrank::svd_of(delta).map_err(failed)?.sigma;
        let delta_norm = norm(&sigma);
        let against_base = match weights.get(format!("{name}.weight").as_str()) {
            None => None,
            Some(w) => {
                let w = w.to_array().map_err(lora_model::Error::from)?;
                let base_norm = norm(&w.mapv(f64::from));
                // Of an embedding [tokens, width], which is stored as inputs and outputs.
                let layout = layouts.get(name.as_str()).copied().unwrap_or(Layout::InOut);
                let (projected_norm, amplification) = match lowrank::amplification(w.view(), delta, layout) {
                    Ok(measured) => (Some(measured.projected_norm), Some(measured.factor())),
                    Err(lowrank::Error::Zero { .. }) => (None, None),
                    Err(e) => return Err(failed(e)),
                };
                Some(AgainstBase { base_norm, relative_norm: delta_norm / base_norm, projected_norm, amplification })
            }
        };
        let other = against.and_then(|other| other.modules.get(name));
        let similarity = other.map(|other| similarity(delta, &other.delta)).transpose().map_err(failed)?;
        let measures = Measures {
            shape: delta.dim().into(),
            rank: delta.rank(),
            scale: delta.scale(),
            effective_rank: effective_rank(sigma.as_slice().unwrap_or_default()),
            singular_values: sigma.to_vec(),
            delta_norm,
            against_base,
            similarity,
        };
        Ok((name.clone(), measures))
    };
    // Of several errors always the first is told.
    let modules: Vec<Result<_>> = adapter.modules.par_iter().map(one).collect();
    let modules: BTreeMap<String, Measures> = modules.into_iter().collect::<Result<_>>()?;
    let not_compared: Vec<String> = match against {
        None => Vec::new(),
        Some(_) => modules.iter().filter(|(_, m)| m.similarity.is_none()).map(|(name, _)| name.clone()).collect(),
    };
    if against.is_some() && not_compared.len() == modules.len() {
        let problem = format!(
            "the adapters have no module in common, so nothing can be compared; one has {}, the other {}",
            first(adapter),
            against.map(first).unwrap_or_default()
        );
        return Err(lora_model::Error::Adapters { problem }.into());
    }
    Ok(Analysis { modules, not_compared })
}

fn first(updates: &Updates) -> String {
    updates.modules.keys().next().cloned().unwrap_or_default()
}

/// φ of both factors; where one is zero, as B is before training, there are no directions.
fn similarity(x: &LowRank<f32>, y: &LowRank<f32>) -> lowrank::Result<Similarity> {
    let rows = |phi: lowrank::Result<Array2<f64>>| match phi {
        Ok(phi) => Ok(phi.outer_iter().map(|row| row.to_vec()).collect()),
        Err(lowrank::Error::Zero { .. }) => Ok(Vec::new()),
        Err(e) => Err(e),
    };
    Ok(Similarity {
        phi_a: rows(lowrank::subspace_similarity(x.a(), y.a(), Side::Right))?,
        phi_b: rows(lowrank::subspace_similarity(x.b(), y.b(), Side::Left))?,
    })
}

fn norm<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// e to the entropy of the singular values.
fn effective_rank(sigma: &[f64]) -> f64 {
    let sum: f64 = sigma.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let entropy: f64 = sigma.iter().filter(|s| **s > 0.0).map(|s| -(s / sum) * (s / sum).ln()).sum();
    entropy.exp()
}

impl Measures {
    /// φ of all directions of both: how much of the smaller of the two spaces lies in the other, by A and by B.
    pub fn whole_similarity(&self) -> [Option<f64>; 2] {
        let last = |phi: &Vec<Vec<f64>>| phi.last().and_then(|row| row.last()).copied();
        let of = self.similarity.as_ref();
        [of.and_then(|s| last(&s.phi_a)), of.and_then(|s| last(&s.phi_b))]
    }

    /// φ(1, 1): whether the strongest directions agree, by A and by B.
    pub fn first_similarity(&self) -> [Option<f64>; 2] {
        let first = |phi: &Vec<Vec<f64>>| phi.first().and_then(|row| row.first()).copied();
        let of = self.similarity.as_ref();
        [of.and_then(|s| first(&s.phi_a)), of.and_then(|s| first(&s.phi_b))]
    }
}

impl Analysis {
    /// The names and texts of the pictures: singular values, and with another adapter φ of A and of B.
    pub fn pictures(&self) -> Vec<(&'static str, String)> {
        let pictures = [
            ("singular_values.svg", plot::spectra(&self.modules)),
            ("similarity_a.svg", plot::similarities(&self.modules, "A", |s| &s.phi_a)),
            ("similarity_b.svg", plot::similarities(&self.modules, "B", |s| &s.phi_b)),
        ];
        pictures.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_rank_counts_equal_values() {
        for (sigma, rank) in [(&[2.0, 2.0, 2.0][..], 3.0), (&[5.0, 0.0], 1.0), (&[0.0, 0.0], 0.0), (&[], 0.0)] {
            assert!((effective_rank(sigma) - rank).abs() < 1e-12, "{sigma:?}");
        }
        // p = (3/4, 1/4): exp of 0.5623 nats.
        assert!((effective_rank(&[3.0, 1.0]) - 1.754765).abs() < 1e-6);
    }
}
