//! The adaptation methods: one file each, and a row each in [`METHODS`].
//!
//! A [`Method`] says which tensors of a base train and what is attached at its [`Site`]s; applied to a base it gives an
//! [`Adapted`], which a model's forward asks for every weight ([`Adapted::weight`]) and for every projection
//! ([`Adapted::project`]).

mod adapted;
mod full;
mod lora;

use std::{collections::BTreeMap, fmt::Debug, ops::Range};

pub use adapted::Adapted;
pub use full::Full;
pub use lora::{Lora, LoraConfig, names};

use lora_kernels::DType;

use crate::{Params, ParamsBuilder, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// A place in a model where something can be attached: a linear map, by the name of its module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Hugging Face's name of the module, such as `transformer.h.0.attn.c_attn`; its weight is `{name}.weight`.
    pub name: String,
    /// Inputs.
    pub inputs: usize,
    /// Outputs.
    pub outputs: usize,
    /// How the weight is stored.
    pub layout: Layout,
    /// The parts of a fused projection and their output columns: `q`, `k`, `v`.
    pub parts: Vec<(&'static str, Range<usize>)>,
}

/// What a model shows to a method.
pub trait Base {
    /// All weights, under their Hugging Face names.
    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_>;
    /// The type of the weights, which is also that of activations.
    fn dtype(&self) -> DType {
        self.tensors().next().map_or(DType::F32, |(_, t)| t.dtype())
    }
    /// All places where something can be attached, from the first layer to the last.
    fn sites(&self) -> &[Site];
}

/// One way to adapt a model.
pub trait Method: Debug + Send + Sync {
    /// The name in [`METHODS`].
    fn name(&self) -> &'static str;

    /// Whether the base's tensor itself trains.
    fn trains(&self, _tensor: &str) -> bool {
        false
    }

    /// Refuses options that do not fit this base, before anything is attached.
    fn check(&self, _base: &dyn Base) -> Result<()> {
        Ok(())
    }

    /// What is attached at a site, if anything; its parameters go to `params`.
    fn attach(&self, _site: &Site, _params: &mut ParamsBuilder) -> Result<Option<Box<dyn Adapter>>> {
        Ok(None)
    }
}

/// The linear map of a site on a tape: y = x·Wᵀ + b.
#[derive(Debug)]
pub struct Linear {
    /// W.
    pub w: Var,
    /// How W is stored.
    pub layout: Layout,
    /// b.
    pub bias: Option<Var>,
}

impl Linear {
    /// y, without any adapter.
    pub fn apply(&self, t: &mut Tape, x: &Var) -> Result<Var> {
        ops::linear(t, x, &self.w, self.layout, self.bias.as_ref())
    }
}

/// What is attached at one site.
pub trait Adapter: Debug + Send + Sync {
    /// The adapted output for the site's input x. The adapter evaluates the base's linear map, or an operation does both.
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var>;

    /// The weight that gives the adapted output without an adapter; `None` for what cannot be merged. `w` is not written.
    fn merge(&self, params: &Params, w: &Tensor) -> Result<Option<Tensor>>;

    /// The tensors to save, by their PEFT names below the site (`lora_A.weight`).
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>>;

    /// Takes the saved tensors over into `params`, the opposite of [`Adapter::save`]: removes from `tensors` what it
    /// uses. `site` is for messages.
    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()>;
}

/// Options from which the methods of the table are made; each reads those that concern it.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Rank r of low-rank updates.
    pub rank: usize,
    /// α: the update is scaled by α/r (or α/√r).
    pub alpha: f64,
    /// Dropout on the adapter's input.
    pub dropout: f64,
    /// Scale by α/√r (rank-stabilised LoRA, Kalajdzievski 2023).
    pub rslora: bool,
    /// Module names, as PEFT's `target_modules`, or parts of a fused projection (`c_attn.q`).
    pub targets: Vec<String>,
}

/// One row of the table of methods.
pub struct MethodRow {
    /// The name on the command line.
    pub name: &'static str,
    /// What it trains, in a line.
    pub about: &'static str,
    /// Makes the method; refuses options that make no sense on any model.
    pub build: fn(&Options) -> Result<Box<dyn Method>>,
}

/// All methods. The command line, the tests and the comparison tables iterate over this.
pub const METHODS: &[MethodRow] = &[
    MethodRow {
        name: "lora",
        about: "a low-rank update s·B·A beside frozen projections (Hu et al. 2021)",
        build: |o| Ok(Box::new(Lora::new(LoraConfig::from(o))?)),
    },
    MethodRow { name: "full", about: "every weight of the base", build: |_| Ok(Box::new(Full)) },
];

/// The row with that name.
pub fn find(name: &str) -> Result<&'static MethodRow> {
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| crate::Error::Option {
        option: "method",
        value: name.into(),
        why: format!("known methods are {}", METHODS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")),
    })
}
