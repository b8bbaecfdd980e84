//! What a method trains and attaches, told by the names and shapes of its parameters.

use std::collections::HashMap;

use lora_core::peft::{LinearSite, Method, Options, Outline, Site, SiteKind, parameters};

use super::{
    ops::{self, Map},
    tape::{Tape, Var},
};
use crate::Result;

/// A method applied to a base of which there is only the outline.
pub(super) struct Adapted<'a> {
    outline: &'a Outline,
    method: &'static str,
    options: &'a Options,
    /// Everything that trains.
    pub(super) parameters: Vec<(String, Vec<usize>)>,
    shapes: HashMap<String, Vec<usize>>,
    /// The ranks of the low-rank updates of a site, one for each part.
    ranks: HashMap<String, Vec<u128>>,
    outputs: HashMap<&'a str, u128>,
}

/// The normalisation that follows where a sublayer joins the stream, where there is one.
pub(super) type Norm<'a> = Option<&'a dyn Fn(&mut Tape, &Var) -> Var>;

/// The ends of the names of the factors of updates.
const LORA: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// The parameter of all virtual tokens, below the name of their site.
pub(super) const PROMPT: &str = "prompt_embeddings";

impl<'a> Adapted<'a> {
    /// # Errors
    /// A method that does not fit the base.
    pub(super) fn new(method: &dyn Method, options: &'a Options, outline: &'a Outline) -> Result<Adapted<'a>> {
        let parameters = parameters(method, outline)?;
        let shapes: HashMap<_, _> = parameters.iter().cloned().collect();
        let (mut ranks, mut outputs) = (HashMap::new(), HashMap::new());
        for (site, linear) in outline.linear_sites() {
            let places =
                linear.parts.iter().map(|(part, _)| format!("{}.{part}", site.name)).chain([site.name.clone()]);
            let of_site = places.filter_map(|place| Some(shapes.get(&format!("{place}.lora_A.weight"))?[0] as u128));
            let of_site: Vec<u128> = of_site.collect();
            if !of_site.is_empty() {
                ranks.insert(site.name.clone(), of_site);
            }
            outputs.insert(site.name.as_str(), linear.outputs as u128);
        }
        Ok(Adapted { outline, method: method.name(), options, parameters, shapes, ranks, outputs })
    }

    /// How many scalars train.
    pub(super) fn trainable(&self) -> u128 {
        self.parameters.iter().map(|(_, shape)| scalars(shape)).sum()
    }

    /// Whether a weight of the base trains.
    pub(super) fn trains(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    /// The map of a module of the base.
    pub(super) fn map(&self, module: &str, outputs: u128) -> Map {
        Map { outputs, w: self.trains(&format!("{module}.weight")), b: self.trains(&format!("{module}.bias")) }
    }

    /// So many rows of the table of embeddings with this weight, with what is attached to it.
    pub(super) fn embed(&self, t: &mut Tape, table: &str, [rows, width]: [u128; 2], n: u128) -> Var {
        let own = t.weight(rows, width, self.trains(table));
        let x = ops::gather(t, &own, n);
        let module = table.strip_suffix(".weight").unwrap_or(table);
        let Some(&[_, rank]) = self.shapes.get(&format!("{module}.lora_embedding_A")).map(Vec::as_slice) else {
            return x;
        };
        let at = t.weight(rows, rank as u128, true);
        let u = ops::gather(t, &at, n);
        ops::linear_onto(t, x, &u, true)
    }

    /// What the update of an output head's matrix is applied to, where there is one.
    pub(super) fn beside_head(&self, t: &mut Tape, module: &str, x: &Var) -> Option<Var> {
        let rank = self.shapes.get(&format!("{module}.lora_A.weight"))?[0] as u128;
        let x = ops::dropout(t, x.share(), self.options.dropout);
        Some(ops::linear(t, &x, Map { outputs: rank, w: true, b: false }))
    }

    /// A site's linear map, with what is attached to it.
    pub(super) fn project(&self, t: &mut Tape, site: &str, x: &Var) -> Var {
        let map = self.map(site, self.outputs[site]);
        match self.shapes.get(&format!("{site}.ia3_l")).map(Vec::as_slice) {
            // A vector on the inputs stands in one row.
            Some([1, cols]) if *cols as u128 == x.value.cols => {
                let x = ops::scale_columns(t, x, true);
                return ops::linear(t, &x, map);
            }
            Some(_) => {
                let y = ops::linear(t, x, map);
                return ops::scale_columns(t, &y, true);
            }
            None => {}
        }
        if let Some(&[rank, _]) = self.shapes.get(&format!("{site}.lora_E")).map(Vec::as_slice) {
            return self.project_decomposed(t, x, map, rank as u128);
        }
        if let Some(&[rank]) = self.shapes.get(&format!("{site}.vera_lambda_d")).map(Vec::as_slice) {
            return self.project_vera(t, x, map, rank as u128);
        }
        if let Some(w1) = self.factor(site, "w1") {
            return self.project_kronecker(t, site, x, map, w1);
        }
        if self.trains(&format!("{site}.lora_magnitude_vector")) {
            return self.project_dora(t, site, x, map);
        }
        let Some(ranks) = self.ranks.get(site) else { return ops::linear(t, x, map) };
        if self.options.dropout == 0.0 {
            let y = ops::lora_linear(t, x, map, ranks.iter().sum());
            return self.given_way(t, x, y, ranks);
        }
        let y = ops::linear(t, x, map);
        let mut y = self.given_way(t, x, y, ranks);
        let x = ops::dropout(t, x.share(), self.options.dropout);
        for &rank in ranks {
            let u = ops::linear(t, &x, Map { outputs: rank, w: true, b: false });
            y = ops::linear_onto(t, y, &u, true);
        }
        y
    }

    /// The same with an update that has the form of a singular value decomposition.
    fn project_decomposed(&self, t: &mut Tape, x: &Var, map: Map, rank: u128) -> Var {
        let trained = Map { outputs: rank, w: true, b: false };
        let y = ops::linear(t, x, map);
        let u = match self.options.dropout {
            0.0 => ops::linear(t, x, trained),
            p => {
                let x = ops::dropout(t, x.share(), p);
                ops::linear(t, &x, trained)
            }
        };
        let u = ops::scale_columns(t, &u, true);
        ops::linear_onto(t, y, &u, true)
    }

    /// The same with vectors around random matrices.
    fn project_vera(&self, t: &mut Tape, x: &Var, map: Map, rank: u128) -> Var {
        let frozen = |outputs| Map { outputs, w: false, b: false };
        let y = ops::linear(t, x, map);
        let u = match self.options.dropout {
            0.0 => ops::linear(t, x, frozen(rank)),
            p => {
                let x = ops::dropout(t, x.share(), p);
                ops::linear(t, &x, frozen(rank))
            }
        };
        let u = ops::scale_columns(t, &u, true);
        let more = ops::linear(t, &u, frozen(map.outputs));
        let more = ops::scale_columns(t, &more, true);
        ops::add(t, y, more)
    }

    /// Names and shapes of VeRA's random matrices, under the site that saves them, where there are some.
    pub(super) fn projections(&self) -> Vec<(String, Vec<usize>)> {
        let with = |(site, linear)| {
            let site: &Site = site;
            let rank = self.shapes.get(&format!("{}.vera_lambda_d", site.name))?;
            Some((site, linear, rank[0]))
        };
        let adapted: Vec<(&Site, &LinearSite, usize)> = self.outline.linear_sites().filter_map(with).collect();
        let most = |width: fn(&LinearSite) -> usize| adapted.iter().map(|(_, l, _)| width(l)).max().unwrap_or_default();
        let shapes = |r| [("vera_A", vec![r, most(|l| l.inputs)]), ("vera_B", vec![most(|l| l.outputs), r])];
        let named = |(first, _, r): &(&Site, &LinearSite, usize)| {
            shapes(*r).into_iter().map(|(name, shape)| (format!("{}.{name}", first.name), shape)).collect()
        };
        adapted.first().map(named).unwrap_or_default()
    }

    /// Rows, columns and the rank, where it is factored, of a factor of a site's Kronecker product.
    fn factor(&self, site: &str, name: &str) -> Option<(u128, u128, Option<u128>)> {
        let shape = |part: &str| Some(&self.shapes.get(&format!("{site}.lokr_{name}{part}"))?[..]);
        match (shape(""), shape("_a"), shape("_b")) {
            (Some(&[rows, cols]), ..) => Some((rows as u128, cols as u128, None)),
            (_, Some(&[rows, rank]), Some(&[_, cols])) => Some((rows as u128, cols as u128, Some(rank as u128))),
            _ => None,
        }
    }

    /// The same with a Kronecker product.
    fn project_kronecker(&self, t: &mut Tape, site: &str, x: &Var, map: Map, w1: (u128, u128, Option<u128>)) -> Var {
        let y = ops::linear(t, x, map);
        let (n, (l, m, rank)) = (x.value.rows, w1);
        let Some((k, j, inner)) = self.factor(site, "w2") else { return y };
        let alone = |outputs| Map { outputs, w: true, b: false };
        let (z, q) = match inner {
            None => (ops::reshape(t, x.share(), n, m * j), j),
            Some(r) => {
                let pieces = ops::reshape(t, x.share(), n * m, j);
                let z = ops::linear(t, &pieces, alone(r));
                drop(pieces);
                (ops::reshape(t, z, n, m * r), r)
            }
        };
        let z = match rank {
            None => ops::linear_blocks(t, &z, [l, m]),
            Some(r) => {
                let z = ops::linear_blocks(t, &z, [r, m]);
                ops::linear_blocks(t, &z, [l, r])
            }
        };
        let z = ops::reshape(t, z, n * l, q);
        let y = ops::reshape(t, y, n * l, k);
        let y = ops::linear_onto(t, y, &z, true);
        ops::reshape(t, y, n, l * k)
    }

    /// The output of a linear map that gives way to what its updates began at.
    fn given_way(&self, t: &mut Tape, x: &Var, mut y: Var, ranks: &[u128]) -> Var {
        for &rank in ranks.iter().filter(|_| self.options.init_lora_weights.takes_from_base()) {
            let u = ops::linear(t, x, Map { outputs: rank, w: false, b: false });
            y = ops::linear_onto(t, y, &u, false);
        }
        y
    }

    /// What a method keeps beside the base that does not train: what updates began at, and random matrices.
    pub(super) fn constants(&self) -> u128 {
        let factors = self.parameters.iter().filter(|(name, _)| LORA.iter().any(|end| name.ends_with(end)));
        let taken = self.options.init_lora_weights.takes_from_base();
        let began: u128 = if taken { factors.map(|(_, shape)| scalars(shape)).sum() } else { 0 };
        began + self.projections().iter().map(|(_, shape)| scalars(shape)).sum::<u128>()
    }

    /// The same with DoRA, which adapts a site as a whole.
    fn project_dora(&self, t: &mut Tape, site: &str, x: &Var, map: Map) -> Var {
        let ranks = self.ranks.get(site).map_or(&[][..], Vec::as_slice);
        let rank = ranks.iter().sum();
        let directed = |t: &mut Tape, x: &Var, own: Var| {
            let u = ops::linear(t, x, Map { outputs: rank, w: true, b: false });
            let y = ops::linear_onto(t, own, &u, true);
            ops::scale_columns(t, &y, true)
        };
        let plain = Map { b: false, ..map };
        if self.options.dropout == 0.0 {
            let own = ops::linear(t, x, plain);
            let own = self.given_way(t, x, own, ranks);
            return directed(t, x, own);
        }
        let y = ops::linear(t, x, map);
        let y = self.given_way(t, x, y, ranks);
        let x = &ops::dropout(t, x.share(), self.options.dropout);
        let own = ops::linear(t, x, plain);
        let own = self.given_way(t, x, own, ranks);
        let more = directed(t, x, own.share());
        let y = ops::add(t, y, more);
        ops::add(t, y, own)
    }

    /// The stream after a sublayer, with what is attached there; `norm` follows where there is one.
    pub(super) fn join(&self, t: &mut Tape, site: &str, x: Var, f: Var, norm: Norm) -> Var {
        let joined = |t: &mut Tape, x: Var, f: Var| {
            let y = ops::add(t, x, f);
            match norm {
                Some(norm) => norm(t, &y),
                None => y,
            }
        };
        let d = x.value.cols;
        let trained = |outputs| Map { outputs, w: true, b: true };
        if let Some(&[rank, _]) = self.shapes.get(&format!("{site}.adapter_down.weight")).map(Vec::as_slice) {
            let bottleneck = |t: &mut Tape, x: &Var| bottleneck(t, x, [trained(rank as u128), trained(d)]);
            return match self.method {
                "adapter-h" => {
                    let z = bottleneck(t, &f);
                    let f = ops::add(t, f, z);
                    joined(t, x, f)
                }
                "adapter-l" => {
                    let h = joined(t, x, f);
                    let u = ops::norm(t, &h, [true, true], 2);
                    let z = bottleneck(t, &u);
                    drop(u);
                    ops::add(t, h, z)
                }
                _ => after(t, x, f, norm, bottleneck),
            };
        }
        if !self.trains(&format!("{site}.fusion_query.weight")) {
            return joined(t, x, f);
        }
        after(t, x, f, norm, |t, h| {
            let frozen = |outputs| Map { outputs, w: false, b: false };
            let mut all: Option<Var> = None;
            for member in &self.options.fuse {
                let z = bottleneck(t, h, [frozen(member.bottleneck as u128), frozen(d)]);
                all = Some(match all {
                    Some(all) => ops::concat_rows(t, &all, &z),
                    None => z,
                });
            }
            let z = all.unwrap_or_else(|| h.share());
            let q = ops::linear(t, h, trained(d));
            let alone = Map { outputs: d, w: true, b: false };
            let q = ops::linear(t, &q, alone);
            let o = ops::mix(t, &q, &z);
            ops::linear(t, &o, alone)
        })
    }

    /// Virtual tokens among the tokens, and those in attention alone.
    pub(super) fn virtual_tokens(&self) -> [usize; 2] {
        let count = self.options.prefix + self.options.infix;
        let below = |site: &str| self.shapes.keys().any(|k| k.strip_prefix(site).is_some_and(|k| k.starts_with('.')));
        let (mut stream, mut attention) = (false, false);
        for site in &self.outline.sites {
            match site.kind {
                SiteKind::Tokens { .. } => stream |= self.trains(&format!("{}.{PROMPT}", site.name)),
                SiteKind::KeysValues { .. } => attention |= below(&site.name),
                _ => {}
            }
        }
        [stream, attention].map(|there| if there { count } else { 0 })
    }

    /// How many positions virtual tokens take from the text.
    pub(super) fn positions(&self) -> usize {
        let [stream, attention] = self.virtual_tokens();
        stream + if self.options.count_prefix { attention } else { 0 }
    }

    /// Keys and values [l, columns] of virtual tokens.
    pub(super) fn keys_values(&self, t: &mut Tape, cols: u128) -> Var {
        let l = self.virtual_tokens()[1] as u128;
        if self.options.reparam == 0 {
            return t.weight(l, cols, true);
        }
        let e = t.weight(l, cols, true);
        let x = ops::linear(t, &e, Map { outputs: self.options.reparam as u128, w: true, b: true });
        let x = ops::activation(t, &x);
        ops::linear(t, &x, Map { outputs: cols, w: true, b: true })
    }
}

fn bottleneck(t: &mut Tape, x: &Var, [down, up]: [Map; 2]) -> Var {
    let h = ops::linear(t, x, down);
    let h = ops::activation(t, &h);
    ops::linear(t, &h, up)
}

/// As `lora_core`'s adapters after the MLP join the stream.
fn after(t: &mut Tape, x: Var, f: Var, norm: Norm, adapt: impl FnOnce(&mut Tape, &Var) -> Var) -> Var {
    let sum = ops::add(t, x, f);
    let Some(norm) = norm else {
        let z = adapt(t, &sum);
        return ops::add(t, sum, z);
    };
    let h = norm(t, &sum);
    let z = adapt(t, &h);
    drop(h);
    let sum = ops::add(t, sum, z);
    norm(t, &sum)
}

/// Number of elements.
pub(super) fn scalars(shape: &[usize]) -> u128 {
    shape.iter().map(|&n| n as u128).product()
}
