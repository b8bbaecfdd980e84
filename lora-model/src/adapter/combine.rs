//! Several adapters of one base, merged into one as PEFT's `add_weighted_adapter` does it.
//!
//! Modules that only some of them adapt are merged from those. As in PEFT the result has the rank that all have
//! (combinations of factors), the sum of the ranks (`cat`), or the highest, or a given one (`svd` and the like). Where PEFT
//! loses something without a word, this differs: a first adapter with rsLoRA does not scale the result by √r, a module that
//! one of the adapters trained whole is taken over as it is, and biases that trained are refused.

use std::collections::{BTreeMap, BTreeSet};

use lora_core::{
    hash::fnv1a,
    lowrank::{self, Combination, LowRank, MajoritySign, Rule},
    peft::Bias,
};
use rayon::prelude::*;

use super::{Update, Updates};
use crate::{Error, Result, error::List};

/// PEFT's names of the ways to merge adapters (`combination_type`).
pub const COMBINATIONS: [&str; 11] = [
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
];

/// How adapters are merged.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// One of [`COMBINATIONS`].
    pub how: String,
    /// The share of elements that pruning and dropping leave, in (0, 1].
    pub density: Option<f64>,
    /// What elects signs, with `ties`.
    pub sign: Option<MajoritySign>,
    /// The rank of the result, with `svd` and the like [default: the highest of the adapters'].
    pub rank: Option<usize>,
    /// What `dare` drops.
    pub seed: u64,
}

/// An adapter that is merged with others.
#[derive(Clone, Debug)]
pub struct Weighted {
    /// What error messages call it.
    pub name: String,
    /// Its weight, which may be negative.
    pub weight: f64,
    /// The adapter.
    pub updates: Updates,
}

/// Refuses adapters that were trained on different bases, by their fingerprints, as far as their files tell.
///
/// # Errors
/// [`Error::Adapters`] with the first two.
pub fn check_one_base(parts: &[Weighted]) -> Result<()> {
    let mut known = parts.iter().filter_map(|p| Some((&p.name, p.updates.base_fingerprint.as_ref()?)));
    let Some((name, base)) = known.next() else { return Ok(()) };
    match known.find(|(_, other)| *other != base) {
        None => Ok(()),
        Some((other, found)) => refused(format!(
            "{name} and {other} were trained on different bases, with fingerprints {base} and {found}; what they add does not \
             belong together"
        )),
    }
}

/// What merging gives.
#[derive(Clone, Debug)]
pub struct Combined {
    /// The adapter.
    pub updates: Updates,
    /// What cutting to a rank left out, over the size of what was cut: √(Σ ‖rest‖²_F / Σ ‖ΔW‖²_F) over all modules; 0 where
    /// nothing is cut.
    pub cut: f64,
}

/// The largest rank of a result: as of an adapter that trains.
const LARGEST_RANK: usize = 1 << 20;

impl Recipe {
    /// The rule without its `_svd`, and whether it works on whole updates.
    fn parts(&self) -> (&str, bool) {
        match self.how.as_str() {
            "svd" => ("linear", true),
            how => how.strip_suffix("_svd").map_or((how, false), |rule| (rule, true)),
        }
    }

    /// Refuses an unknown name, and options that are missing or that nothing would read.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self) -> Result<()> {
        let refused = |option, value: String, why: String| Err(Error::Option { option, value, why });
        if !COMBINATIONS.contains(&self.how.as_str()) {
            return refused(
                "how",
                self.how.clone(),
                format!("adapters are merged by one of {}", COMBINATIONS.join(", ")),
            );
        }
        let (rule, whole) = self.parts();
        let sparse = !["linear", "cat"].contains(&rule);
        match self.density {
            None if sparse => {
                return refused(
                    "density",
                    "missing".into(),
                    format!("{} needs the share of elements to keep", self.how),
                );
            }
            Some(d) if !sparse => return refused("density", d.to_string(), format!("{} keeps all elements", self.how)),
            Some(d) if !(d > 0.0 && d <= 1.0) => {
                return refused(
                    "density",
                    d.to_string(),
                    "the share of elements to keep is above 0 and at most 1".into(),
                );
            }
            _ => {}
        }
        if self.sign.is_some() && !rule.ends_with("ties") {
            return refused("majority-sign", "given".into(), format!("{} elects no signs", self.how));
        }
        match self.rank {
            Some(r) if !whole => refused(
                "svd-rank",
                r.to_string(),
                format!("{} cuts to no rank; svd and those that end in it do", self.how),
            ),
            Some(r) if r == 0 || r > LARGEST_RANK => {
                refused("svd-rank", r.to_string(), format!("a rank is from 1 to {LARGEST_RANK}"))
            }
            _ => Ok(()),
        }
    }

    fn combination(&self, module: &str, rank: usize) -> Combination {
        // Modules of one shape drop different elements.
        let seed = fnv1a(self.seed.to_le_bytes().into_iter().chain(module.bytes()));
        let (density, sign) = (self.density.unwrap_or(1.0), self.sign.unwrap_or_default());
        let (rule, whole) = self.parts();
        let rule = match rule {
            "cat" => return Combination::Cat,
            "ties" => Rule::Ties { density, sign },
            "dare_linear" => Rule::DareLinear { density, seed },
            "dare_ties" => Rule::DareTies { density, sign, seed },
            "magnitude_prune" => Rule::MagnitudePrune { density },
            _ => Rule::Linear,
        };
        if whole { Combination::Delta(rule, rank) } else { Combination::Factors(rule) }
    }
}

/// The adapter that `recipe` makes of others of one base.
///
/// # Errors
/// Those of [`Recipe::check`]; [`Error::Adapters`] for adapters that do not belong together or cannot be merged in this
/// way.
pub fn combine(parts: &[Weighted], recipe: &Recipe) -> Result<Combined> {
    recipe.check()?;
    let Some(first) = parts.first() else { return refused("there is none to merge".into()) };
    let (rule, whole) = recipe.parts();
    if parts.len() == 1 && !["linear", "cat"].contains(&rule) {
        return refused(format!(
            "{} alone cannot be merged by {}; linear scales it, svd lowers its rank",
            first.name, recipe.how
        ));
    }
    let other_rank = parts.iter().find(|p| p.updates.rank() != first.updates.rank());
    if let Some(other) = other_rank.filter(|_| !whole && rule != "cat") {
        return refused(format!(
            "{} needs one rank, but {} has rank {} and {} has rank {}; cat, svd and those that end in svd take any",
            recipe.how,
            first.name,
            first.updates.rank(),
            other.name,
            other.updates.rank()
        ));
    }
    let mut result = described(parts)?;
    let rank = recipe.rank.unwrap_or_else(|| parts.iter().map(|p| p.updates.rank()).max().unwrap_or(1));

    let mut modules: BTreeMap<&str, Vec<(f64, &Update)>> = BTreeMap::new();
    for part in parts {
        for (module, update) in &part.updates.modules {
            let of_module = modules.entry(module).or_default();
            if let Some((_, other)) = of_module.first().filter(|(_, other)| other.delta.dim() != update.delta.dim()) {
                let owner = parts.iter().find(|p| p.updates.modules.contains_key(module)).map_or("", |p| &p.name);
                return refused(format!(
                    "{owner} has an update {:?} of module {module}, and {} one of {:?}; they belong to different models",
                    <[usize; 2]>::from(other.delta.dim()),
                    part.name,
                    <[usize; 2]>::from(update.delta.dim())
                ));
            }
            of_module.push((part.weight, update));
        }
    }
    let one = |(module, updates): (&str, Vec<(f64, &Update)>)| -> Result<(String, Update, f64, f64)> {
        let embedding = updates[0].1.embedding;
        let deltas: Vec<(f64, &LowRank<f32>)> = updates.iter().map(|(weight, u)| (*weight, &u.delta)).collect();
        let merged = lowrank::combine(&deltas, recipe.combination(module, rank))
            .map_err(|e| Error::Adapters { problem: format!("module {module}: {e}") })?;
        let kept = lowrank::svd_of(&merged.adapter).map_err(lora_core::Error::from)?;
        let kept: f64 = kept.sigma.iter().map(|s| s * s).sum();
        let rest = merged.error.powi(2);
        Ok((module.to_owned(), Update { delta: merged.adapter, embedding }, rest, kept + rest))
    };
    // Of several errors always the first is told.
    let merged: Vec<Result<_>> = modules.into_iter().collect::<Vec<_>>().into_par_iter().map(one).collect();
    let merged: Vec<_> = merged.into_iter().collect::<Result<_>>()?;
    let (mut rest, mut all) = (0.0, 0.0);
    for (module, update, left, of) in merged {
        (rest, all) = (rest + left, all + of);
        result.modules.insert(module, update);
    }
    Ok(Combined { updates: result, cut: if rest > 0.0 { (rest / all).sqrt() } else { 0.0 } })
}

fn refused<T>(problem: String) -> Result<T> {
    Err(Error::Adapters { problem })
}

/// What the files of the result say but for its updates; refuses adapters that do not belong together.
fn described(parts: &[Weighted]) -> Result<Updates> {
    let agreed = |what: &str, of: &dyn Fn(&Updates) -> Option<&String>| -> Result<Option<String>> {
        let mut said = parts.iter().filter_map(|p| Some((&p.name, of(&p.updates)?)));
        let Some((name, value)) = said.next() else { return Ok(None) };
        match said.find(|(_, other)| *other != value) {
            None => Ok(Some(value.clone())),
            Some((other, found)) => refused(format!("{name} was trained for {what} {value}, and {other} for {found}")),
        }
    };
    let first = &parts[0].updates;
    let mut result = Updates {
        architecture: agreed("architecture", &|u| u.architecture.as_ref())?,
        task_type: agreed("task", &|u| u.task_type.as_ref())?,
        base_model_name_or_path: first.base_model_name_or_path.clone(),
        base_fingerprint: parts.iter().find_map(|p| p.updates.base_fingerprint.clone()),
        fan_in_fan_out: first.fan_in_fan_out,
        ..Updates::default()
    };
    if check_one_base(parts).is_err() {
        result.base_fingerprint = None;
    }
    if let Some(part) = parts.iter().find(|p| parts.len() > 1 && p.updates.bias != Bias::None) {
        return refused(format!(
            "{} trained biases (bias = {}), of which there is no weighted sum; merge adapters that trained none",
            part.name,
            part.updates.bias.word()
        ));
    }
    result.bias = first.bias;
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    for part in parts {
        let own = part.updates.whole.keys().map(|name| (name.as_str(), part.name.as_str()));
        for (name, owner) in own {
            if let Some(other) = owners.insert(name, owner) {
                return refused(format!(
                    "{other} and {owner} both trained {name} as a whole, which has no weighted sum that would be theirs; \
                     merge adapters of which at most one did ({})",
                    List(&part.updates.modules_to_save)
                ));
            }
        }
        if !part.updates.whole.is_empty() {
            result.modules_to_save.extend(part.updates.modules_to_save.iter().cloned());
            result.whole.extend(part.updates.whole.clone());
        }
        for (name, t) in &part.updates.repeated {
            let same = match result.repeated.insert(name.clone(), t.clone()) {
                Some(other) => other.shape() == t.shape() && other.to_f64()? == t.to_f64()?,
                None => true,
            };
            if !same {
                return refused(format!(
                    "their files repeat {name} of their base with different values: they have two bases"
                ));
            }
        }
    }
    for (name, owner) in &owners {
        let Some(module) = name.strip_suffix(".weight") else { continue };
        if let Some(other) = parts.iter().find(|p| p.updates.modules.contains_key(module)) {
            return refused(format!(
                "{owner} trained {module} as a whole, and {} has an update of it, which has no meaning beside other weights",
                other.name
            ));
        }
    }
    let targets: BTreeSet<&String> = parts.iter().flat_map(|p| &p.updates.targets).collect();
    result.targets = targets.into_iter().cloned().collect();
    Ok(result)
}
