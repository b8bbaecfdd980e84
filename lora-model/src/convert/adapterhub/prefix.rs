//! Prefix tuning: keys and values of virtual tokens in all layers, in PEFT's order, `pre-layer` here. AdapterHub leaves the
//! positions of the text as they are without a prefix (`count-prefix` false), and writes one table under the name of every
//! layer that reads it.

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    peft::{Options, Outline, SiteKind},
};
use lora_kernels::Device;
use ndarray::{Array1, Array2, ArrayView1};
use serde_json::{Map, Value, json};

use super::{Read, required};
use crate::{Error, Result, adapter::AdapterFile, config::RawConfig};

pub(super) const METHOD: &str = "pre-layer";
/// AdapterHub's word for it.
pub(super) const ARCHITECTURE: &str = "prefix_tuning";
/// What `pre-layer` calls its table, below the site.
const TABLE: &str = "prompt_embeddings";

fn fixed() -> [(&'static str, Value); 3] {
    [("encoder_prefix", json!(true)), ("leave_out", json!([])), ("use_gating", json!(false))]
}

/// The site of keys and values, its layers and columns.
fn site<'a>(raw: &RawConfig, outline: &'a Outline) -> Result<(&'a str, usize, usize)> {
    let site = outline.sites.iter().find_map(|s| match s.kind {
        SiteKind::KeysValues { layers, cols } => Some((s.name.as_str(), layers, cols)),
        _ => None,
    });
    site.ok_or_else(|| {
        raw.error("config", format_args!("attention of {} takes no further keys and values", outline.architecture))
    })
}

/// Takes the tensors of the adapter of that name out of `theirs`. A reparametrised prefix becomes its table, as AdapterHub's
/// `eject_prefix_tuning` makes it.
///
/// # Errors
/// An option that makes it something else; a table of another size than the base's; copies that differ.
pub(super) fn read(
    raw: &RawConfig,
    config: &Map<String, Value>,
    outline: &Outline,
    name: &str,
    theirs: &mut BTreeMap<String, Tensor>,
) -> Result<Read> {
    required(raw, config, &fixed())?;
    let (site, layers, cols) = site(raw, outline)?;
    let middle = format!("prefix_tunings.{name}.self_prefix.");
    let mut parts: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let names: Vec<String> = theirs.keys().filter(|n| n.contains(&middle)).cloned().collect();
    let bad = |problem: String| raw.error("config", problem);
    for full in names {
        let part = full.split_once(&middle).map(|(_, part)| part.to_owned()).unwrap_or_default();
        let values = theirs.remove(&full).expect("its name was found").to_f64()?;
        if parts.get(&part).is_some_and(|first| *first != values) {
            return Err(bad(format!("{full} differs from its copies for other layers; here all read one table")));
        }
        parts.insert(part, values);
    }
    let all = layers * 2 * cols;
    let table = match parts.remove("control_trans") {
        Some(table) => table,
        None if parts.is_empty() => Vec::new(),
        None => flattened(raw, config, &mut parts, all)?,
    };
    if !table.len().is_multiple_of(all) || !parts.is_empty() {
        let rest: Vec<String> = parts.into_keys().collect();
        return Err(bad(format!(
            "a prefix of this base has {all} numbers for each virtual token, and the file {} in all{}",
            table.len(),
            if rest.is_empty() { String::new() } else { format!(", and besides {}", rest.join(", ")) }
        )));
    }
    let prefix = table.len() / all;
    let options = Options { prefix, infix: 0, count_prefix: false, ..Options::default() };
    let table: Vec<f32> = table.into_iter().map(|v| v as f32).collect();
    let tensors = match prefix {
        0 => BTreeMap::new(),
        _ => [(format!("{site}.{TABLE}"), Tensor::from_slice(&Device::Cpu, &[prefix, all], &table)?)].into(),
    };
    Ok(Read { method: METHOD, options, tensors })
}

/// P = tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂.
fn flattened(
    raw: &RawConfig,
    config: &Map<String, Value>,
    parts: &mut BTreeMap<String, Vec<f64>>,
    all: usize,
) -> Result<Vec<f64>> {
    required(raw, config, &[("non_linearity", json!("tanh"))])?;
    let mut take = |part: &str| {
        parts.remove(part).ok_or_else(|| raw.error("config", format_args!("a prefix that is not flat has {part}")))
    };
    let (e, w1, b1) = (take("wte.weight")?, take("control_trans.0.weight")?, take("control_trans.0.bias")?);
    let (w2, b2) = (take("control_trans.2.weight")?, take("control_trans.2.bias")?);
    let m = b1.len();
    let matrix = |values: Vec<f64>, rows: usize| -> Result<Array2<f64>> {
        let cols = values.len().checked_div(rows).unwrap_or(0);
        Array2::from_shape_vec((rows, cols), values).map_err(|e| raw.error("config", e))
    };
    let (w1, w2) = (matrix(w1, m)?, matrix(w2, all)?);
    let rows = e.len().checked_div(w1.ncols()).unwrap_or(0);
    let e = matrix(e, rows)?;
    if w1.ncols() == 0 || w2.ncols() != m || b2.len() != all || e.ncols() != w1.ncols() {
        let found = format!("maps of {:?} and {:?} on a table of {:?}", w1.dim(), w2.dim(), e.dim());
        return Err(raw.error("config", format_args!("{found} do not fit each other and the base's {all} columns")));
    }
    let h = (e.dot(&w1.t()) + ArrayView1::from(&b1)).mapv(f64::tanh);
    Ok((h.dot(&w2.t()) + Array1::from(b2)).into_iter().collect())
}

/// The options in AdapterHub's words, and the tensors by its names.
///
/// # Errors
/// [`Error::Adapters`] for a prefix that counts as positions, or that has an infix.
pub(super) fn write(
    file: &AdapterFile,
    outline: &Outline,
    name: &str,
    ours: BTreeMap<String, Tensor>,
) -> Result<(Map<String, Value>, BTreeMap<String, Tensor>)> {
    let o = &file.options;
    if o.count_prefix || o.infix > 0 {
        let what = if o.infix > 0 { "has virtual tokens after the prompt" } else { "counts as positions of the text" };
        let problem =
            format!("the prefix {what}, which AdapterHub's does not; train it with --count-prefix=false --infix 0");
        return Err(Error::Adapters { problem });
    }
    // All sites begin with the name that the base model has in the whole.
    let whole = outline.sites.first().and_then(|s| s.name.split('.').next()).unwrap_or_default();
    let table = ours.into_values().next().ok_or_else(|| lora_core::Error::Missing { name: TABLE.into() })?;
    let len = table.len();
    let full = format!("{whole}.prefix_tuning.prefix_tunings.{name}.self_prefix.control_trans");
    let mut config: Map<String, Value> = fixed().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    config.insert("architecture".into(), json!(ARCHITECTURE));
    config.insert("bottleneck_size".into(), json!(512));
    config.insert("cross_prefix".into(), json!(true));
    config.insert("dropout".into(), json!(0.0));
    config.insert("flat".into(), json!(true));
    config.insert("non_linearity".into(), json!("tanh"));
    config.insert("prefix_length".into(), json!(o.prefix));
    config.insert("shared_gating".into(), json!(true));
    Ok((config, [(full, table.reshape(&[len]))].into()))
}
