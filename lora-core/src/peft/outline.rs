use std::{collections::BTreeMap, fmt, ops::Range};

use lora_kernels::DType;

use crate::{Error, Result, Tensor, lowrank::Layout};

/// What a model looks like, without its weights: enough to apply a method to it, to count what trains, or to plan for a
/// model that fits into no memory at hand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outline {
    /// `model_type` of the architecture.
    pub architecture: String,
    /// What the model is for, by PEFT's name: `CAUSAL_LM`, `SEQ_CLS`; none for what PEFT has no name for.
    pub task_type: Option<&'static str>,
    /// Number of layers.
    pub layers: usize,
    /// The longest sequence, virtual tokens included.
    pub max_positions: usize,
    /// All weights, in the order of the model.
    pub tensors: Vec<BaseTensor>,
    /// All places where something can be attached, from the first layer to the last.
    pub sites: Vec<Site>,
    /// The modules that LoRA adapts when none are named: PEFT's default for the architecture.
    pub default_targets: Vec<String>,
    /// Modules that train with every method, and are saved whole beside the adapter (PEFT's `modules_to_save`): the head
    /// of a classifier, which begins at random.
    pub modules_to_save: Vec<String>,
    /// By name some elements of weights that were rounded to f16 when they were loaded, as they were before: those that tell
    /// the base from others, whatever the type of its weights.
    pub before_rounding: BTreeMap<String, Vec<f32>>,
}

/// A weight of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseTensor {
    /// Its Hugging Face name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The layer that it belongs to, from 0; embeddings and heads belong to none.
    pub layer: Option<usize>,
    /// Whether it belongs to a normalisation.
    pub norm: bool,
}

impl BaseTensor {
    /// Whether it is the bias of a linear map or of a normalisation.
    pub fn is_bias(&self) -> bool {
        self.name.ends_with(".bias")
    }
}

impl Outline {
    /// Number of scalars.
    pub fn parameters(&self) -> u128 {
        self.tensors.iter().map(|t| t.shape.iter().map(|&n| n as u128).product::<u128>()).sum()
    }

    /// Whether the tensor belongs to a module that trains with every method.
    pub fn is_saved_module(&self, tensor: &str) -> bool {
        self.modules_to_save.iter().any(|m| tensor.strip_prefix(m.as_str()).is_some_and(|rest| rest.starts_with('.')))
    }

    /// The modules that own weights of this kind, in the order of the model.
    pub(crate) fn modules_of(&self, is: impl Fn(&BaseTensor) -> bool) -> impl Iterator<Item = &str> {
        let tensors = self.tensors.iter().filter(move |t| is(t));
        let modules = tensors.filter_map(|t| Some(t.name.rsplit_once('.')?.0));
        let mut last = "";
        modules.filter(move |module| std::mem::replace(&mut last, module) != *module)
    }

    /// Whether there is such a module, one that owns weights or one made of others.
    pub(crate) fn any_module(&self, mut is: impl FnMut(&str) -> bool) -> bool {
        self.tensors.iter().any(|t| t.name.match_indices('.').any(|(dot, _)| is(&t.name[..dot])))
    }

    /// The embeddings' tensor, where it is the matrix of the output head too.
    pub fn tied_embedding(&self) -> Option<&str> {
        let table = self.sites.iter().find_map(|s| match &s.kind {
            SiteKind::Tokens { table, .. } => Some(table.as_str()),
            _ => None,
        });
        let head = |t: &BaseTensor| t.name == "lm_head.weight";
        table.filter(|_| self.task_type != Some("SEQ_CLS") && !self.tensors.iter().any(head))
    }

    /// The sites of linear maps, with their shapes.
    pub fn linear_sites(&self) -> impl Iterator<Item = (&Site, &LinearSite)> {
        self.sites.iter().filter_map(|s| match &s.kind {
            SiteKind::Linear(linear) => Some((s, linear)),
            _ => None,
        })
    }

    /// The site of the output head, where it is a linear map of its own.
    pub fn head_site(&self) -> Option<(&Site, &LinearSite)> {
        self.sites.iter().find_map(|s| match &s.kind {
            SiteKind::Head(linear) => Some((s, linear)),
            _ => None,
        })
    }

    /// The sites of embeddings, with rows and columns of their tables.
    pub fn embedding_sites(&self) -> impl Iterator<Item = (&Site, [usize; 2])> {
        self.sites.iter().filter_map(|s| match s.kind {
            SiteKind::Embedding { rows, width } => Some((s, [rows, width])),
            _ => None,
        })
    }

    /// That the model has a site that `is` describes, for a method that needs `what`.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`].
    pub(crate) fn needs(&self, method: &str, what: &str, is: impl Fn(&SiteKind) -> bool) -> Result<()> {
        match self.sites.iter().any(|s| is(&s.kind)) {
            true => Ok(()),
            false => Err(Error::DoesNotFit {
                method: method.into(),
                architecture: self.architecture.clone(),
                why: format!("it has no {what}"),
            }),
        }
    }
}

/// A place in a model where something can be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Hugging Face's name of the module, such as `transformer.h.0.attn.c_attn`.
    pub name: String,
    /// The layer, from 0; `None` for a place of the whole model.
    pub layer: Option<usize>,
    /// What stands there.
    pub kind: SiteKind,
}

/// What stands at a [`Site`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SiteKind {
    /// A linear map, with the weight `{name}.weight`.
    Linear(LinearSite),
    /// The output of a sublayer, where it joins the residual stream of this width.
    Sublayer {
        /// Which sublayer.
        part: Part,
        /// Columns of the stream.
        width: usize,
    },
    /// The embeddings of the tokens, before positions are added.
    Tokens {
        /// The tensor of the embeddings [vocabulary, width].
        table: String,
        /// Columns.
        width: usize,
    },
    /// A table [rows, width] that a number of each token picks a row of, with the weight `{name}.weight`.
    Embedding {
        /// Rows.
        rows: usize,
        /// Columns.
        width: usize,
    },
    /// The output head of a language model, a linear map with a weight `{name}.weight` of its own.
    Head(LinearSite),
    /// The keys and values of all layers.
    KeysValues {
        /// Layers.
        layers: usize,
        /// Columns of the keys, and of the values, of a layer: heads of keys times their size.
        cols: usize,
    },
}

/// The shape of a linear map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSite {
    /// Inputs.
    pub inputs: usize,
    /// Outputs.
    pub outputs: usize,
    /// How the weight is stored.
    pub layout: Layout,
    /// The parts of a fused projection and their output columns: `q`, `k`, `v`.
    pub parts: Vec<(&'static str, Range<usize>)>,
}

/// A sublayer of a transformer's layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Attention with its output projection.
    Attention,
    /// The feed-forward network.
    Mlp,
}

/// What a model shows to a method.
pub trait Base {
    /// Names, shapes and sites.
    fn outline(&self) -> &Outline;
    /// All weights, under their Hugging Face names.
    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_>;
    /// The type of activations: that of the weights, but f32 beside bf16 weights on the CPU
    /// ([`Device::activations`](lora_kernels::Device::activations)).
    fn dtype(&self) -> DType {
        self.tensors().next().map_or(DType::F32, |(_, t)| t.device().activations(t.dtype()))
    }
    /// A weight by its name.
    fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors().find(|(n, _)| *n == name).map(|(_, t)| t)
    }
}

/// Some of a model's layers, counted from 0: `all`, `none`, `first:N`, `last:N`, or numbers and ranges such as `0,2,4-7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layers {
    /// The lowest N.
    First(usize),
    /// The highest N.
    Last(usize),
    /// Those of these numbers, ascending.
    Of(Vec<usize>),
    /// Every one.
    All,
}

impl Layers {
    /// None at all.
    pub const NONE: Layers = Layers::First(0);

    /// Reads the notation above.
    ///
    /// # Errors
    /// [`Error::Option`] under the name `option`.
    pub fn parse(option: &'static str, text: &str) -> Result<Layers> {
        let bad = || Error::Option {
            option,
            value: text.into(),
            why: "layers are all, none, first:N, last:N, or numbers from 0 such as 0,2,4-7".into(),
        };
        let number = |s: &str| s.trim().parse::<usize>().map_err(|_| bad());
        match text.trim() {
            "all" => return Ok(Layers::All),
            "none" => return Ok(Layers::NONE),
            t => match t.split_once(':') {
                Some(("first", n)) => return Ok(Layers::First(number(n)?)),
                Some(("last", n)) => return Ok(Layers::Last(number(n)?)),
                Some(_) => return Err(bad()),
                None => {}
            },
        }
        let mut of = Vec::new();
        for part in text.split(',') {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (number(from)?, number(to)?);
            const MOST: usize = 1 << 16;
            if from > to || to > MOST {
                return Err(bad());
            }
            of.extend(from..=to);
        }
        of.sort_unstable();
        of.dedup();
        Ok(Layers::Of(of))
    }

    /// The numbers of the layers, of a model that has `layers`.
    ///
    /// # Errors
    /// [`Error::Option`] under the name `option` for a layer that the model does not have.
    pub fn of(&self, option: &'static str, layers: usize) -> Result<Vec<usize>> {
        let most = match self {
            Layers::All => 0,
            Layers::First(n) | Layers::Last(n) => *n,
            Layers::Of(all) => all.last().map_or(0, |n| n + 1),
        };
        if most > layers {
            let why = format!("the model has {layers} layers, numbered from 0");
            return Err(Error::Option { option, value: self.to_string(), why });
        }
        Ok(match self {
            Layers::All => (0..layers).collect(),
            Layers::First(n) => (0..*n).collect(),
            Layers::Last(n) => (layers - n..layers).collect(),
            Layers::Of(all) => all.clone(),
        })
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layers::All => write!(f, "all"),
            Layers::First(0) => write!(f, "none"),
            Layers::First(n) => write!(f, "first:{n}"),
            Layers::Last(n) => write!(f, "last:{n}"),
            Layers::Of(all) => write!(f, "{}", all.iter().map(usize::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_as_they_are_written() {
        for (text, of_six) in [
            ("all", Some(vec![0, 1, 2, 3, 4, 5])),
            ("none", Some(vec![])),
            ("first:2", Some(vec![0, 1])),
            ("last:2", Some(vec![4, 5])),
            ("last:6", Some(vec![0, 1, 2, 3, 4, 5])),
            ("3, 0,0", Some(vec![0, 3])),
            ("4-5,1", Some(vec![1, 4, 5])),
            ("last:7", None),
            ("first:7", None),
            ("2-6", None),
        ] {
            let layers = Layers::parse("layers", text).unwrap();
            assert_eq!(layers.of("layers", 6).ok(), of_six, "{text}");
            assert_eq!(Layers::parse("layers", &layers.to_string()).unwrap(), layers, "{text}");
        }
        for text in ["", "last", "last:", "last:-1", "top:2", "5-3", "1,,2", "a", "1.5", "0-99999999999"] {
            assert!(matches!(Layers::parse("layers", text), Err(Error::Option { option: "layers", .. })), "{text}");
        }
    }
}
