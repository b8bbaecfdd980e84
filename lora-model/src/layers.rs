//! What architectures are built of: named weights and the layers that read them.

use lora_core::{
    Result, Tape, Tensor, Var,
    lowrank::Layout,
    ops,
    peft::{Adapted, Linear, Site},
};

/// A tensor under its Hugging Face name.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
}

impl Weight {
    /// The weight as a variable: trainable when the method trains it, else constant.
    pub(crate) fn var(&self, t: &Tape, adapted: &Adapted) -> Result<Var> {
        adapted.weight(t, &self.name, &self.tensor)
    }
}

/// A linear map y = x·Wᵀ + b with whatever adapter is attached to it.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    pub(crate) module: String,
    pub(crate) weight: Weight,
    pub(crate) bias: Weight,
    pub(crate) layout: Layout,
}

impl Projection {
    pub(crate) fn apply(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Var> {
        let (w, b) = (self.weight.var(t, adapted)?, self.bias.var(t, adapted)?);
        adapted.project(t, &self.module, x, &Linear { w, layout: self.layout, bias: Some(b) })
    }

    /// The place that it offers to adapters.
    pub(crate) fn site(&self, parts: Vec<(&'static str, std::ops::Range<usize>)>) -> Site {
        let shape = self.weight.tensor.shape();
        let (inputs, outputs) = match self.layout {
            Layout::OutIn => (shape[1], shape[0]),
            Layout::InOut => (shape[0], shape[1]),
        };
        Site { name: self.module.clone(), inputs, outputs, layout: self.layout, parts }
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
