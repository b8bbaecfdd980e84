//! Disentangled attention: content and relative position have vectors of their own.

mod backward;
mod forward;
mod positions;

pub use positions::RelativePositions;

use super::Sequences;
use crate::{Acc, Dropout, Error, Mat, MatMut, Result, mat::HostMat, real::dispatch};

/// The shape and kind of a disentangled attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disentangled {
    /// Number of heads.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Factor of all three scores, 1/√(head_dim·(1 + number of kinds of positional scores)).
    pub scale: f64,
    /// Which row of the tables a distance has.
    pub positions: RelativePositions,
    /// Dropout of the probabilities, with the mask of [`Attention::dropout`](super::Attention::dropout).
    pub dropout: Option<Dropout>,
}

/// What [`disentangled`] reads: q, k, v [tokens, heads · head_dim] and the projected tables of relative positions
/// [2·span, heads · head_dim].
#[derive(Clone, Copy)]
pub struct DisentangledInputs<'a> {
    /// Queries.
    pub q: Mat<'a>,
    /// Keys.
    pub k: Mat<'a>,
    /// Values.
    pub v: Mat<'a>,
    /// K̂, the keys of positions, for content to position (`c2p`).
    pub pos_key: Option<Mat<'a>>,
    /// Q̂, the queries of positions, for position to content (`p2c`).
    pub pos_query: Option<Mat<'a>>,
}

/// Where the gradients of [`DisentangledInputs`] go, as far as they are wanted.
pub struct DisentangledGrads<'a> {
    /// Of the queries.
    pub q: Option<Acc<'a>>,
    /// Of the keys.
    pub k: Option<Acc<'a>>,
    /// Of the values.
    pub v: Option<Acc<'a>>,
    /// Of K̂.
    pub pos_key: Option<Acc<'a>>,
    /// Of Q̂.
    pub pos_query: Option<Acc<'a>>,
}

/// Disentangled attention within each sequence, by heads:
/// ```text
/// Sᵢⱼ = scale · (Qᵢ·Kⱼ + Qᵢ·K̂ᵣ + Kⱼ·Q̂ᵣ)      r = row(i − j): content to content, content to position, position to content
/// Lᵢ  = ln Σⱼ exp Sᵢⱼ
/// O   = (P ∘ M) V,  P = exp(S − L)             M: dropout's mask
/// ```
/// Without K̂ or Q̂ their term is missing. out: [tokens, heads · head_dim]; lse: [tokens, heads], the L that
/// [`disentangled_backward`] needs. The third term reads row(i − j), where equation 4 of He et al. 2021 ("DeBERTa") has
/// δ(j, i): as published, the models were trained with the former.
///
/// A task holds the scores of one sequence and head, and as many products with rows of a table. CPU only.
///
/// # Errors
/// Out of memory; [`Error::NoCuda`] for matrices on a CUDA device.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn disentangled(
    cfg: &Disentangled,
    seqs: &Sequences,
    inputs: DisentangledInputs,
    out: MatMut,
    lse: MatMut,
) -> Result<()> {
    cfg.check("disentangled", seqs, &inputs, [(out.rows(), out.cols())], (lse.rows(), lse.cols()));
    if !out.device().is_cpu() {
        return Err(Error::NoCuda { kernel: "disentangled attention" });
    }
    dispatch!("disentangled", out.dtype(), T => {
        forward::run::<T>(cfg, seqs, &inputs.host(), out.host(), lse.host())
    })
}

/// Gradients of [`disentangled`] from dout = ∂loss/∂out and what the forward pass was given and gave:
/// ```text
/// dV = (P ∘ M)ᵀ dO
/// dS = P ∘ ((dO Vᵀ) ∘ M − D)                    Dᵢ = Σ_c dOᵢ_c Oᵢ_c
/// Cᵢᵣ = Σ_{j: row(i − j) = r} dSᵢⱼ              Bⱼᵣ = Σ_{i: row(i − j) = r} dSᵢⱼ
/// dQ = scale · (dS K + C K̂)                     dK̂ = scale · Cᵀ Q, summed over the sequences
/// dK = scale · (dSᵀ Q + B Q̂)                    dQ̂ = scale · Bᵀ K, summed over the sequences
/// ```
/// Shapes as there. Only what is wanted is computed. Each element is summed by one task in a fixed order: the tables'
/// gradients make a task of all sequences of a head, without them each sequence is one.
///
/// # Errors
/// As there.
///
/// # Panics
/// When the shapes or types do not fit, or the gradient of a table is wanted that is not there.
pub fn disentangled_backward(
    cfg: &Disentangled,
    seqs: &Sequences,
    inputs: DisentangledInputs,
    out: Mat,
    lse: Mat,
    dout: Mat,
    grads: DisentangledGrads,
) -> Result<()> {
    let shapes = [(out.rows(), out.cols()), (dout.rows(), dout.cols())];
    cfg.check("disentangled_backward", seqs, &inputs, shapes, (lse.rows(), lse.cols()));
    let DisentangledGrads { q, k, v, pos_key, pos_query } = grads;
    let all = [(q, Some(inputs.q)), (k, Some(inputs.k)), (v, Some(inputs.v))];
    let all = all.into_iter().chain([(pos_key, inputs.pos_key), (pos_query, inputs.pos_query)]);
    let checked = all.map(|(grad, of)| {
        let shape = |of: Option<Mat>| of.map(|m| (m.rows(), m.cols()));
        let fits = grad.as_ref().is_none_or(|g| Some((g.to.rows(), g.to.cols())) == shape(of));
        assert!(fits, "disentangled_backward: a gradient is as large as what it belongs to");
        grad
    });
    let grads: [Option<Acc>; 5] = checked.collect::<Vec<_>>().try_into().unwrap_or_else(|_| unreachable!("five"));
    if !dout.device().is_cpu() {
        return Err(Error::NoCuda { kernel: "disentangled attention" });
    }
    dispatch!("disentangled_backward", dout.dtype(), T => {
        let saved = backward::Saved { x: inputs.host::<T>(), out: out.host(), lse: lse.host(), dout: dout.host() };
        backward::run(cfg, seqs, &saved, grads.map(|g| g.map(|g| (g.to.host(), g.beta))))
    })
}

impl Disentangled {
    fn check<const N: usize>(
        &self,
        kernel: &str,
        seqs: &Sequences,
        x: &DisentangledInputs,
        outs: [(usize, usize); N],
        lse: (usize, usize),
    ) {
        let width = self.heads * self.head_dim;
        let (rows, table) = ((seqs.tokens(), width), (2 * self.positions.span(), width));
        for m in [x.q, x.k, x.v] {
            assert_eq!((m.rows(), m.cols()), rows, "{kernel}: q, k and v are [tokens, heads·head_dim]");
        }
        for m in [x.pos_key, x.pos_query].into_iter().flatten() {
            assert_eq!((m.rows(), m.cols()), table, "{kernel}: tables of positions are [2·span, heads·head_dim]");
        }
        assert_eq!(outs, [rows; N], "{kernel}: out is as large as q");
        assert_eq!(lse, (seqs.tokens(), self.heads), "{kernel}: lse is [tokens, heads]");
    }

    /// Scratch of a task: the scores of the longest sequence, and its products with the rows of a table.
    fn scratch(&self, longest: usize) -> (usize, usize) {
        (longest * longest, longest * (2 * self.positions.span()).min(2 * longest))
    }
}

/// [`DisentangledInputs`] of the host's kernels, whole or of one sequence and head.
struct Inputs<'a, T> {
    q: HostMat<'a, T>,
    k: HostMat<'a, T>,
    v: HostMat<'a, T>,
    pos_key: Option<HostMat<'a, T>>,
    pos_query: Option<HostMat<'a, T>>,
}

impl<'a> DisentangledInputs<'a> {
    fn host<T: crate::real::Real>(&self) -> Inputs<'a, T> {
        Inputs {
            q: self.q.host(),
            k: self.k.host(),
            v: self.v.host(),
            pos_key: self.pos_key.map(Mat::host),
            pos_query: self.pos_query.map(Mat::host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    /// Two heads of 8 columns.
    const WIDTH: usize = 16;

    /// Output, log-sum-exp and the gradients that are wanted, each β·7 + its value.
    fn all(lengths: &[usize], positions: RelativePositions, wanted: [bool; 5], beta: f64) -> Vec<f64> {
        let dropout = Some(Dropout { p: 0.2, seed: 5, step: 1, site: 3, row_offset: 11 });
        let cfg = Disentangled { heads: 2, head_dim: 8, scale: 0.3, positions, dropout };
        let (seqs, table) = (Sequences::new(lengths), 2 * positions.span());
        let rows = [seqs.tokens(), seqs.tokens(), seqs.tokens(), table, table];
        let new = |rows, seed| Padded::new(DType::F32, rows, WIDTH, 2, &random(seed, rows * WIDTH, 1.0));
        let x: Vec<Padded> = rows.into_iter().zip(1..).map(|(rows, seed)| new(rows, seed)).collect();
        let inputs = DisentangledInputs {
            q: x[0].mat(),
            k: x[1].mat(),
            v: x[2].mat(),
            pos_key: Some(x[3].mat()),
            pos_query: Some(x[4].mat()),
        };
        let mut out = Padded::poison(DType::F32, seqs.tokens(), WIDTH, 2);
        let mut lse = Padded::poison(DType::F32, seqs.tokens(), 2, 1);
        disentangled(&cfg, &seqs, inputs, out.mat_mut(), lse.mat_mut()).unwrap();
        let old = |rows: usize| vec![7.0; rows * WIDTH];
        let mut grads = rows.map(|rows| Padded::target(DType::F32, rows, WIDTH, 2, beta, &old(rows)));
        let [q, k, v, pos_key, pos_query] = {
            let mut wanted = wanted.into_iter();
            grads.each_mut().map(|g| wanted.next().unwrap().then(|| g.acc(beta)))
        };
        let to = DisentangledGrads { q, k, v, pos_key, pos_query };
        let dout = new(seqs.tokens(), 9);
        disentangled_backward(&cfg, &seqs, inputs, out.mat(), lse.mat(), dout.mat(), to).unwrap();
        let grads = grads.iter().zip(wanted).filter(|(_, wanted)| *wanted).flat_map(|(g, _)| g.get());
        out.get().into_iter().chain(lse.get()).chain(grads).collect()
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let (lengths, positions) = ([150, 1, 90, 33, 0, 70, 128], RelativePositions::new(32, 64).unwrap());
        same_bits("disentangled, sequences apart", || all(&lengths, positions, [true, true, true, false, false], 0.0));
        same_bits("disentangled, all of a head", || all(&lengths, positions, [true; 5], 0.0));
    }

    /// A gradient does not depend on which others are wanted, and is added to what was there.
    #[test]
    fn gradients_are_each_of_their_own() {
        for lengths in [&[9, 0, 4][..], &[], &[0]] {
            let positions = RelativePositions::new(8, 16).unwrap();
            let fixed = lengths.iter().sum::<usize>() * (WIDTH + 2);
            let together = all(lengths, positions, [true; 5], 0.0).split_off(fixed);
            let mut apart = Vec::new();
            let mut added = Vec::new();
            for i in 0..5 {
                let only = std::array::from_fn(|j| i == j);
                apart.extend(all(lengths, positions, only, 0.0).split_off(fixed));
                added.extend(all(lengths, positions, only, 1.0).split_off(fixed));
            }
            close("together", &together, &apart, 1e-6);
            close("added", &added, &accumulated(&apart, 1.0, &vec![7.0; apart.len()]), 1e-6);
        }
    }
}
