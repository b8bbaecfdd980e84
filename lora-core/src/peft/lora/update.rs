use std::{collections::BTreeMap, ops::Range};

use lora_kernels::{Mat, MatMut, gemm};
use ndarray::{Array2, ArrayView2, Axis};

use super::{
    super::{Adapter, HeadAdapter, Linear, LinearAdapter, LinearSite, take},
    dora::Dora,
    init::Origin,
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
    /// What it began at, which the base gave way to.
    pub(super) origin: Option<Origin>,
}

impl Term {
    /// A [r, in] and B [out, r] with what they began at: the update of the base's own weight.
    pub(super) fn whole(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        match &self.origin {
            None => Ok((a.clone(), b.clone())),
            Some(origin) => origin.beside(a, b),
        }
    }

    /// The same of parameters, as arrays.
    fn arrays(&self, params: &Params) -> Result<(Array2<f32>, Array2<f32>)> {
        let (a, b) = self.whole(&params.tensor(self.a), &params.tensor(self.b))?;
        Ok((a.to_array()?, b.to_array()?))
    }
}

/// PEFT's name for the lengths of DoRA.
pub(super) const MAGNITUDE: &str = "lora_magnitude_vector";

impl Update {
    /// The rank of each term with what it began at.
    fn saved_rank(&self) -> usize {
        if self.terms[0].origin.is_some() { 2 * self.rank } else { self.rank }
    }

    /// The output of a linear map that gives way to what the terms began at: y −= s·(x·A₀ᵀ)·B₀ᵀ.
    pub(super) fn given_way(terms: &[Term], t: &mut Tape, x: &Var, mut y: Var, scale: f64) -> Result<Var> {
        for term in terms {
            if let Some(origin) = &term.origin {
                y = origin.take(t, x, y, term.cols.clone(), scale)?;
            }
        }
        Ok(y)
    }

    /// The whole update as one pair A [n·r, in], B [outputs, n·r]; B is zero outside of its blocks.
    fn pair(&self, params: &Params) -> Result<(Array2<f32>, Array2<f32>)> {
        let (r, n) = (self.saved_rank(), self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let mut a = Array2::zeros((n * r, inputs));
        let mut b = Array2::zeros((self.outputs, n * r));
        for (i, term) in self.terms.iter().enumerate() {
            let (own_a, own_b) = term.arrays(params)?;
            a.slice_mut(ndarray::s![i * r..(i + 1) * r, ..]).assign(&own_a);
            b.slice_mut(ndarray::s![term.cols.clone(), i * r..(i + 1) * r]).assign(&own_b);
        }
        Ok((a, b))
    }
}

/// An array as a tensor where the parameters lie.
pub(super) fn tensor(like: &Params, a: ArrayView2<'_, f32>) -> Result<Tensor> {
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
            let y = ops::lora_linear(t, x, &base.w, base.layout, base.bias.as_ref(), &parts, self.scale)?;
            return Update::given_way(&self.terms, t, x, y, self.scale);
        };
        let y = base.apply(t, x)?;
        let mut y = Update::given_way(&self.terms, t, x, y, self.scale)?;
        // One mask for all parts: PEFT drops the input of the module once.
        let x = &ops::dropout_by(t, x.share(), mask)?;
        for LoraPart { cols, a, b } in parts {
            let u = ops::linear(t, x, &a, Layout::OutIn, None)?;
            y = ops::linear_onto(t, y, cols, &u, &b, self.scale)?;
        }
        Ok(y)
    }

    fn add(&self, params: &Params, x: Mat, mut y: MatMut) -> Result<bool> {
        if self.dora.is_some() || self.terms.iter().any(|term| term.origin.is_some()) {
            return Ok(false);
        }
        for Term { a, b, cols, .. } in &self.terms {
            let (a, b) = (params.compute_tensor(*a)?, params.compute_tensor(*b)?);
            let mut h = Tensor::empty(x.device(), x.dtype(), &[x.rows(), self.rank])?;
            gemm(self.scale, x, a.t(), 0.0, h.make_mut()?)?;
            gemm(1.0, h.mat(), b.t(), 1.0, y.reborrow().cols_in(cols.clone()))?;
        }
        Ok(true)
    }

    fn begin(&self, params: &mut Params, w: &Tensor) -> Result<()> {
        let Some(dora) = self.dora.as_ref().filter(|dora| dora.is_drawn()) else { return Ok(()) };
        let sum = self.sum(params, w)?;
        let linear = self.linear(params);
        dora.begin(params, &sum, &linear)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let sum = self.sum(params, w)?;
        match &self.dora {
            None => Ok(sum),
            Some(dora) => dora.rescale(params, &sum, &self.linear(params)),
        }
    }
}

impl Update {
    /// W₀ + s·B·A.
    fn sum(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        let mut w = w.to_array()?;
        let outputs = match self.layout {
            Layout::OutIn => Axis(0),
            Layout::InOut => Axis(1),
        };
        // Each term into its own columns: the zeros elsewhere cost nothing.
        for term in &self.terms {
            let (a, b) = term.arrays(params)?;
            let update = LowRank::new(a, b, self.scale)?;
            let mut block = w.slice_axis_mut(outputs, term.cols.clone().into());
            let merged = lowrank::merge(block.view(), &update, self.layout)?.into_weight();
            block.assign(&merged);
        }
        tensor(params, w.view())
    }

    /// The map that is adapted.
    fn linear(&self, params: &Params) -> LinearSite {
        let inputs = params.shape(self.terms[0].a)[1];
        LinearSite { inputs, outputs: self.outputs, layout: self.layout, parts: Vec::new() }
    }
}

impl HeadAdapter for Update {
    fn beside(&self, t: &mut Tape, x: &Var) -> Result<Vec<ops::BesideHead>> {
        let [term] = &self.terms[..] else { panic!("an output head has no parts") };
        let (a, b) = (t.param(term.a)?, t.param(term.b)?);
        let beside = |t: &mut Tape, x: &Var, a: &Var, w: Var| -> Result<ops::BesideHead> {
            Ok(ops::BesideHead { factor: self.scale, x: ops::linear(t, x, a, Layout::OutIn, None)?, w })
        };
        let mut all = Vec::new();
        if let Some(origin) = &term.origin {
            let [a, minus_b] = origin.constants(t, x)?;
            all.push(beside(t, x, &a, minus_b)?);
        }
        let dropped = t.dropout_mask(self.dropout).map(|mask| ops::dropout_by(t, x.share(), mask)).transpose()?;
        all.push(beside(t, dropped.as_ref().unwrap_or(x), &a, b)?);
        Ok(all)
    }

    fn merge(&self, params: &Params, w: &Tensor) -> Result<Tensor> {
        LinearAdapter::merge(self, params, w)
    }
}

impl Adapter for Update {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let (a, b) = self.pair(params)?;
        let mut saved = vec![
            ("lora_A.weight".into(), tensor(params, a.view())?),
            ("lora_B.weight".into(), tensor(params, b.view())?),
        ];
        saved.extend(self.dora.as_ref().map(|dora| (MAGNITUDE.into(), params.tensor(dora.magnitude()))));
        Ok(saved)
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (r, saved, n) = (self.rank, self.saved_rank(), self.terms.len());
        let inputs = params.shape(self.terms[0].a)[1];
        let a = take(tensors, &format!("{site}.lora_A.weight"), &[n * saved, inputs])?.to_array()?;
        let name = format!("{site}.lora_B.weight");
        let mut b = take(tensors, &name, &[self.outputs, n * saved])?.to_array()?;
        for (i, term) in self.terms.iter().enumerate() {
            let rows = i * saved..(i + 1) * saved;
            let part = a.slice(ndarray::s![rows.clone(), ..]);
            let mut block = b.slice_mut(ndarray::s![term.cols.clone(), rows]);
            params.set(term.a, &tensor(params, part.slice(ndarray::s![..r, ..]))?)?;
            params.set(term.b, &tensor(params, block.slice(ndarray::s![.., ..r]))?)?;
            if term.arrays(params)? != (part.to_owned(), block.to_owned()) {
                let why = "the half of it that is constant is not what an adapter of this base begins at; attach it as an \
                           adapter that begins at zero, of twice the rank";
                return Err(Error::Structure { name: format!("{site}.lora_A.weight"), why: why.into() });
            }
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
