use std::{collections::BTreeMap, ops::Range};

use ndarray::{Array2, Axis};

use super::{Adapter, Attached, Linear, LinearAdapter, LinearSite, Method, Outline, Plan, Site, SiteKind, take};
use crate::{
    Error, Init, ParamId, Params, Result, Tape, Tensor, Var,
    lowrank::{self, Layout, LowRank, Scaling},
    ops::{self, LoraPart},
};

/// LoRA (Hu et al. 2021, section 4.1): h = W₀x + s·B·A·x with W₀ frozen, A [r, in] Kaiming-uniform, B [out, r] zero, and
/// s = α/r (or α/√r).
///
/// A target is a module by PEFT's rule (its name, or the end of it after a dot), or one part of a fused projection
/// (`c_attn.q`). Parts of one module train as updates of their own columns, and are saved as the equivalent block-structured
/// adapter of the whole module: n parts of rank r become A [n·r, in], B [out, n·r] with B zero outside of the blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    config: LoraConfig,
}

/// The configuration of [`Lora`].
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r of each update.
    pub rank: usize,
    /// α of the scale s = α/r.
    pub alpha: f64,
    /// Dropout on x before A, in training.
    pub dropout: f64,
    /// s = α/√r instead of α/r.
    pub rslora: bool,
    /// What to adapt; none named: the architecture's default, as in PEFT.
    pub targets: Vec<String>,
}

/// How a target relates to a site.
#[derive(PartialEq)]
enum Match {
    Whole,
    Part(usize),
}

/// PEFT's rule for `target_modules`: the module's name, or the end of it after a dot.
pub fn names(target: &str, module: &str) -> bool {
    module.strip_suffix(target).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

fn matching(target: &str, site: &Site, linear: &LinearSite) -> Option<Match> {
    if names(target, &site.name) {
        return Some(Match::Whole);
    }
    let (module, part) = target.rsplit_once('.')?;
    let i = linear.parts.iter().position(|(name, _)| *name == part)?;
    names(module, &site.name).then_some(Match::Part(i))
}

/// What of a site the targets select. Naming the same thing twice (`c_proj` and `attn.c_proj`) is naming it once, as in
/// PEFT; naming a module and a part of it is a mistake.
fn selected(targets: &[String], site: &Site, linear: &LinearSite) -> Result<Vec<Match>> {
    let mut hits: Vec<(&str, Match)> = Vec::new();
    for target in targets {
        let Some(hit) = matching(target, site, linear) else { continue };
        match hits.iter().find(|(_, other)| *other == hit || *other == Match::Whole || hit == Match::Whole) {
            None => hits.push((target, hit)),
            Some((_, other)) if *other == hit => {}
            Some((first, _)) => {
                let (first, second) = (first.to_string(), target.clone());
                return Err(Error::OverlappingTargets { first, second, module: site.name.clone() });
            }
        }
    }
    Ok(hits.into_iter().map(|(_, hit)| hit).collect())
}

impl Lora {
    /// Checks what can be checked without a model.
    pub fn new(config: LoraConfig) -> Result<Lora> {
        let bad = |option, value: &dyn ToString, why: &str| {
            Err(Error::Option { option, value: value.to_string(), why: why.into() })
        };
        let LoraConfig { rank, alpha, dropout, ref targets, .. } = config;
        if rank == 0 {
            return bad("rank", &rank, "a rank is at least 1");
        }
        if !alpha.is_finite() || alpha <= 0.0 {
            return bad("alpha", &alpha, "alpha is a positive number; the update is scaled by alpha/rank");
        }
        if !(0.0..1.0).contains(&dropout) {
            return bad("dropout", &dropout, "a dropout rate is in [0, 1)");
        }
        if targets.iter().any(|t| t.trim().is_empty()) {
            return bad("targets", &targets.join(","), "name at least one module, such as c_attn");
        }
        Ok(Lora { config })
    }

    /// The configuration.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The targets on a base that looks like this.
    fn targets<'a>(&'a self, outline: &'a Outline) -> &'a [String] {
        if self.config.targets.is_empty() { &outline.default_targets } else { &self.config.targets }
    }

    fn scaling(&self) -> Scaling {
        if self.config.rslora { Scaling::RsLora } else { Scaling::Lora }
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        for target in self.targets(outline) {
            if !outline.linear_sites().any(|(s, linear)| matching(target, s, linear).is_some()) {
                let mut modules: Vec<String> = Vec::new();
                for (site, linear) in outline.linear_sites() {
                    // `transformer.h.3.attn.c_attn` is shown as `attn.c_attn`: what follows the layer's number.
                    let parts: Vec<&str> = site.name.split('.').collect();
                    let from = parts.iter().rposition(|p| p.parse::<usize>().is_ok()).map_or(0, |i| i + 1);
                    let name = parts[from..].join(".");
                    let fused = linear.parts.iter().map(|(p, _)| format!("{name}.{p}"));
                    modules.extend([name.clone()].into_iter().chain(fused));
                }
                modules.sort();
                modules.dedup();
                return Err(Error::NoSuchTarget { target: target.clone(), modules });
            }
        }
        Ok(())
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Linear(linear) = &site.kind else { return Ok(None) };
        let r = self.config.rank;
        let mut hits = selected(self.targets(plan.outline()), site, linear)?;
        // In the order of the columns, whatever the order of the targets.
        hits.sort_by_key(|m| match m {
            Match::Whole => 0,
            Match::Part(i) => *i,
        });
        let place = |hit: &Match| match hit {
            Match::Whole => (site.name.clone(), 0..linear.outputs),
            Match::Part(i) => (format!("{}.{}", site.name, linear.parts[*i].0), linear.parts[*i].1.clone()),
        };
        let places: Vec<_> = hits.iter().map(place).collect();
        for (prefix, cols) in &places {
            if r > linear.inputs.min(cols.len()) {
                let why = format!(
                    "a rank is at most the smaller side of its matrix, and {prefix} is {}×{}",
                    cols.len(),
                    linear.inputs
                );
                return Err(Error::Option { option: "rank", value: r.to_string(), why });
            }
        }
        // All A's one below the other, so that one product with x serves them all.
        let init = || Init::kaiming_uniform(linear.inputs);
        let mut a =
            |(prefix, _): &(String, _)| plan.add(format!("{prefix}.lora_A.weight"), &[r, linear.inputs], init());
        let a: Vec<ParamId> = places.iter().map(&mut a).collect();
        let mut term = |((prefix, cols), a): ((String, Range<usize>), ParamId)| {
            let b = plan.add(format!("{prefix}.lora_B.weight"), &[cols.len(), r], Init::Zeros);
            Term { a, b, cols }
        };
        let terms: Vec<Term> = places.into_iter().zip(a).map(&mut term).collect();
        let scale = self.scaling().scale(self.config.alpha, r)?;
        let (dropout, layout, outputs) = (self.config.dropout, linear.layout, linear.outputs);
        let update = Update { terms, scale, dropout, layout, outputs, rank: r };
        Ok((!update.terms.is_empty()).then(|| Attached::Linear(Box::new(update))))
    }
}

/// The update of one site: y[:, cols] += s·(x·Aᵀ)·Bᵀ for each of its terms.
#[derive(Debug)]
struct Update {
    terms: Vec<Term>,
    scale: f64,
    dropout: f64,
    layout: Layout,
    outputs: usize,
    rank: usize,
}

#[derive(Debug)]
struct Term {
    a: ParamId,
    b: ParamId,
    cols: Range<usize>,
}

impl Update {
    /// The whole update as one pair A [n·r, in], B [outputs, n·r]; B is zero outside of its blocks.
    fn pair(&self, params: &Params) -> Result<(Array2<f32>, Array2<f32>)> {
        let (r, n) = (self.rank, self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let mut a = Array2::zeros((n * r, inputs));
        let mut b = Array2::zeros((self.outputs, n * r));
        for (i, term) in self.terms.iter().enumerate() {
            let block = ndarray::s![i * r..(i + 1) * r, ..];
            a.slice_mut(block).assign(&array(&params.tensor(term.a))?);
            let block = ndarray::s![term.cols.clone(), i * r..(i + 1) * r];
            b.slice_mut(block).assign(&array(&params.tensor(term.b))?);
        }
        Ok((a, b))
    }
}

fn array(t: &Tensor) -> Result<Array2<f32>> {
    let t = t.to_dtype(lora_kernels::DType::F32)?;
    Ok(Array2::from_shape_vec((t.rows(), t.cols()), t.to_vec()?).expect("as many elements as the shape says"))
}

fn tensor(like: &Params, a: &Array2<f32>) -> Result<Tensor> {
    let data: Vec<f32> = a.iter().copied().collect();
    Tensor::from_slice(&like.device(), a.shape(), &data)
}

impl LinearAdapter for Update {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        let part = |term: &Term| Ok(LoraPart { cols: term.cols.clone(), a: t.param(term.a)?, b: t.param(term.b)? });
        let parts = self.terms.iter().map(part).collect::<Result<Vec<_>>>()?;
        let Some(mask) = t.dropout_mask(self.dropout) else {
            return ops::lora_linear(t, x, &base.w, base.layout, base.bias.as_ref(), &parts, self.scale);
        };
        let mut y = base.apply(t, x)?;
        // One mask for all parts: PEFT drops the input of the module once.
        let x = &ops::dropout_by(t, x.share(), mask)?;
        for LoraPart { cols, a, b } in parts {
            let u = ops::linear(t, x, &a, Layout::OutIn, None)?;
            y = ops::linear_onto(t, y, cols, &u, &b, self.scale)?;
        }
        Ok(y)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let mut w = array(w)?;
        let outputs = match self.layout {
            Layout::OutIn => Axis(0),
            Layout::InOut => Axis(1),
        };
        // Each term into its own columns: the ranks of all terms together may exceed what one update can have.
        for term in &self.terms {
            let (a, b) = (array(&params.tensor(term.a))?, array(&params.tensor(term.b))?);
            let update = LowRank::new(a, b, self.scale)?;
            let mut block = w.slice_axis_mut(outputs, term.cols.clone().into());
            let merged = lowrank::merge(block.view(), &update, self.layout)?.into_weight();
            block.assign(&merged);
        }
        tensor(params, &w)
    }
}

impl Adapter for Update {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let (a, b) = self.pair(params)?;
        Ok(vec![("lora_A.weight".into(), tensor(params, &a)?), ("lora_B.weight".into(), tensor(params, &b)?)])
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (r, n) = (self.rank, self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let a = array(&take(tensors, &format!("{site}.lora_A.weight"), &[n * r, inputs])?)?;
        let name = format!("{site}.lora_B.weight");
        let mut b = array(&take(tensors, &name, &[self.outputs, n * r])?)?;
        for (i, term) in self.terms.iter().enumerate() {
            let part = a.slice(ndarray::s![i * r..(i + 1) * r, ..]).to_owned();
            params.set(term.a, &tensor(params, &part)?)?;
            let mut block = b.slice_mut(ndarray::s![term.cols.clone(), i * r..(i + 1) * r]);
            let part = block.to_owned();
            params.set(term.b, &tensor(params, &part)?)?;
            block.fill(0.0);
        }
        if b.iter().any(|&v| v != 0.0) {
            let why = "it is not zero outside of the blocks that its parts name, so it is no adapter of these parts; use the whole module as the target".into();
            return Err(Error::Structure { name, why });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::trainable, *};

    fn linear() -> LinearSite {
        let parts = vec![("q", 0..4), ("k", 4..8), ("v", 8..12)];
        LinearSite { inputs: 4, outputs: 12, layout: Layout::InOut, parts }
    }

    fn site() -> Site {
        Site { name: "transformer.h.0.attn.c_attn".into(), layer: Some(0), kind: SiteKind::Linear(linear()) }
    }

    #[test]
    fn targets_match_whole_names_and_parts() {
        let hits = |targets: &[&str]| {
            let targets: Vec<String> = targets.iter().map(|t| t.to_string()).collect();
            selected(&targets, &site(), &linear()).map(|h| h.len())
        };
        for (targets, n) in [
            (&["c_attn"][..], 1),
            (&["attn.c_attn"], 1),
            (&["transformer.h.0.attn.c_attn"], 1),
            (&["attn"], 0),
            (&["_attn"], 0),
            (&["c_attn.q", "c_attn.v"], 2),
            (&["attn.c_attn.q"], 1),
            (&["c_attn.x"], 0),
            (&["h.1.attn.c_attn"], 0),
            (&["c_attn", "attn.c_attn"], 1),
            (&["c_attn.q", "attn.c_attn.q"], 1),
        ] {
            assert_eq!(hits(targets).unwrap(), n, "{targets:?}");
        }
        for overlap in [&["c_attn", "c_attn.q"][..], &["c_attn.k", "attn.c_attn"]] {
            assert!(matches!(hits(overlap), Err(Error::OverlappingTargets { .. })), "{overlap:?}");
        }
    }

    #[test]
    fn senseless_options_are_refused_by_name() {
        let good = LoraConfig { rank: 2, alpha: 4.0, dropout: 0.0, rslora: false, targets: vec!["c_attn".into()] };
        let bad = [
            ("rank", LoraConfig { rank: 0, ..good.clone() }),
            ("alpha", LoraConfig { alpha: f64::NAN, ..good.clone() }),
            ("alpha", LoraConfig { alpha: -1.0, ..good.clone() }),
            ("dropout", LoraConfig { dropout: 1.0, ..good.clone() }),
            ("targets", LoraConfig { targets: vec![" ".into()], ..good.clone() }),
        ];
        for (name, config) in bad {
            assert!(matches!(Lora::new(config), Err(Error::Option { option, .. }) if option == name), "{name}");
        }
        let too_large = Lora::new(LoraConfig { rank: 5, ..good }).unwrap();
        let outline = Outline { sites: vec![site()], ..Outline::default() };
        assert!(matches!(trainable(&too_large, &outline), Err(Error::Option { option: "rank", .. })));
    }
}
