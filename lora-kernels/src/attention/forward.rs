use rayon::prelude::*;

use super::{Attention, BLOCK, Sequences, head_site, rows, together};
use crate::{
    Buffer, Device, Result,
    dropout::Mask,
    gemm::{self, Part},
    mat::{HostMat, HostMut},
    real::{Real, simd},
};

/// One task per block of queries and head.
pub(super) fn run<T: Real>(
    cfg: &Attention,
    seqs: &Sequences,
    q: HostMat<T>,
    k: HostMat<T>,
    v: HostMat<T>,
    out: HostMut<T>,
    lse: HostMut<T>,
) -> Result<()> {
    let (mut bounds, mut blocks) = (vec![0], Vec::new());
    for s in 0..seqs.len() {
        let seq = seqs.range(s);
        for start in seq.clone().step_by(BLOCK) {
            blocks.push((seq.clone(), start - seq.start));
            bounds.push((start + BLOCK).min(seq.end));
        }
    }
    let longest = seqs.max_len();
    let tall = BLOCK.min(longest);
    let mask = cfg.dropout.map(|d| (d, d.mask::<T>()));
    let outs = out.grid(&bounds, &cfg.head_bounds());
    let lses = lse.grid(&bounds, &(0..=cfg.heads).collect::<Vec<_>>());
    let tasks = together(2 * tall * longest * cfg.head_dim);
    outs.into_par_iter().zip(lses).enumerate().with_min_len(tasks).with_max_len(tasks).try_for_each(
        |(i, (out, mut lse))| {
            let (b, head) = (i / cfg.heads, i % cfg.heads);
            let ((seq, first), kv) = (&blocks[b], cfg.head(cfg.kv_head(head)));
            let block = Block {
                q: q.block(bounds[b]..bounds[b + 1], cfg.head(head)),
                k: k.block(seq.clone(), kv.clone()),
                v: v.block(seq.clone(), kv),
                first: *first,
                causal: cfg.causal,
                scale: cfg.scale,
                dropout: mask
                    .as_ref()
                    .map(|(d, m)| (m, d.row_offset.wrapping_add(bounds[b] as u32), head_site(d, head))),
            };
            // All tasks ask for the same size, so that the pool serves every one of them from the same few blocks.
            let mut p = Buffer::empty(&Device::Cpu, T::DTYPE, tall * longest)?;
            block.run(p.host_mut(), out, |i, v| lse.row_mut(i)[0] = v);
            Ok(())
        },
    )
}

/// A block of queries of one head, at most [`BLOCK`], and the keys and values of their sequence.
pub(super) struct Block<'a, T> {
    pub(super) q: HostMat<'a, T>,
    pub(super) k: HostMat<'a, T>,
    pub(super) v: HostMat<'a, T>,
    /// Position of the first query in its sequence.
    pub(super) first: usize,
    pub(super) causal: bool,
    pub(super) scale: f64,
    /// The mask, the row of the first query in it, and the head's site.
    pub(super) dropout: Option<(&'a Mask<T>, u32, u32)>,
}

impl<T: Real> Block<'_, T> {
    /// Writes the block's output and hands each query's log-sum-exp to `lse`; `p` holds queries × keys.
    pub(super) fn run(&self, p: &mut [T], mut out: HostMut<T>, mut lse: impl FnMut(usize, T)) {
        let m = self.q.rows;
        let n = if self.causal { self.first + m } else { self.k.rows };
        let (k, v) = (self.k.block(0..n, 0..self.k.cols), self.v.block(0..n, 0..self.v.cols));
        let p = &mut p[..m * n];
        let [seen, of_queries] = match self.causal {
            true => [Part::Seen { first: self.first }, Part::OfQueries { first: self.first }],
            false => [Part::All; 2],
        };
        gemm::serial(self.scale, self.q, k.t(), 0.0, HostMut::from_slice(p, m, n), seen);
        // The division by the sum waits for the product with V: head_dim elements rather than all keys.
        let mut inverse = [T::ZERO; BLOCK];
        simd(
            #[inline(always)]
            || {
                for (i, p) in p.chunks_exact_mut(n).enumerate() {
                    let (p, hidden) = p.split_at_mut(if self.causal { self.first + i + 1 } else { n });
                    hidden.fill(T::ZERO);
                    let (max, sum) = rows::exp(p);
                    inverse[i] = T::ONE / sum;
                    lse(i, max + sum.ln());
                    if let Some((mask, row, site)) = self.dropout {
                        rows::drop(mask, row.wrapping_add(i as u32), site, p);
                    }
                }
            },
        );
        gemm::serial(1.0, HostMat::from_slice(p, m, n), v, 0.0, out.reborrow(), of_queries);
        simd(
            #[inline(always)]
            || {
                for (i, &f) in inverse[..m].iter().enumerate() {
                    for o in out.row_mut(i) {
                        *o *= f;
                    }
                }
            },
        );
    }
}
