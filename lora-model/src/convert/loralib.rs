//! Checkpoints of loralib, the LoRA paper's own code: `torch.save(lora.lora_state_dict(model), path)`.
//!
//! A `Linear` has `lora_A` [r, in] and `lora_B` [out, r], as PEFT does under other names. A `MergedLinear` is a fused
//! projection of which `enable_lora` says the adapted parts: with n of them `lora_A` is [n·r, in] and `lora_B` [n·w, r], where
//! w is the width of a part, and part k gets s·B_k·A_k of its own rows (loralib computes them as a convolution in n groups).
//! That is what parts of a fused projection are here (`c_attn.q`, `c_attn.v`), and for PEFT one update of the whole module of
//! rank n·r and α·n, with B zero outside of its blocks. The file holds neither α nor `enable_lora`. Biases that trained
//! (`bias="lora_only"` and `"all"`) stand beside the factors under the model's names, and so does a classifier's head.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use lora_core::{
    Tensor,
    lowrank::Scaling,
    peft::{Adapted, Base, Bias, LinearSite, Lora, LoraConfig, Modules, Outline, Site, names},
};
use lora_kernels::{DType, Device};

use super::tensors_of;
use crate::{
    Error, Result,
    adapter::{AdapterFile, short_name},
    error::List,
};

const FACTORS: [&str; 2] = [".lora_A", ".lora_B"];

/// An adapter in loralib's form.
#[derive(Clone, Debug)]
pub struct Loralib {
    /// `lora_A` and `lora_B` of every module; biases that trained, and the tensors of a classifier's head.
    pub tensors: BTreeMap<String, Tensor>,
    /// `r`.
    pub r: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// By name within a layer: `enable_lora` of the modules that are a `MergedLinear`; the others are a `Linear`.
    pub enable_lora: BTreeMap<String, Vec<bool>>,
}

/// Reads a checkpoint of loralib for a base: the configuration and the adapter. `parts` names what `enable_lora` enabled of
/// fused projections (`q`, `v`); it may be empty where the shapes leave no choice.
///
/// # Errors
/// [`Error::Weights`] for tensors that belong to no linear map of the base, have another shape than it needs, or are none of
/// loralib's; and those of [`read_state_dict`](super::read_state_dict).
pub fn from_loralib(path: &Path, base: &dyn Base, alpha: f64, parts: &[String]) -> Result<(LoraConfig, Adapted)> {
    let state = tensors_of(path)?;
    let bad = |problem: String| Error::Weights { file: path.to_owned(), problem };
    let outline = base.outline();
    let mut found: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    let (mut heads, mut biases) = (BTreeMap::new(), BTreeMap::new());
    let mut strange = state.others;
    for (name, tensor) in state.tensors {
        // As a model that was trained on several devices names them.
        let own = name.strip_prefix("module.").unwrap_or(&name);
        match FACTORS.iter().position(|f| own.ends_with(f)) {
            Some(i) => {
                let module = own[..own.len() - FACTORS[i].len()].to_owned();
                found.entry(module).or_default()[i] = Some(tensor);
            }
            None if outline.is_saved_module(own) => drop(heads.insert(own.to_owned(), tensor)),
            None if own.ends_with(".bias") && outline.tensors.iter().any(|t| t.name == own) => {
                biases.insert(own.to_owned(), tensor);
            }
            None => strange.push(name),
        }
    }
    if !strange.is_empty() {
        return Err(bad(format!(
            "it holds what is no lora_A or lora_B, no bias and no head of this base: {}; save lora.lora_state_dict(model) \
             alone, and name the labels of a classifier (--labels)",
            List(&strange)
        )));
    }
    let sites: BTreeMap<&str, &LinearSite> = outline.linear_sites().map(|(s, l)| (s.name.as_str(), l)).collect();
    let unknown: Vec<String> = found.keys().filter(|m| !sites.contains_key(m.as_str())).cloned().collect();
    if !unknown.is_empty() {
        let embedding = outline.embedding_sites().find(|(site, _)| unknown.contains(&site.name));
        return Err(bad(match embedding {
            Some((site, _)) => format!("{} is a lora.Embedding, which is not converted", site.name),
            None => format!("the base has no linear maps {}; it belongs to another model", List(&unknown)),
        }));
    }
    let mut rank = None;
    let (mut tensors, mut targets) = (BTreeMap::new(), BTreeMap::<String, Vec<&str>>::new());
    for (module, pair) in found {
        let [Some(a), Some(b)] = pair else {
            return Err(bad(format!("module {module} has only one of lora_A and lora_B")));
        };
        let linear = sites[module.as_str()];
        let [[rows, inputs], [outputs, r]] = [&a, &b].map(|t| match t.shape() {
            [rows, cols] => [*rows, *cols],
            _ => [0, 0],
        });
        if inputs != linear.inputs || r == 0 || rows == 0 || !rows.is_multiple_of(r) {
            return Err(bad(format!(
                "module {module}: lora_A {:?} and lora_B {:?} are no factors for a map of {} inputs to {} outputs",
                a.shape(),
                b.shape(),
                linear.inputs,
                linear.outputs
            )));
        }
        match *rank.get_or_insert(r) {
            first if first == r => {}
            first => return Err(bad(format!("module {module} has r = {r}, others have r = {first}; one r is read"))),
        }
        let chosen = enabled(linear, rows / r, outputs, parts).map_err(|why| bad(format!("module {module}: {why}")))?;
        let b = match &chosen {
            None => b,
            Some(chosen) => blocks(&b, linear, chosen, r)?,
        };
        let names = chosen.map(|chosen| chosen.into_iter().map(|i| linear.parts[i].0).collect()).unwrap_or_default();
        targets.insert(module.clone(), names);
        tensors.insert(format!("{module}.lora_A.weight"), a);
        tensors.insert(format!("{module}.lora_B.weight"), b);
    }
    let Some(rank) = rank else { return Err(bad("it holds no tensors".into())) };
    let bias = bias_of(&biases, &targets, outline).map_err(bad)?;
    let targets = named(outline, &targets);
    let config = LoraConfig { rank, alpha, bias, targets: Modules::Names(targets), ..LoraConfig::default() };
    let mut adapted = Adapted::new(&Lora::new(config.clone())?, base, &Device::Cpu, DType::F32, 0)?;
    let mut left = Vec::new();
    for (name, tensor) in adapted.adapter_tensors()?.into_iter().filter(|(name, _)| outline.is_saved_module(name)) {
        let head = heads.remove(&name).unwrap_or_else(|| {
            left.push(name.clone());
            tensor
        });
        tensors.insert(name, head);
    }
    if !left.is_empty() {
        tracing::warn!("{}: it holds no {}, which stay as the base has them", path.display(), List(&left));
    }
    tensors.extend(biases);
    adapted.load_adapter_tensors(tensors).map_err(|e| bad(e.to_string()))?;
    Ok((config, adapted))
}

/// Which biases those are that trained.
fn bias_of(
    biases: &BTreeMap<String, Tensor>,
    adapted: &BTreeMap<String, Vec<&str>>,
    outline: &Outline,
) -> std::result::Result<Bias, String> {
    let all = || outline.tensors.iter().filter(|t| t.name.ends_with(".bias") && !outline.is_saved_module(&t.name));
    let of_adapted = |name: &str| name.strip_suffix(".bias").is_some_and(|module| adapted.contains_key(module));
    let are = |is: &dyn Fn(&str) -> bool| all().all(|t| is(&t.name) == biases.contains_key(&t.name));
    match () {
        () if biases.is_empty() => Ok(Bias::None),
        () if are(&|_| true) => Ok(Bias::All),
        () if are(&of_adapted) => Ok(Bias::LoraOnly),
        () => Err(format!(
            "its biases are neither those of all modules nor those of the adapted ones: {}",
            List(&biases.keys().cloned().collect::<Vec<_>>())
        )),
    }
}

/// Which parts of a fused projection n updates with `outputs` rows in all are of; `None` for the whole module.
fn enabled(
    linear: &LinearSite,
    n: usize,
    outputs: usize,
    parts: &[String],
) -> std::result::Result<Option<Vec<usize>>, String> {
    if n == 1 && outputs == linear.outputs {
        return Ok(None);
    }
    let all: Vec<&str> = linear.parts.iter().map(|(name, _)| *name).collect();
    if all.is_empty() {
        return Err(format!("its {n} updates of {outputs} outputs are for a fused projection, and this is none"));
    }
    let chosen: Vec<usize> = match parts {
        [] if n == all.len() => (0..n).collect(),
        [] => {
            return Err(format!(
                "it adapts {n} of the parts {}, and the file does not say which; name what enable_lora enabled (--parts)",
                all.join(", ")
            ));
        }
        parts => (0..all.len()).filter(|i| parts.iter().any(|p| p == all[*i])).collect(),
    };
    if let Some(other) = parts.iter().find(|p| !all.contains(&p.as_str())) {
        return Err(format!("it has no part {other}; it has {}", all.join(", ")));
    }
    let rows: usize = chosen.iter().map(|i| linear.parts[*i].1.len()).sum();
    let names: Vec<&str> = chosen.iter().map(|i| all[*i]).collect();
    match chosen.len() == n && rows == outputs {
        true => Ok(Some(chosen)),
        false => Err(format!(
            "it has {n} updates of {outputs} outputs in all, and the parts {} have {rows}",
            names.join(", ")
        )),
    }
}

/// B [outputs, n·r] with the blocks of `b` [n·w, r] in their places, and zero elsewhere.
fn blocks(b: &Tensor, linear: &LinearSite, chosen: &[usize], r: usize) -> Result<Tensor> {
    let (values, cols) = (b.to_vec::<f32>()?, chosen.len() * r);
    let mut wide = vec![0f32; linear.outputs * cols];
    let mut from = 0;
    for (k, part) in chosen.iter().enumerate() {
        for row in linear.parts[*part].1.clone() {
            let at = row * cols + k * r;
            wide[at..at + r].copy_from_slice(&values[from..from + r]);
            from += r;
        }
    }
    Ok(Tensor::from_slice(&Device::Cpu, &[linear.outputs, cols], &wide)?)
}

/// PEFT's targets for these modules and their parts: names within a layer, where those mean nothing else.
fn named(outline: &Outline, targets: &BTreeMap<String, Vec<&str>>) -> Vec<String> {
    let short: BTreeMap<&str, &Vec<&str>> = targets.iter().map(|(m, parts)| (short_name(m), parts)).collect();
    let exact = outline.linear_sites().all(|(site, _)| {
        let of_site = short.iter().filter(|(name, _)| names(name, &site.name));
        of_site.count() == usize::from(targets.contains_key(&site.name))
    }) && targets.iter().all(|(module, parts)| short[short_name(module)] == parts);
    let all = targets.iter().map(|(module, parts)| (if exact { short_name(module) } else { module.as_str() }, parts));
    let names: BTreeSet<String> = all
        .flat_map(|(module, parts)| match parts.is_empty() {
            true => vec![module.to_owned()],
            false => parts.iter().map(|p| format!("{module}.{p}")).collect(),
        })
        .collect();
    names.into_iter().collect()
}

/// A LoRA adapter in loralib's form, for the base that it belongs to.
///
/// # Errors
/// Those of [`AdapterFile::attach`]; [`Error::Adapters`] for an adapter that is no LoRA, has trained other modules than a head
/// as a whole, or ranks or parts that differ by module, which loralib's file has no place for.
pub fn to_loralib(file: &AdapterFile, base: &dyn Base) -> Result<Loralib> {
    let refused = |problem: String| Err(Error::Adapters { problem });
    if file.method != "lora" {
        return refused(format!("loralib knows LoRA alone, not method {}", file.method));
    }
    let adapted = file.attach(base, &Device::Cpu)?;
    let outline = base.outline();
    let has_place = |name: &str| outline.is_saved_module(name) || name.ends_with(".bias");
    if let Some(tensor) = adapted.trained().find(|name| !has_place(name)) {
        return refused(format!("it has trained {tensor} as a whole, which a file of loralib has no place for"));
    }
    let init = file.options.init_lora_weights;
    if init.takes_from_base() {
        return refused(format!(
            "it began as {} at a part of its base, which a file of loralib has no place for",
            init.word()
        ));
    }
    let of_linear = |place: &str| {
        let of = |(site, linear): (&Site, &LinearSite)| {
            let part = place.strip_prefix(site.name.as_str()).map(|rest| rest.strip_prefix('.').unwrap_or(rest));
            part.is_some_and(|part| part.is_empty() || linear.parts.iter().any(|(name, _)| *name == part))
        };
        base.outline().linear_sites().any(of)
    };
    let whole: BTreeSet<&str> = adapted.trained().collect();
    let strange = adapted.params.ids().map(|id| adapted.params.name(id)).find(|name| {
        !whole.contains(name)
            && !FACTORS.iter().any(|factor| name.strip_suffix(&format!("{factor}.weight")).is_some_and(of_linear))
    });
    if let Some(name) = strange {
        let embedding = if name.contains("lora_embedding_") { "; a lora.Embedding is not converted" } else { "" };
        return refused(format!("a file of loralib has no place for {name}{embedding}"));
    }
    let values: BTreeMap<&str, Tensor> =
        adapted.params.ids().map(|id| (adapted.params.name(id), adapted.params.tensor(id))).collect();
    let lora = Lora::new(LoraConfig::from(&file.options))?;
    let scaling = if file.options.rslora { Scaling::RsLora } else { Scaling::Lora };
    let mut tensors: BTreeMap<String, Tensor> =
        whole.iter().map(|name| (name.to_string(), values[name].clone())).collect();
    // The first site's name, rank, α and scale; and by name within a layer the first site's parts.
    let mut common: Option<(&str, usize, f64, f64)> = None;
    let mut parts_of: BTreeMap<&str, (&str, Option<Vec<bool>>)> = BTreeMap::new();
    for (site, linear) in base.outline().linear_sites() {
        let factors = |place: &str| {
            let of = |factor| values.get(format!("{place}.{factor}.weight").as_str()).cloned();
            Some([of("lora_A")?, of("lora_B")?])
        };
        let mut enabled = None;
        let [a, b] = match factors(&site.name) {
            Some(pair) => pair,
            None => {
                let parts: Vec<_> = linear.parts.iter().map(|(p, _)| factors(&format!("{}.{p}", site.name))).collect();
                if parts.iter().all(Option::is_none) {
                    continue;
                }
                let widths: BTreeSet<usize> = linear.parts.iter().map(|(_, cols)| cols.len()).collect();
                if widths.len() > 1 {
                    return refused(format!(
                        "the parts of {} have different widths, which a MergedLinear cannot",
                        site.name
                    ));
                }
                enabled = Some(parts.iter().map(Option::is_some).collect());
                let below = |i: usize| -> Result<Tensor> {
                    let all: Vec<&Tensor> = parts.iter().flatten().map(|pair| &pair[i]).collect();
                    let rows: usize = all.iter().map(|t| t.rows()).sum();
                    let mut values = Vec::new();
                    for t in &all {
                        values.extend(t.to_vec::<f32>()?);
                    }
                    Ok(Tensor::from_slice(&Device::Cpu, &[rows, all[0].cols()], &values)?)
                };
                [below(0)?, below(1)?]
            }
        };
        let (rank, alpha) = lora.rank_and_alpha(&site.name)?;
        let scale = scaling.scale(alpha, rank).map_err(lora_core::Error::from)?;
        let (first, r, _, first_scale) = *common.get_or_insert((&site.name, rank, alpha, scale));
        if rank != r {
            return refused(format!(
                "by rank_pattern {} has rank {rank} and {first} has {r}; a file of loralib is read with one r",
                site.name
            ));
        }
        let (other, others) = parts_of.entry(short_name(&site.name)).or_insert((&site.name, enabled.clone()));
        if *others != enabled {
            return refused(format!(
                "of {other} and {} other parts are adapted, and loralib's models have one enable_lora for all layers",
                site.name
            ));
        }
        // One scale holds for all modules.
        let share = scale / first_scale;
        let values: Vec<f32> = a.to_vec::<f32>()?.iter().map(|v| (f64::from(*v) * share) as f32).collect();
        let a = Tensor::from_slice(&Device::Cpu, a.shape(), &values)?;
        for (factor, tensor) in FACTORS.into_iter().zip([a, b]) {
            tensors.insert(format!("{}{factor}", site.name), tensor);
        }
    }
    let Some((_, r, alpha, _)) = common else { return refused("it adapts no linear map".into()) };
    // loralib's scale is always α/r.
    let alpha = if file.options.rslora { alpha * (r as f64).sqrt() } else { alpha };
    let enable_lora = parts_of.into_iter().filter_map(|(module, (_, enabled))| Some((module.to_owned(), enabled?)));
    Ok(Loralib { tensors, r, alpha, enable_lora: enable_lora.collect() })
}
