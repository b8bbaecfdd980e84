use std::{collections::BTreeMap, ops::Range};

use lora_kernels::{Mat, MatMut, gemm};
use ndarray::{Array2, Axis};

use super::{
    super::{Adapter, Linear, LinearAdapter, LinearSite, take},
    dora::Dora,
};
use crate::{
    Error, ParamId, Params, Result, Tape, Tensor, Var,
    lowrank::{self, Layout, LowRank},
    ops::{self, LoraPart},
};

/// The update of one site: y[:, cols] += s·(x·Aᵀ)·Bᵀ for each of its terms.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) terms: Vec<Term>,
    pub(super) scale: f64,
    pub(super) dropout: f64,
    pub(super) layout: Layout,
    pub(super) outputs: usize,
    /// Of each term.
    pub(super) rank: usize,
    /// With DoRA, which has one term.
    pub(super) dora: Option<Dora>,
}

#[derive(Debug)]
pub(super) struct Term {
    pub(super) a: ParamId,
    pub(super) b: ParamId,
    pub(super) cols: Range<usize>,
}

/// PEFT's name for the lengths of DoRA.
pub(super) const MAGNITUDE: &str = "lora_magnitude_vector";

impl Update {
    /// The whole update as one pair A [n·r, in], B [outputs, n·r]; B is zero outside of its blocks.
    fn pair(&self, params: &Params) -> Result<(Array2<f32>, Array2<f32>)> {
        let (r, n) = (self.rank, self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let mut a = Array2::zeros((n * r, inputs));
        let mut b = Array2::zeros((self.outputs, n * r));
        for (i, term) in self.terms.iter().enumerate() {
            let block = ndarray::s![i * r..(i + 1) * r, ..];
            a.slice_mut(block).assign(&params.tensor(term.a).to_array()?);
            let block = ndarray::s![term.cols.clone(), i * r..(i + 1) * r];
            b.slice_mut(block).assign(&params.tensor(term.b).to_array()?);
        }
        Ok((a, b))
    }
}

fn tensor(like: &Params, a: &Array2<f32>) -> Result<Tensor> {
    let data: Vec<f32> = a.iter().copied().collect();
    Tensor::from_slice(&like.device(), a.shape(), &data)
}

impl LinearAdapter for Update {
    fn apply(&self, t: &mut Tape, x: &Var, base: &Linear) -> Result<Var> {
        if let Some(dora) = &self.dora {
            return dora.apply(t, x, base, &self.terms[0], (self.scale, self.dropout));
        }
        let part = |term: &Term| Ok(LoraPart { cols: term.cols.clone(), a: t.param(term.a)?, b: t.param(term.b)? });
        let parts = self.terms.iter().map(part).collect::<Result<Vec<_>>>()?;
        let Some(mask) = t.dropout_mask(self.dropout) else {
            return ops::lora_linear(t, x, &base.w, base.layout, base.bias.as_ref(), &parts, self.scale);
        };
        let mut y = base.apply(t, x)?;
        // One mask for all parts: PEFT drops the input of the module once.
        let x = &ops::dropout_by(t, x.share(), mask)?;
        for LoraPart { cols, a, b } in parts {
            let u = ops::linear(t, x, &a, Layout::OutIn, None)?;
            y = ops::linear_onto(t, y, cols, &u, &b, self.scale)?;
        }
        Ok(y)
    }

    fn add(&self, params: &Params, x: Mat, mut y: MatMut) -> Result<bool> {
        if self.dora.is_some() {
            return Ok(false);
        }
        for Term { a, b, cols } in &self.terms {
            let (a, b) = (params.compute_tensor(*a)?, params.compute_tensor(*b)?);
            let mut h = Tensor::empty(x.device(), x.dtype(), &[x.rows(), self.rank])?;
            gemm(self.scale, x, a.t(), 0.0, h.make_mut()?)?;
            gemm(1.0, h.mat(), b.t(), 1.0, y.reborrow().cols_in(cols.clone()))?;
        }
        Ok(true)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let mut w = w.to_array()?;
        let outputs = match self.layout {
            Layout::OutIn => Axis(0),
            Layout::InOut => Axis(1),
        };
        // Each term into its own columns: the ranks of all terms together may exceed what one update can have.
        for term in &self.terms {
            let (a, b) = (params.tensor(term.a).to_array()?, params.tensor(term.b).to_array()?);
            let update = LowRank::new(a, b, self.scale)?;
            let mut block = w.slice_axis_mut(outputs, term.cols.clone().into());
            let merged = lowrank::merge(block.view(), &update, self.layout)?.into_weight();
            block.assign(&merged);
        }
        let merged = tensor(params, &w)?;
        match &self.dora {
            None => Ok(merged),
            Some(dora) => {
                let inputs = params.shape(self.terms[0].a)[1];
                let linear = LinearSite { inputs, outputs: self.outputs, layout: self.layout, parts: Vec::new() };
                dora.rescale(params, &merged, &linear)
            }
        }
    }
}

impl Adapter for Update {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let (a, b) = self.pair(params)?;
        let mut saved =
            vec![("lora_A.weight".into(), tensor(params, &a)?), ("lora_B.weight".into(), tensor(params, &b)?)];
        saved.extend(self.dora.as_ref().map(|dora| (MAGNITUDE.into(), params.tensor(dora.magnitude()))));
        Ok(saved)
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (r, n) = (self.rank, self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let a = take(tensors, &format!("{site}.lora_A.weight"), &[n * r, inputs])?.to_array()?;
        let name = format!("{site}.lora_B.weight");
        let mut b = take(tensors, &name, &[self.outputs, n * r])?.to_array()?;
        for (i, term) in self.terms.iter().enumerate() {
            let part = a.slice(ndarray::s![i * r..(i + 1) * r, ..]).to_owned();
            params.set(term.a, &tensor(params, &part)?)?;
            let mut block = b.slice_mut(ndarray::s![term.cols.clone(), i * r..(i + 1) * r]);
            let part = block.to_owned();
            params.set(term.b, &tensor(params, &part)?)?;
            block.fill(0.0);
        }
        if let Some(dora) = &self.dora {
            let m = take(tensors, &format!("{site}.{MAGNITUDE}"), &[self.outputs])?;
            params.set(dora.magnitude(), &m)?;
        }
        if b.iter().any(|&v| v != 0.0) {
            let why = "it is not zero outside of the blocks that its parts name, so it is no adapter of these parts; use the whole module as the target".into();
            return Err(Error::Structure { name, why });
        }
        Ok(())
    }
}
