//! The adaptation methods: one file each, and a row each in [`METHODS`].
//!
//! A [`Method`] says which tensors of a base train and what is attached at its [`Site`]s; applied to a base it gives an
//! [`Adapted`], which a model's forward asks for every weight ([`Adapted::weight`]), for every projection
//! ([`Adapted::project`]), for embeddings ([`Adapted::embed`]) and the output head ([`Adapted::beside_head`]), wherever a
//! sublayer joins the stream ([`Adapted::join`]), and for virtual tokens.

mod adalora;
mod adapted;
mod adapter_drop;
mod added;
mod bitfit;
mod bottleneck;
mod combined;
mod full;
mod fusion;
mod houlsby;
mod ia3;
mod lin;
mod ln_tuning;
mod lokr;
mod lora;
mod mixed;
mod modules;
mod options;
mod outline;
mod pfeiffer;
mod pre_embed;
mod pre_layer;
mod regex;
mod selection;
mod table;
mod top;
mod torch_generator;
mod vera;
mod whole;

use std::{collections::BTreeMap, fmt::Debug};

use ndarray::Array2;
use rand_distr::{Distribution, StandardNormal};

pub use adalora::{AdaLora, AdaLoraConfig, AdaLoraSchedule, Budget};
pub use adapted::{Adapted, parameters, trainable, untied_head};
pub use adapter_drop::AdapterDrop;
use added::added;
pub use bitfit::BitFit;
pub use bottleneck::{Bottlenecks, non_linearity};
pub use combined::Combined;
pub use full::Full;
pub use fusion::Fusion;
pub use houlsby::Houlsby;
pub use ia3::{Ia3, Ia3Config};
pub use lin::Lin;
pub use ln_tuning::LnTuning;
pub use lokr::{LoKr, LoKrConfig};
pub use lora::{Bias, InitLoraWeights, Lora, LoraConfig};
pub use mixed::HeadRows;
pub use modules::{Modules, Pattern, names, saves};
pub use options::{Frozen, Options};
pub use outline::{Base, BaseTensor, Layers, LinearSite, Outline, Part, Site, SiteKind};
pub use pfeiffer::Pfeiffer;
pub use pre_embed::PreEmbed;
pub use pre_layer::PreLayer;
pub use table::{METHODS, MethodRow, find};
pub use top::Top;
pub use vera::{Vera, VeraConfig};

use lora_kernels::{Mat, MatMut};

use crate::{Error, Init, ParamId, Params, ParamsBuilder, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// One way to adapt a model.
pub trait Method: Debug + Send + Sync {
    /// The name in [`METHODS`].
    fn name(&self) -> &'static str;

    /// Whether the base's tensor itself trains.
    fn trains(&self, _tensor: &BaseTensor, _outline: &Outline) -> bool {
        false
    }

    /// Refuses options that do not fit this base, before anything is attached.
    fn check(&self, _outline: &Outline) -> Result<()> {
        Ok(())
    }

    /// What is attached at a site, if anything; its parameters go to `plan`.
    fn attach(&self, _site: &Site, _plan: &mut Plan) -> Result<Option<Attached>> {
        Ok(None)
    }

    /// What goes on beside training: a penalty on the loss, and ranks that are taken away.
    fn budget(&self, _outline: &Outline) -> Result<Option<Budget>> {
        Ok(None)
    }

    /// What an adapted model computes before its first step.
    fn start(&self) -> Start {
        Start::Base
    }
}

/// What an adapted model computes before its first step of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// What the base computes, bit for bit.
    Base,
    /// Nearly that: the method begins with small random numbers, as its paper says.
    NearBase,
    /// Something else: virtual tokens that attention sees at once, an update that begins at random.
    Elsewhere,
}

/// Collects what a method trains on one base.
pub struct Plan<'a> {
    params: ParamsBuilder,
    outline: &'a Outline,
    base: Option<&'a dyn Base>,
    shared: BTreeMap<String, Vec<Tensor>>,
    seed: u64,
}

impl<'a> Plan<'a> {
    /// A parameter of this name; see [`ParamsBuilder::add`].
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> ParamId {
        self.params.add(name, shape, init)
    }

    /// What the base looks like.
    pub fn outline(&self) -> &'a Outline {
        self.outline
    }

    /// A weight of the base; `None` where there are no weights, and only what trains is counted.
    pub fn base_tensor(&self, name: &str) -> Option<&'a Tensor> {
        self.base?.tensor(name)
    }

    /// Tensors that several sites use and none trains, made when they are asked for first.
    fn shared<const N: usize>(
        &mut self,
        name: &str,
        make: impl FnOnce() -> Result<[Tensor; N]>,
    ) -> Result<Vec<Tensor>> {
        if let Some(made) = self.shared.get(name) {
            return Ok(made.clone());
        }
        let made: Vec<Tensor> = make()?.into();
        self.shared.insert(name.into(), made.clone());
        Ok(made)
    }

    /// Standard normal numbers [rows, cols], drawn from the stream of this name: for parameters that begin at something
    /// computed from several draws.
    fn normal(&self, stream: &str, rows: usize, cols: usize) -> Array2<f64> {
        let values = StandardNormal.sample_iter(crate::params::stream(self.seed, stream)).take(rows * cols).collect();
        Array2::from_shape_vec((rows, cols), values).expect("as many as the shape has")
    }
}

/// What a method attaches at one site, by the kind of the site.
#[derive(Debug)]
pub enum Attached {
    /// Beside a linear map.
    Linear(Box<dyn LinearAdapter>),
    /// Beside a table of embeddings.
    Embedding(Box<dyn EmbeddingAdapter>),
    /// Beside the output head.
    Head(Box<dyn HeadAdapter>),
    /// Where a sublayer joins the stream.
    Sublayer(Box<dyn SublayerAdapter>),
    /// Among the tokens.
    Tokens(Box<dyn TokensAdapter>),
    /// Among the keys and values.
    KeysValues(Box<dyn KeysValuesAdapter>),
}

impl Attached {
    fn adapter(&self) -> &dyn Adapter {
        match self {
            Attached::Linear(a) => a.as_ref(),
            Attached::Embedding(a) => a.as_ref(),
            Attached::Head(a) => a.as_ref(),
            Attached::Sublayer(a) => a.as_ref(),
            Attached::Tokens(a) => a.as_ref(),
            Attached::KeysValues(a) => a.as_ref(),
        }
    }
}

/// What every attachment can do: be saved, and be loaded again.
pub trait Adapter: Debug + Send + Sync {
    /// The tensors to save, by their names below the site (`lora_A.weight`).
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>>;

    /// Takes the saved tensors over into `params`, the opposite of [`Adapter::save`]: removes from `tensors` what it
    /// uses. `site` stands before their names.
    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()>;
}

/// What is attached to a linear map.
pub trait LinearAdapter: Adapter {
    /// The adapted output for the site's input x. The adapter evaluates the base's linear map, or an operation does both.
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var>;

    /// Adds to y, without a tape, what the adapter adds to the base's output for the input x: for rows of a batch whose other
    /// rows have other adapters. `false`, with y as it was, where the adapter is no such sum: then [`LinearAdapter::apply`]
    /// computes the rows.
    fn add(&self, _params: &Params, _x: Mat, _y: MatMut) -> Result<bool> {
        Ok(false)
    }

    /// Sets what of the fresh parameters follows from others that were drawn, and from the base's weight w.
    fn begin(&self, _params: &mut Params, _w: &Tensor) -> Result<()> {
        Ok(())
    }

    /// The weight that gives the adapted output without an adapter. `w` is not written.
    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor>;

    /// The bias that does, where it is another than the base's.
    fn merge_bias(&self, _params: &Params, _b: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// What is attached to a table of embeddings.
pub trait EmbeddingAdapter: Adapter {
    /// The adapted rows of the table [rows, width] that `ids` name.
    fn apply(&self, t: &mut Tape, table: &Var, ids: &Tensor) -> Result<Var>;

    /// The table that gives the adapted rows without an adapter. `table` is not written.
    fn merge(&self, params: &Params, table: &Tensor) -> Result<Tensor>;
}

/// What is attached to the output head, whose logits exist only a chunk at a time.
pub trait HeadAdapter: Adapter {
    /// What adds to the logits of x.
    fn beside(&self, t: &mut Tape, x: &Var) -> Result<Vec<ops::BesideHead>>;

    /// The matrix that gives the adapted logits without an adapter. `w` is not written.
    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor>;
}

/// The normalisation that follows where a sublayer joins the stream, in architectures that have it there.
pub type Norm<'a> = Option<&'a dyn Fn(&mut Tape, &Var) -> Result<Var>>;

/// What is attached where a sublayer joins the stream.
pub trait SublayerAdapter: Adapter {
    /// The stream after the sublayer. Without an adapter it is norm(x + f) with the stream x before it and the sublayer's
    /// output f (see [`join`]).
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var>;
}

/// norm(x + f), or x + f where no norm follows: the stream after a sublayer.
pub fn join(t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
    let y = ops::add(t, x, f)?;
    match norm {
        Some(norm) => norm(t, &y),
        None => Ok(y),
    }
}

/// How many virtual tokens a method adds to every sequence, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtualTokens {
    /// Before the first token.
    pub prefix: usize,
    /// After the prompt: before the first token that is to be predicted, or at the end where there is none.
    pub infix: usize,
    /// Whether the text has the positions that it would have without them (AdapterHub), rather than those after them (PEFT).
    /// Only where attention alone sees them: among the tokens each has a position.
    pub uncounted: bool,
    /// Whether the first of the prefix is what a text is classified by (PEFT), rather than the text's own first token. Only
    /// among the tokens: in attention there is no row to look at.
    pub classify: bool,
}

impl VirtualTokens {
    /// All of them.
    pub fn count(&self) -> usize {
        self.prefix + self.infix
    }

    /// How many positions they take from the text.
    pub fn positions(&self) -> usize {
        if self.uncounted { 0 } else { self.count() }
    }
}

/// Virtual tokens among the tokens.
pub trait TokensAdapter: Adapter {
    /// How many.
    fn virtual_tokens(&self) -> VirtualTokens;

    /// Their embeddings [prefix + infix, width].
    fn embeddings(&self, t: &mut Tape) -> Result<Var>;
}

/// Virtual tokens that only attention sees.
pub trait KeysValuesAdapter: Adapter {
    /// How many.
    fn virtual_tokens(&self) -> VirtualTokens;

    /// Their keys and values [prefix + infix, layers · 2 · cols]: for each layer its keys, then its values.
    fn keys_values(&self, t: &mut Tape) -> Result<Var>;
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

/// Saves parameters as they are, by their names after `{site}.`.
fn save_plain(params: &Params, site: &str, ids: &[ParamId]) -> Vec<(String, Tensor)> {
    let own = |id: &ParamId| {
        let name = params.name(*id).strip_prefix(site).and_then(|n| n.strip_prefix('.'));
        (name.expect("a parameter of the site").to_owned(), params.tensor(*id))
    };
    ids.iter().map(own).collect()
}

/// Takes saved parameters over as they are, by their own names.
fn load_plain(params: &mut Params, ids: &[ParamId], tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
    for &id in ids {
        let value = take(tensors, params.name(id), params.shape(id))?;
        params.set(id, &value)?;
    }
    Ok(())
}

/// Removes the tensor of that name, which has to have that shape.
fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let t = tensors.remove(name).ok_or_else(|| Error::Missing { name: name.into() })?;
    match t.shape() == shape {
        true => Ok(t),
        false => Err(Error::Shape { name: name.into(), found: t.shape().into(), expected: shape.into() }),
    }
}
