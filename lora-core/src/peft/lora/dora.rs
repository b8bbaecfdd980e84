use lora_kernels::{gemm, reciprocal_norms};

use super::{
    super::{Linear, LinearSite, Plan, Site},
    update::{MAGNITUDE, Term, Update},
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// DoRA (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5): the direction of every output's weights
/// is that of W₀ + s·B·A, their length m trains apart from it,
///
/// ```text
/// y = (m / ‖W₀ + s·B·A‖) ∘ (W₀ + s·B·A)·x + b        ‖·‖ of each row of a weight [out, in], m [out]
/// ```
/// m begins at ‖W₀ + s·B·A‖: at ‖W₀‖ but where both factors begin at random. No gradient flows through the norm, as its
/// section 4.3 and PEFT have it.
#[derive(Debug)]
pub(super) struct Dora {
    /// m.
    m: ParamId,
    /// ‖W₀‖² of each output [1, out].
    squares: Tensor,
    /// Whether A and B begin at random, so that m follows from them.
    drawn: bool,
}

impl Dora {
    /// For a site whose weights are those of the plan's base, where it has one; with factors that are drawn at random, or whose
    /// product begins at zero.
    pub(super) fn new(site: &Site, linear: &LinearSite, drawn: bool, plan: &mut Plan) -> Result<Dora> {
        let name = format!("{}.{MAGNITUDE}", site.name);
        let Some(w) = plan.base_tensor(&format!("{}.weight", site.name)) else {
            let m = plan.add(name, &[linear.outputs], Init::Ones);
            return Ok(Dora { m, squares: Tensor::unbacked(&[1, linear.outputs])?, drawn });
        };
        let squares = squares(&w.to_f64()?, linear);
        let place = |values: &[f64], shape: &[usize]| -> Result<Tensor> {
            let dtype = w.device().activations(w.dtype()).accumulator();
            Tensor::from_slice(&lora_kernels::Device::Cpu, shape, values)?.to(&w.device(), dtype)
        };
        let norms: Vec<f64> = squares.iter().map(|n| n.sqrt()).collect();
        let m = plan.add(name, &[linear.outputs], Init::Copy(place(&norms, &[linear.outputs])?));
        Ok(Dora { m, squares: place(&squares, &[1, linear.outputs])?, drawn })
    }

    /// Whether m follows from A and B as they begin.
    pub(super) fn is_drawn(&self) -> bool {
        self.drawn
    }

    /// Lets m begin at the lengths of W₀ + s·B·A.
    pub(super) fn begin(&self, params: &mut Params, sum: &Tensor, linear: &LinearSite) -> Result<()> {
        let norms: Vec<f64> = squares(&sum.to_f64()?, linear).iter().map(|n| n.sqrt()).collect();
        params.set(self.m, &Tensor::from_slice(&lora_kernels::Device::Cpu, &[linear.outputs], &norms)?)
    }

    /// The parameter m.
    pub(super) fn magnitude(&self) -> ParamId {
        self.m
    }

    /// m / ‖W₀ + s·B·A‖ [1, out], with the norm as a constant.
    fn gains(&self, t: &mut Tape, base: &Linear, term: &Term, (a, b): (&Var, &Var), scale: f64) -> Result<Var> {
        let (whole_a, whole_b) = term.whole(a.value(), b.value())?;
        let norms = self.reciprocal_norms(base.w.value(), base.layout, &whole_a, &whole_b, scale)?;
        let norms = t.constant(&norms.to_dtype(a.value().dtype())?);
        let m = t.param(self.m)?;
        ops::scale_columns(t, &m, &norms)
    }

    /// 1/‖W₀ + s·B·A‖ of each output, [1, out]: from ‖W₀‖², which never changes, and the rest by small products,
    /// ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + bᵢ·(2s·A·wᵢ + s²·A·Aᵀ·bᵢ).
    fn reciprocal_norms(&self, w: &Tensor, layout: Layout, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        let (device, dtype, r, out) = (a.device(), a.dtype(), a.rows(), b.rows());
        let mut q = Tensor::empty(&device, dtype, &[out, r])?;
        let mut gram = Tensor::empty(&device, dtype, &[r, r])?;
        gemm(1.0, a.mat(), a.t(), 0.0, gram.make_mut()?)?;
        gemm(2.0 * scale, w.mat().t_if(layout == Layout::InOut), a.t(), 0.0, q.make_mut()?)?;
        gemm(scale * scale, b.mat(), gram.mat(), 1.0, q.make_mut()?)?;
        let mut norms = Tensor::empty(&device, self.squares.dtype(), &[1, out])?;
        reciprocal_norms(self.squares.mat(), q.mat(), b.mat(), norms.make_mut()?)?;
        Ok(norms)
    }

    /// The adapted output, with x dropped out before everything but the base's own output, as in PEFT.
    pub(super) fn apply(
        &self,
        t: &mut Tape,
        x: &Var,
        base: &Linear,
        term: &Term,
        (scale, dropout): (f64, f64),
    ) -> Result<Var> {
        let (a, b) = (t.param(term.a)?, t.param(term.b)?);
        let gains = self.gains(t, base, term, (&a, &b), scale)?;
        let terms = std::slice::from_ref(term);
        let directed = |t: &mut Tape, x: &Var, own: Var| -> Result<Var> {
            let u = ops::linear(t, x, &a, Layout::OutIn, None)?;
            let y = ops::linear_onto(t, own, term.cols.clone(), &u, &b, scale)?;
            ops::scale_columns(t, &y, &gains)
        };
        let Some(mask) = t.dropout_mask(dropout) else {
            let own = ops::linear(t, x, &base.w, base.layout, None)?;
            let own = Update::given_way(terms, t, x, own, scale)?;
            let y = directed(t, x, own)?;
            return match &base.bias {
                Some(bias) => ops::add_bias(t, y, bias),
                None => Ok(y),
            };
        };
        let y = base.apply(t, x)?;
        let y = Update::given_way(terms, t, x, y, scale)?;
        let x = &ops::dropout_by(t, x.share(), mask)?;
        let own = ops::linear(t, x, &base.w, base.layout, None)?;
        let own = Update::given_way(terms, t, x, own, scale)?;
        let more = directed(t, x, own.share())?;
        let y = ops::add(t, y, more)?;
        ops::subtract(t, y, &own)
    }

    /// Gives the outputs of a merged W₀ + s·B·A, of a weight stored in this layout, the length m.
    pub(super) fn rescale(&self, params: &Params, w: &Tensor, linear: &LinearSite) -> Result<Tensor> {
        let (m, mut values, cols) = (params.tensor(self.m).to_f64()?, w.to_f64()?, w.cols());
        let gains: Vec<f64> = squares(&values, linear).iter().zip(&m).map(|(n, m)| m / n.sqrt()).collect();
        for (i, value) in values.iter_mut().enumerate() {
            *value *= gains[output(i, cols, linear.layout)];
        }
        if values.iter().any(|v| !v.is_finite()) {
            let name = params.name(self.m).to_owned();
            return Err(Error::Structure { name, why: "with it a merged weight is not finite".into() });
        }
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        Tensor::from_slice(&params.device(), w.shape(), &values)
    }
}

/// The output that element i of a weight with so many columns belongs to.
fn output(i: usize, cols: usize, layout: Layout) -> usize {
    if layout == Layout::OutIn { i / cols } else { i % cols }
}

/// ‖wᵢ‖² of each output.
fn squares(w: &[f64], linear: &LinearSite) -> Vec<f64> {
    let cols = if linear.layout == Layout::OutIn { linear.inputs } else { linear.outputs };
    let mut squares = vec![0.0; linear.outputs];
    w.iter().enumerate().for_each(|(i, v)| squares[output(i, cols, linear.layout)] += v * v);
    squares
}
