use std::collections::BTreeMap;

use super::{
    Adapter, Attached, BaseTensor, Linear, LinearAdapter, LinearSite, Method, Modules, Outline, Plan, Site, SiteKind,
    load_plain, save_plain,
    selection::{Matcher, Selection, Wanted},
    whole::WholeModules,
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// (IA)³ (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section
/// 3.3): activations are multiplied, element by element, with vectors that train.
///
/// ```text
/// y = l ∘ (W·x + b)        l [out], after keys and values
/// y = W·(l ∘ x) + b        l [in], of feed-forward modules, before their second map
/// ```
/// Every l begins at one. Which maps these are is PEFT's `target_modules` and, among them, `feedforward_modules`; in place of
/// what is not named stand PEFT's for the architecture.
#[derive(Clone, Debug)]
pub struct Ia3 {
    /// None: the architecture's.
    feedforward: Option<Matcher>,
    selection: Selection,
    whole: WholeModules,
    default_targets: bool,
}

/// The configuration of [`Ia3`], under PEFT's names but for targets (`target_modules`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ia3Config {
    /// What is adapted.
    pub targets: Modules,
    /// What is not adapted, although a target says so.
    pub exclude_modules: Modules,
    /// Among the targets those whose inputs are multiplied; [`Modules::nothing`] where there are none.
    pub feedforward_modules: Modules,
    /// Modules of the base that train whole.
    pub modules_to_save: Vec<String>,
}

/// PEFT's targets for an architecture: those of which the output is multiplied, and those of which the input is.
const DEFAULTS: [(&str, &[&str], &[&str]); 8] = [
    ("gpt2", &["c_attn"], &["mlp.c_proj"]),
    ("bert", &["key", "value"], &["output.dense"]),
    ("roberta", &["key", "value"], &["output.dense"]),
    ("deberta-v2", &["key_proj", "value_proj"], &["output.dense"]),
    ("llama", &["k_proj", "v_proj"], &["down_proj"]),
    ("mistral", &["k_proj", "v_proj"], &["down_proj"]),
    ("qwen2", &["q_proj", "v_proj"], &["down_proj"]),
    ("qwen3", &["q_proj", "v_proj"], &["down_proj"]),
];

impl Ia3 {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Option`] for what makes no sense on any.
    pub fn new(config: &Ia3Config) -> Result<Ia3> {
        let Ia3Config { targets, exclude_modules, feedforward_modules, modules_to_save } = config;
        let default_targets = targets.is_default();
        let bad =
            |value: String, why: &str| Err(Error::Option { option: "feedforward-modules", value, why: why.into() });
        match feedforward_modules {
            Modules::AllLinear => return bad("all-linear".into(), "are some of the targets; name those"),
            all if default_targets && !all.is_default() => {
                return bad(all.to_string(), "go with targets; name those too");
            }
            _ => {}
        }
        if let (Modules::Names(names), Modules::Names(targets)) = (feedforward_modules, targets)
            && let Some(name) = names.iter().find(|n| !targets.contains(n))
        {
            return bad(name.clone(), "are some of the targets, by the same names");
        }
        let selection = Selection::new(&Wanted {
            targets,
            exclude_modules,
            layers_to_transform: &[],
            layers_pattern: &[],
            modules_to_save,
            others: false,
        })?;
        Ok(Ia3 {
            feedforward: match feedforward_modules.is_default() {
                true => None,
                false => Some(Matcher::new("feedforward-modules", feedforward_modules)?),
            },
            selection,
            whole: WholeModules::new(modules_to_save)?,
            default_targets,
        })
    }

    /// PEFT's targets and feed-forward modules for a base that looks like this.
    pub fn defaults(outline: &Outline) -> Option<[Modules; 2]> {
        let (_, outputs, inputs) = DEFAULTS.iter().find(|(architecture, ..)| *architecture == outline.architecture)?;
        Some([outputs.iter().chain(*inputs).copied().collect(), inputs.iter().copied().collect()])
    }

    /// The selection and the feed-forward modules: what was named, and the architecture's for what was not.
    fn on(&self, outline: &Outline) -> Result<Option<(Selection, Matcher)>> {
        let defaults = Ia3::defaults(outline);
        let selection = match (self.default_targets, &defaults) {
            (false, _) => self.selection.clone(),
            (true, Some([targets, _])) => self.selection.with_targets(targets)?,
            (true, None) => return Ok(None),
        };
        let feedforward = match (&self.feedforward, &defaults) {
            (Some(named), _) => named.clone(),
            (None, Some([_, feedforward])) => Matcher::new("feedforward-modules", feedforward)?,
            (None, None) => return Ok(None),
        };
        Ok(Some((selection, feedforward)))
    }
}

/// PEFT's rule: the end of a module's name, with or without a dot before it, or a whole regular expression.
fn is_feedforward(feedforward: &Matcher, module: &str) -> Result<bool> {
    match feedforward {
        Matcher::Names(names) => Ok(names.iter().any(|name| module.ends_with(name.as_str()))),
        other => other.matches(module),
    }
}

impl Method for Ia3 {
    fn name(&self) -> &'static str {
        "ia3"
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.whole.trains(&tensor.name)
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        let Some((selection, _)) = self.on(outline)? else {
            let why = "PEFT has none for it; name targets, and feedforward-modules among them";
            return Err(Error::Option { option: "targets", value: "none".into(), why: why.into() });
        };
        selection.check(outline)?;
        self.whole.check(outline)?;
        selection.whole_modules(outline).map(drop)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Linear(linear) = &site.kind else { return Ok(None) };
        let Some((selection, feedforward)) = self.on(plan.outline())? else { return Ok(None) };
        if selection.of(site, linear, plan.outline())?.is_empty() {
            return Ok(None);
        }
        let feedforward = is_feedforward(&feedforward, &site.name)?;
        let shape = if feedforward { [1, linear.inputs] } else { [linear.outputs, 1] };
        let l = plan.add(format!("{}.ia3_l", site.name), &shape, Init::Ones);
        let LinearSite { layout, .. } = *linear;
        Ok(Some(Attached::Linear(Box::new(Gains { site: site.name.clone(), l, feedforward, layout }))))
    }
}

#[derive(Debug)]
struct Gains {
    site: String,
    l: ParamId,
    feedforward: bool,
    layout: Layout,
}

impl LinearAdapter for Gains {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        let l = t.param(self.l)?;
        if self.feedforward {
            let x = ops::scale_columns(t, x, &l)?;
            return base.apply(t, &x);
        }
        let y = base.apply(t, x)?;
        ops::scale_columns(t, &y, &l)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        // Rows of a weight [out, in] are outputs, those of one [in, out] inputs.
        let by_rows = self.feedforward == (self.layout == Layout::InOut);
        multiplied(params, self.l, w, by_rows)
    }

    fn merge_bias(&self, params: &Params, b: &Tensor) -> Result<Option<Tensor>> {
        (!self.feedforward).then(|| multiplied(params, self.l, b, false)).transpose()
    }
}

/// The rows, or the columns, of a tensor times what trained.
fn multiplied(params: &Params, l: ParamId, x: &Tensor, by_rows: bool) -> Result<Tensor> {
    let (l, cols, mut values) = (params.tensor(l).to_f64()?, x.cols(), x.to_f64()?);
    for (i, value) in values.iter_mut().enumerate() {
        *value *= l[if by_rows { i / cols } else { i % cols }];
    }
    let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
    Tensor::from_slice(&params.device(), x.shape(), &values)
}

impl Adapter for Gains {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &[self.l]))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &[self.l], tensors)
    }
}
