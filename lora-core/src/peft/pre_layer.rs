use std::collections::BTreeMap;

use lora_kernels::Activation;

use super::{
    Adapter, Attached, KeysValuesAdapter, Method, Outline, Plan, Site, SiteKind, Start, VirtualTokens, load_plain,
    pre_embed::{check_positions, checked},
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// Prefix-layer tuning (PreLayer of the LoRA paper, section 5.1): virtual tokens of which the keys and values of every
/// layer train, as Li and Liang 2021 (prefix tuning, section 4) and PEFT have it.
///
/// With l virtual tokens and L layers these are 2·L·d·l scalars (d: columns of the keys). The LoRA paper counts the
/// activations after every layer instead, L·d·l, of which keys and values would be projections.
///
/// Li and Liang's reparametrisation (section 4.3) trains a smaller table and an MLP that makes keys and values of it:
/// P = tanh(E·W₁ᵀ + b₁)·W₂ᵀ + b₂, with E [l, d], W₁ [m, d], W₂ [2·L·d, m]. It is saved flattened, as P alone.
///
/// P begins normal with deviation 0.02, with an MLP E standard normal and the maps as PyTorch begins them.
#[derive(Clone, Copy, Debug)]
pub struct PreLayer {
    tokens: VirtualTokens,
    reparam: usize,
}

impl PreLayer {
    /// With so many virtual tokens; `reparam` is the width m of the reparametrisation's hidden layer, 0 for none.
    ///
    /// # Errors
    /// [`Error::Option`] for no virtual tokens at all.
    pub fn new(tokens: VirtualTokens, reparam: usize) -> Result<PreLayer> {
        const MOST: usize = 1 << 20;
        if reparam > MOST {
            let why = "a hidden layer wider than any model; 512 is usual, and 0 is none".into();
            return Err(Error::Option { option: "reparam", value: reparam.to_string(), why });
        }
        Ok(PreLayer { tokens: checked(tokens)?, reparam })
    }
}

impl Method for PreLayer {
    fn name(&self) -> &'static str {
        "pre-layer"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        outline.needs(self.name(), "attention that takes further keys and values", |k| {
            matches!(k, SiteKind::KeysValues { .. })
        })?;
        check_positions(self.tokens, outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::KeysValues { layers, cols } = site.kind else { return Ok(None) };
        let (l, all) = (self.tokens.count(), layers * 2 * cols);
        let name = |name: &str| format!("{}.{name}", site.name);
        let source = match self.reparam {
            0 => Source::Table(plan.add(name(SAVED), &[l, all], Init::Normal { std: 0.02 })),
            m => {
                let map = |plan: &mut Plan, n: usize, inputs: usize, outputs: usize| {
                    let init = || Init::kaiming_uniform(inputs);
                    let w = plan.add(name(&format!("transform.{n}.weight")), &[outputs, inputs], init());
                    [w, plan.add(name(&format!("transform.{n}.bias")), &[outputs], init())]
                };
                let table = plan.add(name("embedding.weight"), &[l, cols], Init::Normal { std: 1.0 });
                Source::Mlp { table, maps: [map(plan, 0, cols, m), map(plan, 2, m, all)] }
            }
        };
        Ok(Some(Attached::KeysValues(Box::new(Prefix { tokens: self.tokens, source }))))
    }

    fn start(&self) -> Start {
        Start::Elsewhere
    }
}

/// The name of all keys and values in a file.
const SAVED: &str = "prompt_embeddings";

#[derive(Debug)]
struct Prefix {
    tokens: VirtualTokens,
    source: Source,
}

/// Where keys and values come from.
#[derive(Debug)]
enum Source {
    /// P itself.
    Table(ParamId),
    /// E, and weight and bias of both maps.
    Mlp { table: ParamId, maps: [[ParamId; 2]; 2] },
}

impl KeysValuesAdapter for Prefix {
    fn virtual_tokens(&self) -> VirtualTokens {
        self.tokens
    }

    fn keys_values(&self, t: &mut Tape) -> Result<Var> {
        match &self.source {
            Source::Table(p) => t.param(*p),
            Source::Mlp { table, maps: [first, second] } => {
                let map = |t: &mut Tape, x: &Var, [w, b]: [ParamId; 2]| {
                    let (w, b) = (t.param(w)?, t.param(b)?);
                    ops::linear(t, x, &w, Layout::OutIn, Some(&b))
                };
                let e = t.param(*table)?;
                let x = map(t, &e, *first)?;
                let x = ops::activation(t, Activation::Tanh, &x)?;
                map(t, &x, *second)
            }
        }
    }
}

impl Adapter for Prefix {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        // As computations see it, so that the file gives what training gave.
        let p = match &self.source {
            Source::Table(p) => params.tensor(*p),
            Source::Mlp { .. } => {
                self.keys_values(&mut Tape::inference(params))?.into_value().to_dtype(params.dtype())?
            }
        };
        Ok(vec![(SAVED.into(), p)])
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        match &self.source {
            Source::Table(p) => load_plain(params, &[*p], tensors),
            Source::Mlp { .. } => Err(Error::Structure {
                name: format!("{site}.{SAVED}"),
                why:
                    "a saved prefix is keys and values alone, so it cannot go on with a reparametrisation; train with \
                      reparam = 0"
                        .into(),
            }),
        }
    }
}
