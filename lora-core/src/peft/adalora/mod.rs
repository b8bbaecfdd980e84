//! AdaLoRA: its configuration, what it adapts, and the update of one site; how its ranks are chosen is `budget.rs`.

mod budget;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use ndarray::{Array2, Axis};

use super::{
    Adapter, Attached, BaseTensor, Linear, LinearAdapter, LinearSite, Method, Modules, Outline, Plan, Site, SiteKind,
    Start, added, load_plain,
    lora::LARGEST_SQUARE,
    save_plain,
    selection::{Selection, Wanted},
    take,
    whole::WholeModules,
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

pub use budget::Budget;

/// AdaLoRA (Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3): the
/// update has the form of a singular value decomposition, and training takes away the singular values that matter least,
///
/// ```text
/// h = W₀·x + s·B·(E ∘ A·x)        A [r, in], E [r, 1], B [out, r], s = α/(init_r + 1e-5)
/// ```
/// A and B begin normal with deviation 0.02, E at zero. A penalty on the loss ([`ops::orthogonality`]) keeps the rows of A and
/// the columns of B near orthonormal. Which values stay, over all maps together, a [`Budget`] decides.
///
/// An adapter whose budget has been cut is saved without what was taken away; loaded, it keeps the ranks that it has. Before
/// the last cut the file of an adapter in training lacks what has come back since the one before, as PEFT's does.
#[derive(Clone, Debug)]
pub struct AdaLora {
    config: AdaLoraConfig,
    selection: Selection,
    whole: WholeModules,
}

/// The configuration of [`AdaLora`], under PEFT's names but for alpha (`lora_alpha`), dropout (`lora_dropout`) and targets
/// (`target_modules`).
#[derive(Clone, Debug, PartialEq)]
pub struct AdaLoraConfig {
    /// Ranks, and when they are taken away.
    pub schedule: AdaLoraSchedule,
    /// α of the scale.
    pub alpha: f64,
    /// Dropout on x before A, in training.
    pub dropout: f64,
    /// What to adapt; without any names PEFT's default for the architecture.
    pub targets: Modules,
    /// What not to adapt, although a target says so.
    pub exclude_modules: Modules,
    /// The layers that targets (a list of names) are looked for in, from 0; none: all of them.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer; none: anything.
    pub layers_pattern: Vec<String>,
    /// Modules of the base that train whole and are saved beside the adapter.
    pub modules_to_save: Vec<String>,
}

/// When AdaLoRA takes ranks away and how many, under PEFT's names but for Δt (`deltaT`).
#[derive(Clone, Debug, PartialEq)]
pub struct AdaLoraSchedule {
    /// Rank of each update when training begins.
    pub init_r: usize,
    /// The mean rank when it ends.
    pub target_r: usize,
    /// Steps before the first cut.
    pub tinit: u64,
    /// Steps after the last cut.
    pub tfinal: u64,
    /// Steps from cut to cut.
    pub delta_t: u64,
    /// Steps of the whole schedule; `None` is those of the run.
    pub total_step: Option<u64>,
    /// β₁, of the mean of sensitivities.
    pub beta1: f64,
    /// β₂, of the mean of their deviations.
    pub beta2: f64,
    /// Weight of the penalty.
    pub orth_reg_weight: f64,
    /// Of an adapter whose budget was cut, by module: which of the first ranks are left. PEFT's `rank_pattern`.
    pub kept: BTreeMap<String, Vec<bool>>,
}

impl Default for AdaLoraSchedule {
    /// PEFT's defaults.
    fn default() -> AdaLoraSchedule {
        AdaLoraSchedule {
            init_r: 12,
            target_r: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            total_step: None,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            kept: BTreeMap::new(),
        }
    }
}

impl AdaLoraSchedule {
    /// Refuses numbers that make no sense on any model.
    fn check(&self) -> Result<()> {
        let c = self;
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        if c.init_r == 0 || c.init_r > LARGEST_SQUARE {
            // Its penalty is of a matrix [init-r, init-r].
            return bad("init-r", c.init_r.to_string(), "AdaLoRA's rank is from 1 to 8192");
        }
        if c.target_r == 0 || c.target_r > c.init_r {
            let why = format!("the rank at the end is at least 1, and at most that of the beginning, {}", c.init_r);
            return bad("target-r", c.target_r.to_string(), &why);
        }
        if c.delta_t == 0 {
            return bad("delta-t", "0".into(), "there is at least 1 step from cut to cut");
        }
        if let Some(total) = c.total_step {
            c.check_steps(total)?;
        }
        for (option, beta) in [("adalora-beta1", c.beta1), ("adalora-beta2", c.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return bad(option, beta.to_string(), "is between 0 and 1");
            }
        }
        if !c.orth_reg_weight.is_finite() || c.orth_reg_weight < 0.0 {
            return bad("orth-reg-weight", c.orth_reg_weight.to_string(), "a weight is a number ≥ 0");
        }
        if let Some((module, of)) = c.kept.iter().find(|(_, of)| of.len() != c.init_r) {
            let why = format!("it says of {} ranks whether they are left, and there were {}", of.len(), c.init_r);
            return bad("rank-pattern", module.clone(), &why);
        }
        Ok(())
    }

    /// Refuses a schedule that has no step at which to cut.
    fn check_steps(&self, total: u64) -> Result<()> {
        if self.tinit.saturating_add(self.tfinal) < total {
            return Ok(());
        }
        let why = format!(
            "with tinit {} and tfinal {} no step is left at which ranks could be taken away; lower those, or train longer",
            self.tinit, self.tfinal
        );
        Err(Error::Option { option: "total-step", value: total.to_string(), why })
    }
}

/// PEFT's targets where they are not those of LoRA.
const DEFAULTS: [(&str, &[&str]); 2] = [
    ("roberta", &["query", "key", "value", "dense"]),
    ("deberta-v2", &["query_proj", "key_proj", "value_proj", "dense"]),
];

impl AdaLora {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Option`] for an option that makes no sense.
    pub fn new(config: AdaLoraConfig) -> Result<AdaLora> {
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        config.schedule.check()?;
        if !config.alpha.is_finite() || config.alpha <= 0.0 {
            let why = "alpha is a positive number; the update is scaled by alpha/init-r";
            return bad("alpha", config.alpha.to_string(), why);
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return bad("dropout", config.dropout.to_string(), "a dropout rate is in [0, 1)");
        }
        Ok(AdaLora {
            selection: Selection::new(&Wanted {
                targets: &config.targets,
                exclude_modules: &config.exclude_modules,
                layers_to_transform: &config.layers_to_transform,
                layers_pattern: &config.layers_pattern,
                modules_to_save: &config.modules_to_save,
                others: false,
            })?,
            whole: WholeModules::new(&config.modules_to_save)?,
            config,
        })
    }

    /// The targets on a base that looks like this when none are named.
    pub fn default_targets(outline: &Outline) -> Modules {
        match DEFAULTS.iter().find(|(architecture, _)| *architecture == outline.architecture) {
            Some((_, names)) => names.iter().copied().collect(),
            None => outline.default_targets.clone().into(),
        }
    }

    /// What is adapted on a base that looks like this.
    fn selection(&self, outline: &Outline) -> Result<Selection> {
        match self.config.targets.is_default() {
            true => self.selection.with_targets(&AdaLora::default_targets(outline)),
            false => Ok(self.selection.clone()),
        }
    }
}

impl Method for AdaLora {
    fn name(&self) -> &'static str {
        "adalora"
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.whole.trains(&tensor.name)
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        let selection = self.selection(outline)?;
        selection.check(outline)?;
        let adapted: BTreeSet<&str> = selection.whole_modules(outline)?.into_iter().collect();
        if let Some(module) = self.config.schedule.kept.keys().find(|module| !adapted.contains(module.as_str())) {
            let why = "is no module that is adapted".into();
            return Err(Error::Option { option: "rank-pattern", value: module.clone(), why });
        }
        self.whole.check(outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Linear(linear) = &site.kind else { return Ok(None) };
        if self.selection(plan.outline())?.of(site, linear, plan.outline())?.is_empty() {
            return Ok(None);
        }
        let r = match self.config.schedule.kept.get(&site.name) {
            Some(kept) => kept.iter().filter(|kept| **kept).count(),
            None => self.config.schedule.init_r,
        };
        let mut add = |name: &str, shape: [usize; 2], init| plan.add(format!("{}.{name}", site.name), &shape, init);
        let normal = || Init::Normal { std: 0.02 };
        // Of a map that has lost all its ranks nothing is left to train.
        let factors = (r > 0).then(|| Factors {
            a: add("lora_A", [r, linear.inputs], normal()),
            e: add("lora_E", [r, 1], Init::Zeros),
            b: add("lora_B", [linear.outputs, r], normal()),
        });
        // What the number of ranks was when training began: PEFT never changes it.
        let scale = self.config.alpha / (self.config.schedule.init_r as f64 + 1e-5);
        let (site, dropout) = (site.name.clone(), self.config.dropout);
        Ok(Some(Attached::Linear(Box::new(Decomposed { site, factors, scale, dropout, linear: linear.clone() }))))
    }

    fn start(&self) -> Start {
        Start::Base
    }

    fn budget(&self, outline: &Outline) -> Result<Option<Budget>> {
        let sites = self.selection(outline)?.whole_modules(outline)?.into_iter().map(str::to_owned).collect();
        Ok(Some(Budget::new(self.config.schedule.clone(), sites)))
    }
}

#[derive(Debug)]
struct Factors {
    a: ParamId,
    e: ParamId,
    b: ParamId,
}

#[derive(Debug)]
struct Decomposed {
    site: String,
    factors: Option<Factors>,
    scale: f64,
    dropout: f64,
    linear: LinearSite,
}

impl Decomposed {
    fn ids(&self) -> Vec<ParamId> {
        self.factors.iter().flat_map(|f| [f.a, f.e, f.b]).collect()
    }

    /// The tensors of a map without ranks: names below the site, and shapes.
    fn empty(&self) -> [(&'static str, [usize; 2]); 3] {
        [("lora_A", [0, self.linear.inputs]), ("lora_E", [0, 1]), ("lora_B", [self.linear.outputs, 0])]
    }
}

impl LinearAdapter for Decomposed {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        let (y, mask) = (base.apply(t, x)?, t.dropout_mask(self.dropout));
        let Some(Factors { a, e, b }) = &self.factors else { return Ok(y) };
        let (a, e, b) = (t.param(*a)?, t.param(*e)?, t.param(*b)?);
        let u = match mask {
            Some(mask) => {
                let x = ops::dropout_by(t, x.share(), mask)?;
                ops::linear(t, &x, &a, Layout::OutIn, None)?
            }
            None => ops::linear(t, x, &a, Layout::OutIn, None)?,
        };
        let u = ops::scale_columns(t, &u, &e)?;
        ops::linear_onto(t, y, 0..self.linear.outputs, &u, &b, self.scale)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let Some(Factors { a, e, b }) = &self.factors else { return Ok(w.clone()) };
        let matrix = |id: &ParamId| -> Result<Array2<f64>> { Ok(params.tensor(*id).to_array()?.mapv(f64::from)) };
        let (a, b) = (matrix(a)? * matrix(e)?, matrix(b)? * self.scale);
        added(params, w, &self.linear, |rows: Range<usize>| b.slice_axis(Axis(0), rows.into()).dot(&a))
    }
}

impl Adapter for Decomposed {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        if self.factors.is_some() {
            return Ok(save_plain(params, &self.site, &self.ids()));
        }
        let none = |(name, shape): (&str, [usize; 2])| {
            Ok((name.to_owned(), Tensor::zeros(&params.device(), params.dtype(), &shape)?))
        };
        self.empty().into_iter().map(none).collect()
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        if self.factors.is_none() {
            for (name, shape) in self.empty() {
                take(tensors, &format!("{site}.{name}"), &shape)?;
            }
        }
        load_plain(params, &self.ids(), tensors)
    }
}
