use super::{super::Modules, InitLoraWeights};
use crate::{Error, Result};

/// The configuration of [`Lora`](super::Lora), under PEFT's names but for rank (`r`), alpha (`lora_alpha`), dropout
/// (`lora_dropout`), rslora (`use_rslora`) and targets (`target_modules`).
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
    /// What to adapt; without any names the architecture's default, as in PEFT.
    pub targets: Modules,
    /// What not to adapt, although a target says so.
    pub exclude_modules: Modules,
    /// The layers that targets (a list of names) are looked for in, from 0; none: all of them.
    pub layers_to_transform: Vec<usize>,
    /// The names, or regular expressions, that stand before the number of a layer, such as `h`; none: any.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `rank`, by [`Pattern`](super::super::Pattern).
    pub rank_pattern: Vec<(String, usize)>,
    /// α's of modules that differ from `alpha`, by [`Pattern`](super::super::Pattern).
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules of the base that train whole and are saved beside the adapter, by the ends of their names.
    pub modules_to_save: Vec<String>,
    /// Which biases of the base train.
    pub bias: Bias,
    /// DoRA: the lengths of the adapted weights train apart from their directions.
    pub use_dora: bool,
    /// How A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// Whether the adapted weights are stored [in, out], as GPT-2's are. The base knows; what is said has to agree.
    pub fan_in_fan_out: Option<bool>,
}

/// Which biases of the base train beside LoRA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every one, those of normalisations included.
    All,
    /// Those of the modules that are adapted.
    LoraOnly,
}

impl Bias {
    /// All, with PEFT's words for them.
    pub const ALL: [(&'static str, Bias); 3] =
        [("none", Bias::None), ("all", Bias::All), ("lora_only", Bias::LoraOnly)];

    /// Reads PEFT's word.
    ///
    /// # Errors
    /// [`Error::Option`] for another.
    pub fn parse(text: &str) -> Result<Bias> {
        match Bias::ALL.iter().find(|(word, _)| *word == text) {
            Some((_, bias)) => Ok(*bias),
            None => {
                let why = "the biases that train are none, all, or lora_only".into();
                Err(Error::Option { option: "bias", value: text.into(), why })
            }
        }
    }

    /// PEFT's word.
    pub fn word(self) -> &'static str {
        Bias::ALL.iter().find(|(_, bias)| *bias == self).expect("all are there").0
    }
}

impl Default for LoraConfig {
    /// Rank 8, α 16, the architecture's targets.
    fn default() -> LoraConfig {
        LoraConfig {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            rslora: false,
            targets: Modules::default(),
            exclude_modules: Modules::default(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            bias: Bias::None,
            use_dora: false,
            init_lora_weights: InitLoraWeights::default(),
            fan_in_fan_out: None,
        }
    }
}

/// More is no adapter.
const LARGEST_RANK: usize = 1 << 20;
/// The same where a matrix [rank, rank] is made.
pub(in super::super) const LARGEST_SQUARE: usize = 1 << 13;

impl LoraConfig {
    /// The configuration of what is saved: where an adapter began at a part of the base, that part is saved beside it, so
    /// that every rank is twice what trained, and every α twice (√2 times with rsLoRA) what it was, which keeps the scale.
    pub fn saved(&self) -> LoraConfig {
        if !self.init_lora_weights.takes_from_base() {
            return self.clone();
        }
        let alpha = |a: f64| a * if self.rslora { 2f64.sqrt() } else { 2.0 };
        LoraConfig {
            rank: 2 * self.rank,
            alpha: alpha(self.alpha),
            rank_pattern: self.rank_pattern.iter().map(|(key, r)| (key.clone(), 2 * r)).collect(),
            alpha_pattern: self.alpha_pattern.iter().map(|(key, a)| (key.clone(), alpha(*a))).collect(),
            init_lora_weights: InitLoraWeights::default(),
            ..self.clone()
        }
    }

    /// Refuses numbers that make no sense on any model.
    pub(super) fn check(&self) -> Result<()> {
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        let rank = |r: usize| (r == 0 || r > LARGEST_RANK).then_some("a rank is from 1 to 1048576");
        let alpha = |a: f64| {
            (!a.is_finite() || a <= 0.0).then_some("alpha is a positive number; the update is scaled by alpha/rank")
        };
        if let Some(why) = rank(self.rank) {
            return bad("rank", self.rank.to_string(), why);
        }
        if self.init_lora_weights == InitLoraWeights::Orthogonal && self.rank > LARGEST_SQUARE {
            let why =
                format!("adapters that begin orthogonal are made from a matrix [rank, rank]: at most {LARGEST_SQUARE}");
            return bad("rank", self.rank.to_string(), &why);
        }
        if let Some(why) = alpha(self.alpha) {
            return bad("alpha", self.alpha.to_string(), why);
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return bad("dropout", self.dropout.to_string(), "a dropout rate is in [0, 1)");
        }
        for (key, r) in &self.rank_pattern {
            if let Some(why) = rank(*r) {
                return bad("rank-pattern", format!("{key}={r}"), why);
            }
        }
        for (key, a) in &self.alpha_pattern {
            if let Some(why) = alpha(*a) {
                return bad("alpha-pattern", format!("{key}={a}"), why);
            }
        }
        Ok(())
    }
}
