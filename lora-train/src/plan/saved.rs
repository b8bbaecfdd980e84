//! What a method leaves on disk, as `lora_model::adapter::save` and `Model::save` write it.

use lora_core::{
    Tensor,
    peft::{Frozen, MethodRow, Options, Outline, SiteKind},
};
use lora_model::{
    adapter,
    checkpoint::{TensorSpec, file_bytes},
};

use super::adapted::{Adapted, PROMPT, scalars};

/// A result on disk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Saved {
    /// Bytes of the safetensors file, f32 and header.
    pub(super) bytes: u64,
    /// Scalars without padding: those of a low-rank update as it trains, where PEFT's layout of one part of a fused
    /// projection has zeros beside them.
    pub(super) scalars: u128,
}

/// The whole base.
pub(super) fn model(outline: &Outline) -> Saved {
    let specs: Vec<TensorSpec> = outline.tensors.iter().map(|t| TensorSpec::new(&t.name, t.shape.clone())).collect();
    Saved { bytes: file_bytes(&[("format", "pt")], &specs), scalars: outline.parameters() }
}

/// What a method trains: the whole model, or an adapter.
pub(super) fn result(row: &MethodRow, options: &Options, adapted: &Adapted, outline: &Outline) -> Saved {
    if row.whole_model {
        return model(outline);
    }
    let mut specs: Vec<(String, Vec<usize>)> = Vec::new();
    let mut own = 0;
    // Keys and values are saved flattened, low-rank updates site by site, all else as it is.
    for (name, shape) in &adapted.parameters {
        let of_lora = [".lora_A.weight", ".lora_B.weight"].iter().any(|factor| name.ends_with(factor));
        if !of_lora && !name.starts_with(KEYS_VALUES) {
            specs.push((name.clone(), shape.clone()));
            own += scalars(shape);
        }
    }
    for site in &outline.sites {
        match &site.kind {
            SiteKind::Linear(linear) | SiteKind::Head(linear) => {
                let of_site: Vec<_> = adapted.parameters.iter().filter(|(n, _)| is_part(n, &site.name)).collect();
                let rank: usize =
                    of_site.iter().filter(|(n, _)| n.ends_with(".lora_A.weight")).map(|(_, s)| s[0]).sum();
                // What an update began at is saved beside it.
                let halves = if options.init_lora_weights.takes_from_base() { 2 } else { 1 };
                let rank = halves * rank;
                if rank > 0 {
                    specs.push((format!("{}.lora_A.weight", site.name), vec![rank, linear.inputs]));
                    specs.push((format!("{}.lora_B.weight", site.name), vec![linear.outputs, rank]));
                    own += halves as u128 * of_site.iter().map(|(_, s)| scalars(s)).sum::<u128>();
                }
            }
            SiteKind::Embedding { rows, width } => {
                let factor = |f: &str| adapted.parameters.iter().find(|(n, _)| *n == format!("{}.{f}", site.name));
                if let (Some((a, shape)), Some((b, _))) = (factor("lora_embedding_A"), factor("lora_embedding_B")) {
                    let rank = if options.init_lora_weights.takes_from_base() { 2 * shape[1] } else { shape[1] };
                    specs.push((a.clone(), vec![rank, *rows]));
                    specs.push((b.clone(), vec![*width, rank]));
                    own += (shape[1] * (rows + width)) as u128;
                }
            }
            SiteKind::KeysValues { layers, cols } if adapted.virtual_tokens()[1] > 0 => {
                let shape = vec![adapted.virtual_tokens()[1], layers * 2 * cols];
                own += scalars(&shape);
                specs.push((format!("{KEYS_VALUES}{PROMPT}"), shape));
            }
            _ => {}
        }
    }
    if options.save_projection {
        for (name, shape) in adapted.projections() {
            own += scalars(&shape);
            specs.push((name, shape));
        }
    }
    for Frozen { name, tensors, .. } in &options.fuse {
        let of_fusion = |(full, t): (&String, &Tensor)| {
            let (site, tensor) = full.split_once(".adapter_")?;
            Some((format!("{site}.adapters.{name}.adapter_{tensor}"), t.shape().to_vec()))
        };
        for (name, shape) in tensors.iter().filter_map(of_fusion) {
            own += scalars(&shape);
            specs.push((name, shape));
        }
    }
    let adapted: Vec<String> =
        specs.iter().filter_map(|(n, _)| Some(n.strip_suffix(".lora_A.weight")?.into())).collect();
    let is_adapted = |site: &str| adapted.iter().any(|a| a == site);
    let stored = |name: &str| adapter::stored_name(row, options, outline, name, is_adapted);
    let specs: Vec<TensorSpec> = specs.into_iter().map(|(n, s)| TensorSpec::new(stored(&n), s)).collect();
    // As long as every fingerprint.
    let metadata = adapter::metadata(row, options, outline, "0123456789abcdef");
    Saved { bytes: file_bytes(&metadata, &specs), scalars: own }
}

/// What the names of parameters of keys and values begin with.
const KEYS_VALUES: &str = "past_key_values.";

/// Whether a parameter is one of a low-rank update of this site, or of one of its parts.
fn is_part(name: &str, site: &str) -> bool {
    let Some(rest) = name.strip_prefix(site) else { return false };
    let rest = rest.strip_suffix(".lora_A.weight").or_else(|| rest.strip_suffix(".lora_B.weight"));
    rest.is_some_and(|part| part.is_empty() || part.starts_with('.') && !part[1..].contains('.'))
}
