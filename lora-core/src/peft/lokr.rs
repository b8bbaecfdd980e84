use std::{collections::BTreeMap, ops::Range};

use ndarray::Array2;

use super::{
    Adapter, Attached, BaseTensor, Linear, LinearAdapter, LinearSite, Method, Modules, Outline, Pattern, Plan, Site,
    SiteKind, added, load_plain, save_plain,
    selection::{Selection, Wanted},
    whole::WholeModules,
};
use crate::{
    Error, Init, ParamId, Params, Result, Tape, Tensor, Var,
    lowrank::{Layout, Scaling},
    ops,
};

/// LoKr (Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", section
/// 3.2; Edalati et al. 2022, "KronA"): the update is a Kronecker product,
///
/// ```text
/// h = W₀·x + s·(W₁ ⊗ W₂)·x        W₁ [l, m], W₂ [k, j], W₀ [l·k, m·j], s = α/r
/// ```
/// Inputs and outputs are factored as near to their square roots as they can be, or with `decompose_factor` as one of the
/// two. Where the rank r is below half of W₂'s larger side, W₂ = w2_a·w2_b of that rank; with `decompose_both` W₁ likewise. A
/// higher rank only makes the scale smaller. W₁ (or its w1_a) begins at zero, all else Kaiming-uniform.
///
/// No update is ever formed: x is taken as m pieces of j elements, w2_b acts on every piece, W₁ across them, w2_a on the l
/// pieces that come out. What trains is l·m + r·(k + j) scalars, and the rank of the update is that of W₁ times that of W₂.
#[derive(Clone, Debug)]
pub struct LoKr {
    config: LoKrConfig,
    selection: Selection,
    ranks: Pattern<usize>,
    alphas: Pattern<f64>,
    whole: WholeModules,
}

/// The configuration of [`LoKr`], under PEFT's names but for rank (`r`) and targets (`target_modules`).
#[derive(Clone, Debug, PartialEq)]
pub struct LoKrConfig {
    /// Rank r of the factors that are factored.
    pub rank: usize,
    /// α of the scale s = α/r.
    pub alpha: f64,
    /// What to adapt; without any names the architecture's default, as in PEFT.
    pub targets: Modules,
    /// What not to adapt, although a target says so.
    pub exclude_modules: Modules,
    /// The layers that targets (a list of names) are looked for in, from 0; none: all of them.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer; none: anything.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `rank`.
    pub rank_pattern: Vec<(String, usize)>,
    /// α's of modules that differ from `alpha`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules of the base that train whole and are saved beside the adapter.
    pub modules_to_save: Vec<String>,
    /// Whether W₁ is factored too.
    pub decompose_both: bool,
    /// One of the two factors of inputs and outputs, where it divides them; −1: near the square root.
    pub decompose_factor: i64,
}

/// PEFT's two factors of a number, the smaller one first unless `factor` is the larger of two that divide it.
fn factors(n: usize, factor: i64) -> [usize; 2] {
    let most = usize::try_from(factor).unwrap_or(n);
    if factor > 0 && n.is_multiple_of(most) {
        return [most, n / most];
    }
    // The last divisor up to the square root that brings the two nearer to each other; PEFT counts on from its last.
    let smaller = (1..=most.min(n.isqrt())).rev().find(|m| n.is_multiple_of(*m));
    smaller.map_or([1, n], |m| [m, n / m])
}

impl LoKr {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Option`] for an option that makes no sense.
    pub fn new(config: LoKrConfig) -> Result<LoKr> {
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        let ranks = [("rank", config.rank)].into_iter();
        for (option, r) in ranks.chain(config.rank_pattern.iter().map(|(_, r)| ("rank-pattern", *r))) {
            if r == 0 {
                return bad(option, r.to_string(), "a rank is at least 1");
            }
        }
        let alphas = [("alpha", config.alpha)].into_iter();
        for (option, a) in alphas.chain(config.alpha_pattern.iter().map(|(_, a)| ("alpha-pattern", *a))) {
            if !a.is_finite() || a <= 0.0 {
                return bad(option, a.to_string(), "alpha is a positive number; the update is scaled by alpha/rank");
            }
        }
        if config.decompose_factor != -1 && config.decompose_factor < 1 {
            let why = "is a factor of the widths of layers, at least 1, or -1 for one near their square roots";
            return bad("decompose-factor", config.decompose_factor.to_string(), why);
        }
        Ok(LoKr {
            selection: Selection::new(&Wanted {
                targets: &config.targets,
                exclude_modules: &config.exclude_modules,
                layers_to_transform: &config.layers_to_transform,
                layers_pattern: &config.layers_pattern,
                modules_to_save: &config.modules_to_save,
                others: false,
            })?,
            ranks: Pattern::new("rank-pattern", &config.rank_pattern)?,
            alphas: Pattern::new("alpha-pattern", &config.alpha_pattern)?,
            whole: WholeModules::new(&config.modules_to_save)?,
            config,
        })
    }
}

impl Method for LoKr {
    fn name(&self) -> &'static str {
        "lokr"
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.whole.trains(&tensor.name)
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.selection.check(outline)?;
        let modules = self.selection.whole_modules(outline)?;
        self.ranks.check_used("rank-pattern", &modules)?;
        self.alphas.check_used("alpha-pattern", &modules)?;
        self.whole.check(outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Linear(linear) = &site.kind else { return Ok(None) };
        if self.selection.of(site, linear, plan.outline())?.is_empty() {
            return Ok(None);
        }
        let r = self.ranks.of(&site.name)?.unwrap_or(self.config.rank);
        let alpha = self.alphas.of(&site.name)?.unwrap_or(self.config.alpha);
        let [[l, k], [m, j]] = [linear.outputs, linear.inputs].map(|n| factors(n, self.config.decompose_factor));
        // r < ⌈n/2⌉ is r < n/2.
        let is_factored = |n: usize| r < n.div_ceil(2);
        let zero_or_random = |zero: bool, inputs| if zero { Init::Zeros } else { Init::kaiming_uniform(inputs) };
        let mut factor = |name: &str, [rows, cols]: [usize; 2], factored: bool, zero: bool| {
            let name = |part: &str| format!("{}.lokr_{name}{part}", site.name);
            match factored {
                false => Factor::Whole(plan.add(name(""), &[rows, cols], zero_or_random(zero, cols))),
                true => Factor::Product(
                    plan.add(name("_a"), &[rows, r], zero_or_random(zero, r)),
                    plan.add(name("_b"), &[r, cols], zero_or_random(false, cols)),
                ),
            }
        };
        let w1 = factor("w1", [l, m], self.config.decompose_both && is_factored(l.max(m)), true);
        let w2 = factor("w2", [k, j], is_factored(k.max(j)), false);
        let (site, scale, sides) = (site.name.clone(), Scaling::Lora.scale(alpha, r)?, [[l, k], [m, j]]);
        Ok(Some(Attached::Linear(Box::new(Kronecker { site, w1, w2, scale, sides, linear: linear.clone() }))))
    }
}

/// One factor of the product.
#[derive(Debug)]
enum Factor {
    Whole(ParamId),
    /// a·b.
    Product(ParamId, ParamId),
}

impl Factor {
    fn ids(&self) -> Vec<ParamId> {
        match *self {
            Factor::Whole(w) => vec![w],
            Factor::Product(a, b) => vec![a, b],
        }
    }

    fn matrix(&self, params: &Params) -> Result<Array2<f64>> {
        let matrix = |id: ParamId| -> Result<_> { Ok(params.tensor(id).to_array()?.mapv(f64::from)) };
        match *self {
            Factor::Whole(w) => matrix(w),
            Factor::Product(a, b) => Ok(matrix(a)?.dot(&matrix(b)?)),
        }
    }
}

#[derive(Debug)]
struct Kronecker {
    site: String,
    w1: Factor,
    w2: Factor,
    scale: f64,
    /// [[l, k], [m, j]].
    sides: [[usize; 2]; 2],
    linear: LinearSite,
}

impl LinearAdapter for Kronecker {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        let (y, n, [[l, k], [m, j]]) = (base.apply(t, x)?, x.value().rows(), self.sides);
        // The pieces of x, made shorter where W₂ is a product.
        let (z, last) = match self.w2 {
            Factor::Whole(w) => (ops::reshape(t, x.share(), &[n, m * j]), t.param(w)?),
            Factor::Product(a, b) => {
                let pieces = ops::reshape(t, x.share(), &[n * m, j]);
                let b = t.param(b)?;
                let z = ops::linear(t, &pieces, &b, Layout::OutIn, None)?;
                let width = m * z.value().cols();
                (ops::reshape(t, z, &[n, width]), t.param(a)?)
            }
        };
        let z = match self.w1 {
            Factor::Whole(w) => {
                let w = t.param(w)?;
                ops::linear_blocks(t, &z, &w)?
            }
            Factor::Product(a, b) => {
                let (a, b) = (t.param(a)?, t.param(b)?);
                let z = ops::linear_blocks(t, &z, &b)?;
                ops::linear_blocks(t, &z, &a)?
            }
        };
        let z = ops::reshape(t, z, &[n * l, last.value().cols()]);
        let y = ops::reshape(t, y, &[n * l, k]);
        let y = ops::linear_onto(t, y, 0..k, &z, &last, self.scale)?;
        Ok(ops::reshape(t, y, &[n, l * k]))
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let (w1, w2) = (self.w1.matrix(params)? * self.scale, self.w2.matrix(params)?);
        let [[_, k], [m, j]] = self.sides;
        let element = |o: usize, i: usize| w1[[o / k, i / j]] * w2[[o % k, i % j]];
        let rows = |rows: Range<usize>| Array2::from_shape_fn((rows.len(), m * j), |(o, i)| element(rows.start + o, i));
        added(params, w, &self.linear, rows)
    }
}

impl Adapter for Kronecker {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &self.ids()))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &self.ids(), tensors)
    }
}

impl Kronecker {
    fn ids(&self) -> Vec<ParamId> {
        [self.w1.ids(), self.w2.ids()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `peft.tuners.lokr.layer.factorization` gives.
    #[test]
    fn factors_are_pefts() {
        for (n, factor, wanted) in [
            (256, -1, [16, 16]),
            (128, -1, [8, 16]),
            (127, -1, [1, 127]),
            (128, 4, [4, 32]),
            (768, -1, [24, 32]),
            (2304, -1, [48, 48]),
            (768, 7, [6, 128]),
            (12, 8, [3, 4]),
            (16, 8, [8, 2]),
            (1, -1, [1, 1]),
            (6, 100, [2, 3]),
        ] {
            assert_eq!(factors(n, factor), wanted, "{n}, {factor}");
        }
    }
}
