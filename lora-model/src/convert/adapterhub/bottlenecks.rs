//! Bottleneck adapters: `double_seq_bn` and `seq_bn`.

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    peft::{Options, Outline, Part, SiteKind, non_linearity},
};
use lora_kernels::Activation;
use serde_json::{Map, Value, json};

use super::{Read, required};
use crate::{Result, adapter::AdapterFile, config::RawConfig};

/// A method of the table as AdapterHub describes it.
struct Kind {
    method: &'static str,
    /// What tells it from the other.
    mh_adapter: bool,
    original_ln_before: bool,
    /// What the method has by itself.
    non_linearity: Activation,
}

const KINDS: [Kind; 2] = [
    Kind { method: "adapter-h", mh_adapter: true, original_ln_before: false, non_linearity: Activation::GeluErf },
    Kind { method: "adapter-p", mh_adapter: false, original_ln_before: true, non_linearity: Activation::Relu },
];

/// Options that have to be this in both, with what AdapterHub takes for one that is absent.
fn fixed() -> [(&'static str, Value); 12] {
    [
        ("output_adapter", json!(true)),
        ("original_ln_after", json!(true)),
        ("ln_before", json!(false)),
        ("ln_after", json!(false)),
        ("is_parallel", json!(false)),
        ("scaling", json!(1.0)),
        ("use_gating", json!(false)),
        ("residual_before_ln", json!(true)),
        ("inv_adapter", Value::Null),
        ("cross_adapter", json!(false)),
        ("leave_out", json!([])),
        ("phm_layer", json!(false)),
    ]
}

/// Takes the tensors of the adapter of that name out of `theirs`.
///
/// # Errors
/// An option that makes it another method than those here; a file without the adapter.
pub(super) fn read(
    raw: &RawConfig,
    config: &Map<String, Value>,
    outline: &Outline,
    name: &str,
    theirs: &mut BTreeMap<String, Tensor>,
) -> Result<Read> {
    let (kind, non_linearity) = kind(raw, config)?;
    let (mut tensors, mut bottleneck) = (BTreeMap::new(), 0);
    for (ours, hub) in places(outline, kind.method, name) {
        if let Some(tensor) = theirs.remove(&hub) {
            if ours.ends_with("adapter_down.bias") {
                bottleneck = tensor.len();
            }
            tensors.insert(ours, tensor);
        }
    }
    let options = Options { bottleneck, non_linearity, ..Options::default() };
    Ok(Read { method: kind.method, options, tensors })
}

/// The method that a configuration describes, and its nonlinearity where that is not the method's own.
fn kind(raw: &RawConfig, config: &Map<String, Value>) -> Result<(&'static Kind, Option<Activation>)> {
    required(raw, config, &fixed())?;
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let (mh, before) = (flag("mh_adapter"), flag("original_ln_before").unwrap_or(false));
    let kind = KINDS.iter().find(|k| mh == Some(k.mh_adapter) && before == k.original_ln_before);
    let Some(kind) = kind else {
        let found = json!({"mh_adapter": mh, "original_ln_before": before});
        return Err(raw.error(
            "config",
            format_args!("{found} is neither Houlsby's (double_seq_bn) nor Pfeiffer's (seq_bn) place for adapters"),
        ));
    };
    // Files from before `version` have other names.
    let old = raw.value("version").is_none();
    let name = match config.get("non_linearity").and_then(Value::as_str) {
        Some("gelu") if old => "gelu_new",
        Some("gelu_orig") if old => "gelu",
        other => other.unwrap_or_default(),
    };
    match non_linearity(name) {
        Ok(found) => Ok((kind, Some(found).filter(|found| *found != kind.non_linearity))),
        Err(e) => Err(raw.error("config", format_args!("non_linearity: {e}"))),
    }
}

/// Our name and AdapterHub's of every tensor that a method has on a base.
fn places(outline: &Outline, method: &str, name: &str) -> Vec<(String, String)> {
    let mut places = Vec::new();
    for site in &outline.sites {
        let SiteKind::Sublayer { part, .. } = site.kind else { continue };
        if method == "adapter-p" && part == Part::Attention {
            continue;
        }
        // Encoders keep adapters in the modules that end a sublayer, decoders beside the sublayers.
        let module = match (site.name.rsplit_once('.'), part) {
            (Some((layer, "attn" | "self_attn")), Part::Attention) => format!("{layer}.attention_adapters"),
            (Some((layer, "mlp")), Part::Mlp) => format!("{layer}.output_adapters"),
            _ => site.name.clone(),
        };
        for (ours, theirs) in [("adapter_down", "adapter_down.0"), ("adapter_up", "adapter_up")] {
            for kind in ["weight", "bias"] {
                places.push((
                    format!("{}.{ours}.{kind}", site.name),
                    format!("{module}.adapters.{name}.{theirs}.{kind}"),
                ));
            }
        }
    }
    places
}

/// AdapterHub's name of a nonlinearity.
fn hub_name(kind: Activation) -> &'static str {
    match kind {
        Activation::Silu => "swish",
        other => other.hf_name(),
    }
}

/// Whether a method has a counterpart.
pub(super) fn writes(method: &str) -> bool {
    KINDS.iter().any(|k| k.method == method)
}

/// The options in AdapterHub's words, and the tensors by its names.
///
/// # Errors
/// A tensor that is missing.
pub(super) fn write(
    file: &AdapterFile,
    outline: &Outline,
    name: &str,
    width: usize,
    mut ours: BTreeMap<String, Tensor>,
) -> Result<(Map<String, Value>, BTreeMap<String, Tensor>)> {
    let kind = KINDS.iter().find(|k| k.method == file.method).expect("asked before");
    let mut tensors = BTreeMap::new();
    for (own, hub) in places(outline, kind.method, name) {
        let tensor = ours.remove(&own).ok_or(lora_core::Error::Missing { name: own })?;
        tensors.insert(hub, tensor);
    }
    let mut config: Map<String, Value> = fixed().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    config.insert("mh_adapter".into(), json!(kind.mh_adapter));
    config.insert("original_ln_before".into(), json!(kind.original_ln_before));
    let non_linearity = file.options.non_linearity.unwrap_or(kind.non_linearity);
    config.insert("non_linearity".into(), json!(hub_name(non_linearity)));
    config.insert("adapter_residual_before_ln".into(), json!(false));
    config.insert("dropout".into(), json!(0.0));
    config.insert("init_weights".into(), json!("bert"));
    // AdapterHub takes the bottleneck as a share of the width, rounded down: a half more keeps it from falling short.
    let bottleneck = file.options.bottleneck;
    let exact = width.is_multiple_of(bottleneck).then(|| json!(width / bottleneck));
    let reduction = exact.unwrap_or_else(|| json!(width as f64 / (bottleneck as f64 + 0.5)));
    config.insert("reduction_factor".into(), reduction);
    Ok((config, tensors))
}
