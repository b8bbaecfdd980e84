//! What architectures are built of: named weights and the layers that read them.

use lora_core::{
    Result, Tape, Tensor, Var,
    lowrank::Layout,
    ops,
    peft::{Adapted, Linear, Norm},
};

/// A tensor under its Hugging Face name.
#[derive(Clone, Debug)]
pub struct Weight {
    /// The name.
    pub name: String,
    /// The tensor.
    pub tensor: Tensor,
}

impl Weight {
    /// The weight as a variable: trainable when the method trains it, else constant.
    pub(crate) fn var(&self, t: &Tape, adapted: &Adapted) -> Result<Var> {
        adapted.weight(t, &self.name, &self.tensor)
    }

    /// The rows of a table of embeddings that `ids` name, with whatever adapter is attached to it.
    pub(crate) fn rows(&self, t: &mut Tape, adapted: &Adapted, ids: &Tensor) -> Result<Var> {
        let table = self.var(t, adapted)?;
        adapted.embed(t, &self.name, &table, ids)
    }
}

/// A linear map y = x·Wᵀ + b with whatever adapter is attached to it.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    pub(crate) module: String,
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
    pub(crate) layout: Layout,
}

impl Projection {
    pub(crate) fn apply(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Var> {
        let w = self.weight.var(t, adapted)?;
        let bias = self.bias.as_ref().map(|b| b.var(t, adapted)).transpose()?;
        adapted.project(t, &self.module, x, &Linear { w, layout: self.layout, bias })
    }
}

/// Where the output of a sublayer joins the stream, with whatever adapter is attached there.
#[derive(Clone, Debug)]
pub(crate) struct Sublayer {
    pub(crate) module: String,
}

impl Sublayer {
    /// The stream after the sublayer: x + f, normalised where a norm follows.
    pub(crate) fn join(&self, t: &mut Tape, adapted: &Adapted, x: Var, f: Var, norm: Norm) -> Result<Var> {
        adapted.join(t, &self.module, x, f, norm)
    }
}

/// Layer normalisation.
#[derive(Clone, Debug)]
pub(crate) struct LayerNorm {
    pub(crate) weight: Weight,
    pub(crate) bias: Weight,
    pub(crate) eps: f64,
}

impl LayerNorm {
    pub(crate) fn apply(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Var> {
        let (gamma, beta) = (self.weight.var(t, adapted)?, self.bias.var(t, adapted)?);
        ops::layer_norm(t, x, &gamma, &beta, self.eps)
    }
}

/// Normalisation by the root mean square.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Weight,
    pub(crate) eps: f64,
}

impl RmsNorm {
    pub(crate) fn apply(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Var> {
        let gamma = self.weight.var(t, adapted)?;
        ops::rms_norm(t, x, &gamma, self.eps)
    }
}
