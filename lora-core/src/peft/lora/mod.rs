//! LoRA: its configuration, what it adapts, and the update of one site.

mod config;
mod dora;
mod embedding;
mod init;
mod update;

use super::{
    Attached, BaseTensor, LinearSite, Method, Outline, Pattern, Plan, Site, SiteKind, Start,
    selection::{Match, Selection, Wanted},
    whole::WholeModules,
};
use crate::{
    Error, Result,
    lowrank::{Layout, Scaling},
};

pub(super) use config::LARGEST_SQUARE;
pub use config::{Bias, LoraConfig};
use dora::Dora;
use embedding::EmbeddingUpdate;
pub use init::InitLoraWeights;
use update::{Term, Update};

/// LoRA (Hu et al. 2021, section 4.1): h = W₀x + s·B·A·x with W₀ frozen, A [r, in] Kaiming-uniform, B [out, r] zero, and
/// s = α/r (or α/√r).
///
/// A target is a module by PEFT's rules, or one part of a fused projection (`c_attn.q`). Parts of one module train as
/// updates of their own columns, and are saved as the equivalent block-structured adapter of the whole module: n parts of
/// rank r become A [n·r, in], B [out, n·r] with B zero outside of the blocks.
#[derive(Clone, Debug)]
pub struct Lora {
    config: LoraConfig,
    selection: Selection,
    ranks: Pattern<usize>,
    alphas: Pattern<f64>,
    whole: WholeModules,
}

impl Lora {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Option`] for an option that makes no sense.
    pub fn new(config: LoraConfig) -> Result<Lora> {
        config.check()?;
        let selection = Selection::new(&Wanted {
            targets: &config.targets,
            exclude_modules: &config.exclude_modules,
            layers_to_transform: &config.layers_to_transform,
            layers_pattern: &config.layers_pattern,
            modules_to_save: &config.modules_to_save,
            others: true,
        })?;
        let ranks = Pattern::new("rank-pattern", &config.rank_pattern)?;
        let alphas = Pattern::new("alpha-pattern", &config.alpha_pattern)?;
        let whole = WholeModules::new(&config.modules_to_save)?;
        Ok(Lora { config, selection, ranks, alphas, whole })
    }

    /// The configuration.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Rank and α of the update of a module, or of each of its parts.
    ///
    /// # Errors
    /// [`Error::Option`] for a regular expression that takes too long.
    pub fn rank_and_alpha(&self, module: &str) -> Result<(usize, f64)> {
        let rank = self.ranks.of(module)?.unwrap_or(self.config.rank);
        Ok((rank, self.alphas.of(module)?.unwrap_or(self.config.alpha)))
    }

    fn scaling(&self) -> Scaling {
        if self.config.rslora { Scaling::RsLora } else { Scaling::Lora }
    }

    /// Refuses keys of a pattern that would change nothing.
    fn check_patterns(&self, outline: &Outline) -> Result<()> {
        let sites = self.selection.adapted(outline)?;
        let modules: Vec<&str> = sites.iter().map(|s| s.name.as_str()).collect();
        self.ranks.check_used("rank-pattern", &modules)?;
        self.alphas.check_used("alpha-pattern", &modules)
    }

    /// Refuses a `fan_in_fan_out` that is not how the adapted weights are stored.
    fn check_fan_in_fan_out(&self, outline: &Outline) -> Result<()> {
        let Some(given) = self.config.fan_in_fan_out else { return Ok(()) };
        let adapted = self.selection.adapted(outline)?;
        let wrong = adapted.iter().find_map(|site| match &site.kind {
            SiteKind::Linear(linear) if (linear.layout == Layout::InOut) != given => Some((site, linear.layout)),
            _ => None,
        });
        let Some((site, layout)) = wrong else { return Ok(()) };
        let (stored, is) = if layout == Layout::InOut { ("[in, out]", true) } else { ("[out, in]", false) };
        let why = format!(
            "{} of the architecture {} is stored {stored}, so it is {is}; leave the option out",
            site.name, outline.architecture
        );
        Err(Error::Option { option: "fan-in-fan-out", value: given.to_string(), why })
    }

    fn is_bias_of_target(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        let Some(module) = tensor.name.strip_suffix(".bias") else { return false };
        let adapted = |(site, linear): (&Site, &LinearSite)| {
            site.name == module && self.selection.of(site, linear, outline).is_ok_and(|hits| !hits.is_empty())
        };
        outline.linear_sites().any(adapted)
    }

    fn embedding(&self, site: &Site, shape: [usize; 2], plan: &mut Plan) -> Result<Option<EmbeddingUpdate>> {
        if !self.selection.takes_other(site, plan.outline())? {
            return Ok(None);
        }
        if self.config.use_dora {
            let why = format!("adapts linear maps, and the targets name {} too, which is an embedding", site.name);
            return Err(Error::Option { option: "use-dora", value: "true".into(), why });
        }
        let (rank, alpha) = self.rank_and_alpha(&site.name)?;
        let init = self.config.init_lora_weights;
        let saved = if init.takes_from_base() { 2 * rank } else { rank };
        let ranks = (rank, saved, self.scaling().scale(alpha, rank)?);
        Ok(Some(EmbeddingUpdate::new(site, shape, ranks, init != InitLoraWeights::Random, plan)))
    }

    fn head(&self, site: &Site, linear: &LinearSite, plan: &mut Plan) -> Result<Option<Update>> {
        if !self.selection.takes_other(site, plan.outline())? {
            return Ok(None);
        }
        if self.config.use_dora {
            let why =
                format!("does not go with {}, the output head, whose logits are never there as a whole", site.name);
            return Err(Error::Option { option: "use-dora", value: "true".into(), why });
        }
        self.update(site, linear, plan)
    }

    fn update(&self, site: &Site, linear: &LinearSite, plan: &mut Plan) -> Result<Option<Update>> {
        let hits = self.selection.of(site, linear, plan.outline())?;
        let (r, alpha) = self.rank_and_alpha(&site.name)?;
        let place = |hit: &Match| match hit {
            Match::Whole => (site.name.clone(), 0..linear.outputs),
            Match::Part(i) => (format!("{}.{}", site.name, linear.parts[*i].0), linear.parts[*i].1.clone()),
        };
        if self.config.use_dora && hits.iter().any(|hit| *hit != Match::Whole) {
            let why = format!("adapts whole modules, and of {} the targets name parts", site.name);
            return Err(Error::Option { option: "use-dora", value: "true".into(), why });
        }
        let places: Vec<_> = hits.iter().map(place).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let (scale, dropout) = (self.scaling().scale(alpha, r)?, self.config.dropout);
        let (layout, outputs) = (linear.layout, linear.outputs);
        // All A's one below the other, so that one product with x serves them all.
        let mut begun = Vec::new();
        for (prefix, cols) in places {
            let init = self.config.init_lora_weights;
            let begin = init.begin((site, linear), (&prefix, cols.clone()), (r, scale), plan)?;
            let a = plan.add(format!("{prefix}.lora_A.weight"), &[r, linear.inputs], begin.a);
            begun.push((prefix, cols, a, begin.b, begin.origin));
        }
        let mut terms = Vec::new();
        for (prefix, cols, a, b, origin) in begun {
            let b = plan.add(format!("{prefix}.lora_B.weight"), &[cols.len(), r], b);
            terms.push(Term { a, b, cols, origin });
        }
        let drawn = self.config.init_lora_weights == InitLoraWeights::Random;
        let dora = self.config.use_dora.then(|| Dora::new(site, linear, drawn, plan)).transpose()?;
        Ok(Some(Update { terms, scale, dropout, layout, outputs, rank: r, dora }))
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn trains(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        let bias = || match self.config.bias {
            Bias::None => false,
            Bias::All => tensor.is_bias(),
            Bias::LoraOnly => self.is_bias_of_target(tensor, outline),
        };
        self.whole.trains(&tensor.name) || bias()
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.selection.check(outline)?;
        self.check_patterns(outline)?;
        self.check_fan_in_fan_out(outline)?;
        self.whole.check(outline)
    }

    fn start(&self) -> Start {
        match self.config.init_lora_weights {
            InitLoraWeights::Random => Start::Elsewhere,
            // Lengths are divided by themselves, which rounds.
            InitLoraWeights::Kaiming | InitLoraWeights::Gaussian if !self.config.use_dora => Start::Base,
            // So do sums of what is added and taken away again.
            _ => Start::NearBase,
        }
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        Ok(match &site.kind {
            SiteKind::Linear(linear) => self.update(site, linear, plan)?.map(|u| Attached::Linear(Box::new(u))),
            SiteKind::Head(linear) => self.head(site, linear, plan)?.map(|u| Attached::Head(Box::new(u))),
            SiteKind::Embedding { rows, width } => {
                self.embedding(site, [*rows, *width], plan)?.map(|u| Attached::Embedding(Box::new(u)))
            }
            _ => None,
        })
    }
}
