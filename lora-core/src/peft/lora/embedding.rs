use std::collections::BTreeMap;

use ndarray::Array2;

use super::{
    super::{Adapter, EmbeddingAdapter, Plan, Site, take},
    update::tensor,
};
use crate::{
    Error, Init, ParamId, Params, Result, Tape, Tensor, Var,
    lowrank::{self, Layout, LowRank},
    ops,
};

/// LoRA of an embedding, whose weight E [rows, width] a token picks a row of: y = E\[i\] + s·B·A\[:, i\], with A [r, rows] and
/// B [width, r]. As in PEFT, A begins zero and B standard normal, and nothing is dropped out.
#[derive(Debug)]
pub(super) struct EmbeddingUpdate {
    /// Aᵀ [rows, r]: a token picks a row of it too.
    at: ParamId,
    b: ParamId,
    scale: f64,
    /// The rank in a file: twice that which trains where linear maps begin at a part of the base, so that one rank holds for
    /// all modules; the rest is zero.
    saved_rank: usize,
}

/// PEFT's names.
pub(super) const FACTORS: [&str; 2] = ["lora_embedding_A", "lora_embedding_B"];

impl EmbeddingUpdate {
    /// For a table [rows, width].
    pub(super) fn new(
        site: &Site,
        [rows, width]: [usize; 2],
        (rank, saved_rank, scale): (usize, usize, f64),
        zero: bool,
        plan: &mut Plan,
    ) -> EmbeddingUpdate {
        let normal = Init::Normal { std: 1.0 };
        let name = |factor: &str| format!("{}.{factor}", site.name);
        let at = plan.add(name(FACTORS[0]), &[rows, rank], if zero { Init::Zeros } else { normal.clone() });
        let b = plan.add(name(FACTORS[1]), &[width, rank], normal);
        EmbeddingUpdate { at, b, scale, saved_rank }
    }

    /// A [r, rows] and B [width, r].
    fn pair(&self, params: &Params) -> Result<(Array2<f32>, Array2<f32>)> {
        let (at, b) = (params.tensor(self.at).to_array()?, params.tensor(self.b).to_array()?);
        Ok((at.t().as_standard_layout().into_owned(), b))
    }
}

impl EmbeddingAdapter for EmbeddingUpdate {
    fn apply(&self, t: &mut Tape, table: &Var, ids: &Tensor) -> Result<Var> {
        let y = ops::gather(t, table, ids)?;
        let (at, b) = (t.param(self.at)?, t.param(self.b)?);
        let u = ops::gather(t, &at, ids)?;
        let width = y.value().cols();
        ops::linear_onto(t, y, 0..width, &u, &b, self.scale)
    }

    fn merge(&self, params: &Params, table: &Tensor) -> Result<Tensor> {
        let (a, b) = self.pair(params)?;
        let (table, update) = (table.to_array()?, LowRank::new(a, b, self.scale)?);
        tensor(params, lowrank::merge(table.view(), &update, Layout::InOut)?.weight())
    }
}

impl Adapter for EmbeddingUpdate {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let (a, b) = self.pair(params)?;
        let at = |m: &Array2<f32>, i| m.get(i).copied().unwrap_or(0.0);
        let a = Array2::from_shape_fn((self.saved_rank, a.ncols()), |i| at(&a, i));
        let b = Array2::from_shape_fn((b.nrows(), self.saved_rank), |i| at(&b, i));
        Ok(vec![(FACTORS[0].into(), tensor(params, a.view())?), (FACTORS[1].into(), tensor(params, b.view())?)])
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (rows, rank) = (params.shape(self.at)[0], params.shape(self.at)[1]);
        let width = params.shape(self.b)[0];
        let names = FACTORS.map(|factor| format!("{site}.{factor}"));
        let a = take(tensors, &names[0], &[self.saved_rank, rows])?.to_array()?;
        let b = take(tensors, &names[1], &[width, self.saved_rank])?.to_array()?;
        let (kept, rest) = (ndarray::s![..rank, ..], ndarray::s![rank.., ..]);
        if a.slice(rest).iter().any(|v| *v != 0.0) {
            let why = "its upper half is not zero, as that of an embedding beside maps that begin at the base is; attach it as \
                       an adapter that begins at zero, of twice the rank";
            return Err(Error::Structure { name: names[0].clone(), why: why.into() });
        }
        params.set(self.at, &tensor(params, a.slice(kept).t())?)?;
        params.set(self.b, &tensor(params, b.slice(ndarray::s![.., ..rank]))?)
    }
}
