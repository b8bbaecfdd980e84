//! Softmax attention over flat runs of tokens: forward, backward, and over a cache.
//!
//! A task holds one block of queries against their keys; the scores of a whole sequence, let alone of a batch, never
//! exist. On CUDA the same in tiles of 64 × 64 at most, in registers, with an online softmax.

mod backward;
mod cached;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod disentangled;
mod forward;
mod rows;

use std::ops::Range;

pub use disentangled::{
    Disentangled, DisentangledGrads, DisentangledInputs, RelativePositions, disentangled, disentangled_backward,
};

use crate::{Acc, Device, Dropout, Mat, MatMut, Result, real::dispatch};

/// Queries of one task.
const BLOCK: usize = 64;

/// Where the sequences of a batch lie in its flat run of tokens: boundaries from 0 to the number of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    bounds: Vec<u32>,
    #[cfg(feature = "cuda")]
    on_device: cuda::OnDevice,
}

impl Sequences {
    /// Sequences of these lengths, one after the other.
    ///
    /// # Panics
    /// When there are 2³² tokens or more.
    pub fn new(lengths: &[usize]) -> Sequences {
        let mut end = 0;
        let next = lengths.iter().map(|n| {
            end += n;
            u32::try_from(end).expect("a batch has fewer than 2³² tokens")
        });
        Sequences {
            bounds: std::iter::once(0).chain(next).collect(),
            #[cfg(feature = "cuda")]
            on_device: cuda::OnDevice::default(),
        }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of sequence `i`.
    pub fn range(&self, i: usize) -> Range<usize> {
        self.bounds[i] as usize..self.bounds[i + 1] as usize
    }

    /// Number of tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.bounds[self.len()] as usize
    }

    /// Length of the longest sequence.
    pub fn max_len(&self) -> usize {
        (0..self.len()).map(|i| self.range(i).len()).max().unwrap_or(0)
    }
}

/// The shape and kind of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of the keys and values, which divide `heads`: as many for ordinary attention, fewer for grouped queries.
    pub kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually 1/√head_dim.
    pub scale: f64,
    /// Whether a query sees only the keys up to its own position.
    pub causal: bool,
    /// Dropout of the probabilities, after the softmax. Its mask has counters [key position / 4, row of the query,
    /// site + head·2¹⁶, step].
    pub dropout: Option<Dropout>,
}

/// Attention within each sequence. For every query head h, which reads key and value head g = ⌊h · kv_heads / heads⌋,
/// ```text
/// S = scale · Q Kᵀ              [n, n]; causal: Sᵢⱼ = −∞ for j > i
/// Lᵢ = ln Σⱼ exp Sᵢⱼ            log-sum-exp
/// P = exp(S − L)                softmax by rows
/// O = (P ∘ M) V                 M: dropout's mask, 0 or 1/(1 − p); all 1 without dropout
/// ```
/// q, out: [tokens, heads · head_dim]; k, v: [tokens, kv_heads · head_dim]; lse: [tokens, heads], the L that
/// [`attention_backward`] needs. q, k and v may be column ranges of one fused projection. Memory beside these: a block
/// of 64 rows of scores per task, none on CUDA. All matrices are of one type; on CUDA lse is f32, and the mask is the
/// same.
///
/// # Errors
/// Out of memory; on CUDA also heads of more than 256 columns, or a device without the shared memory for them.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn attention(cfg: &Attention, seqs: &Sequences, q: Mat, k: Mat, v: Mat, out: MatMut, lse: MatMut) -> Result<()> {
    cfg.check("attention", seqs.tokens(), [(q.rows(), q.cols()), (out.rows(), out.cols())], [&k, &v]);
    assert_eq!((lse.rows(), lse.cols()), (seqs.tokens(), cfg.heads), "attention: lse is [tokens, heads]");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = out.gpu() {
        return cuda::forward(gpu, cfg, seqs, [q, k, v], &out, &lse);
    }
    dispatch!("attention", out.dtype(), T => {
        forward::run::<T>(cfg, seqs, q.host(), k.host(), v.host(), out.host(), lse.host())
    })
}

/// Gradients of [`attention`] from dout = ∂loss/∂out and what the forward pass was given and gave. P is made again from
/// L, block by block, and M from its counters:
/// ```text
/// dV = (P ∘ M)ᵀ dO
/// dP = (dO Vᵀ) ∘ M
/// dS = P ∘ (dP − D)             Dᵢ = Σⱼ Pᵢⱼ dPᵢⱼ = Σ_c dOᵢ_c Oᵢ_c
/// dQ = scale · dS K             dK = scale · dSᵀ Q, summed over the heads of a group, as dV is
/// ```
/// Source: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023, section
/// 3.1.2.
///
/// Shapes as there; dq, dk and dv may be column ranges of one buffer. On CUDA they are f32 or of dout's type. Every
/// element is summed by one task in a fixed order, so that runs are equal to the bit.
///
/// # Errors
/// As there.
///
/// # Panics
/// When the shapes or types do not fit.
#[allow(clippy::too_many_arguments)] // q, k, v, O, L, dO and three gradients: grouping them would only rename them
pub fn attention_backward(
    cfg: &Attention,
    seqs: &Sequences,
    q: Mat,
    k: Mat,
    v: Mat,
    out: Mat,
    lse: Mat,
    dout: Mat,
    dq: Acc,
    dk: Acc,
    dv: Acc,
) -> Result<()> {
    let t = seqs.tokens();
    cfg.check("attention_backward", t, [(q.rows(), q.cols()), (out.rows(), out.cols())], [&k, &v]);
    cfg.check(
        "attention_backward",
        t,
        [(dout.rows(), dout.cols()), (dq.to.rows(), dq.to.cols())],
        [&dk.to.as_mat(), &dv.to.as_mat()],
    );
    assert_eq!((lse.rows(), lse.cols()), (t, cfg.heads), "attention_backward: lse is [tokens, heads]");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dout.gpu() {
        return cuda::backward(gpu, cfg, seqs, [q, k, v], [out, lse, dout], [&dq, &dk, &dv]);
    }
    dispatch!("attention_backward", dout.dtype(), T => {
        let saved = backward::Saved {
            q: q.host::<T>(),
            k: k.host(),
            v: v.host(),
            out: out.host(),
            lse: lse.host(),
            dout: dout.host(),
        };
        backward::run(cfg, seqs, &saved, [(dq.to.host(), dq.beta), (dk.to.host(), dk.beta), (dv.to.host(), dv.beta)])
    })
}

/// Which rows of the pools the sequences of a cache have: what [`attention_cached`] looks at, the same for all layers of a
/// step.
///
/// On a CUDA device the lists are uploaded once per step, into memory that keeps its place while they fit, so that
/// recorded work looks at the newest ones ([`CachedRows::shape`]).
#[derive(Debug)]
pub struct CachedRows {
    rows: Vec<Vec<u32>>,
    new: Vec<usize>,
    #[cfg(feature = "cuda")]
    on_device: Option<cuda::Lists>,
}

impl CachedRows {
    /// No sequences yet, for attention of `cfg.heads / cfg.kv_heads = group` query heads per head of keys.
    pub fn new(device: &Device, group: usize) -> CachedRows {
        #[cfg(not(feature = "cuda"))]
        let _ = (device, group);
        CachedRows {
            rows: Vec::new(),
            new: Vec::new(),
            #[cfg(feature = "cuda")]
            on_device: cuda::Lists::new(device, group),
        }
    }

    /// The sequences of the next step: `rows[s]` names the pool rows of sequence s in order, the `new[s]` new positions last.
    /// Sequences (beams) may share rows.
    ///
    /// # Errors
    /// No memory on the device.
    ///
    /// # Panics
    /// When there is not one number per sequence, or a sequence has fewer rows than new ones.
    pub fn set(&mut self, rows: &[Vec<u32>], new: &[usize]) -> Result<()> {
        assert_eq!(rows.len(), new.len(), "attention_cached: rows and new name the same sequences");
        let part = rows.iter().zip(new).all(|(r, &n)| n <= r.len());
        assert!(part, "attention_cached: the new rows are part of the rows");
        self.rows.resize(rows.len(), Vec::new());
        self.rows.iter_mut().zip(rows).for_each(|(to, from)| to.clone_from(from));
        self.new = new.to_vec();
        #[cfg(feature = "cuda")]
        if let Some(lists) = &mut self.on_device {
            lists.set(rows, new)?;
        }
        Ok(())
    }

    /// What recorded work depends on: after it changed, the work has to be recorded again.
    pub fn shape(&self) -> u64 {
        #[cfg(feature = "cuda")]
        if let Some(lists) = &self.on_device {
            return lists.shape();
        }
        0
    }
}

/// Attention of the newest positions of each sequence over a cache of keys and values.
///
/// k, v: pools of rows [capacity, kv_heads · head_dim], of which `rows` says who has which. q, out:
/// [Σ new, heads · head_dim], `new[s]` rows for sequence s. Query j of n new ones in a sequence of length len sees the first len − n + j + 1 rows. Always causal and
/// without dropout, whatever `cfg` says: a cache serves generation. On CUDA the keys of a sequence with few new queries
/// are split into ranges, whose number depends on nothing but the sequence, so that its results do not change with the
/// batch.
///
/// # Errors
/// As in [`attention`].
///
/// # Panics
/// When the shapes or types do not fit, `rows` was made for another device or number of heads, or a row lies outside the pool.
pub fn attention_cached(cfg: &Attention, q: Mat, k: Mat, v: Mat, rows: &CachedRows, out: MatMut) -> Result<()> {
    let queries = rows.new.iter().sum();
    cfg.check_heads("attention_cached", queries, [(q.rows(), q.cols()), (out.rows(), out.cols())]);
    let kv = (k.rows(), cfg.kv_heads * cfg.head_dim);
    assert_eq!([(k.rows(), k.cols()), (v.rows(), v.cols())], [kv; 2], "attention_cached: k and v are alike");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = out.gpu() {
        return cuda::cached(gpu, cfg, [q, k, v], rows, &out);
    }
    dispatch!("attention_cached", out.dtype(), T => {
        cached::run::<T>(cfg, q.host(), k.host(), v.host(), &rows.rows, &rows.new, out.host())
    })
}

impl Attention {
    fn check_heads(&self, kernel: &str, tokens: usize, q: [(usize, usize); 2]) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{kernel}: {} heads over {} key and value heads",
            self.heads,
            self.kv_heads
        );
        assert_eq!(q, [(tokens, self.heads * self.head_dim); 2], "{kernel}: queries are [tokens, heads·head_dim]");
    }

    fn check(&self, kernel: &str, tokens: usize, q: [(usize, usize); 2], kv: [&Mat; 2]) {
        self.check_heads(kernel, tokens, q);
        let shape = (tokens, self.kv_heads * self.head_dim);
        let kv = kv.map(|m| (m.rows(), m.cols()));
        assert_eq!(kv, [shape; 2], "{kernel}: keys and values are [tokens, kv_heads·head_dim]");
    }

    /// The columns of head `h`, or of key and value head `h`.
    fn head(&self, h: usize) -> Range<usize> {
        h * self.head_dim..(h + 1) * self.head_dim
    }

    /// The key and value head that query head `h` reads.
    fn kv_head(&self, h: usize) -> usize {
        h / (self.heads / self.kv_heads)
    }

    /// The column boundaries of the heads.
    fn head_bounds(&self) -> Vec<usize> {
        (0..=self.heads).map(|h| h * self.head_dim).collect()
    }
}

/// The site of a head's dropout.
fn head_site(d: &Dropout, head: usize) -> u32 {
    d.site.wrapping_add((head as u32) << 16)
}

/// How many tasks of `work` multiply-adds run as one: below some 10 µs, handing a task over costs more than it gives.
fn together(work: usize) -> usize {
    ((1 << 18) / work.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_lie_one_after_the_other() {
        let s = Sequences::new(&[3, 0, 5]);
        assert_eq!((s.len(), s.tokens(), s.max_len()), (3, 8, 5));
        assert_eq!([s.range(0), s.range(1), s.range(2)], [0..3, 3..3, 3..8]);
        let none = Sequences::new(&[]);
        assert_eq!((none.is_empty(), none.tokens(), none.max_len()), (true, 0, 0));
    }

    #[test]
    fn query_heads_share_key_heads_in_groups() {
        let cfg = Attention { heads: 6, kv_heads: 2, head_dim: 4, scale: 1.0, causal: true, dropout: None };
        assert_eq!((0..6).map(|h| cfg.kv_head(h)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1]);
        assert_eq!(cfg.head(2), 8..12);
    }
}
