use std::ops::Range;

use rayon::prelude::*;

use super::{Attention, BLOCK, Sequences, head_site, rows, together};
use crate::{
    Buffer, Device, Result,
    dropout::{CHUNK, Mask},
    gemm::{self, Part},
    mat::{HostMat, HostMut},
    real::{Real, simd},
};

/// Keys of one step. A multiple of the dropout's four.
const KEYS: usize = 256;

/// What the forward pass was given and gave, and the gradient of its result.
pub(super) struct Saved<'a, T> {
    pub(super) q: HostMat<'a, T>,
    pub(super) k: HostMat<'a, T>,
    pub(super) v: HostMat<'a, T>,
    pub(super) out: HostMat<'a, T>,
    pub(super) lse: HostMat<'a, T>,
    pub(super) dout: HostMat<'a, T>,
}

/// One task per sequence and key head: dK and dV have one writer, which adds in a fixed order.
pub(super) fn run<T: Real>(
    cfg: &Attention,
    seqs: &Sequences,
    saved: &Saved<T>,
    [(dq, beta_q), (dk, beta_k), (dv, beta_v)]: [(HostMut<T>, f64); 3],
) -> Result<()> {
    let group = cfg.heads / cfg.kv_heads;
    let bounds: Vec<usize> = (0..seqs.len()).map(|s| seqs.range(s).start).chain([seqs.tokens()]).collect();
    let cols = |width: usize| (0..=cfg.kv_heads).map(|g| g * width).collect::<Vec<_>>();
    let dqs = dq.grid(&bounds, &cols(group * cfg.head_dim));
    let dks = dk.grid(&bounds, &cols(cfg.head_dim));
    let dvs = dv.grid(&bounds, &cols(cfg.head_dim));
    let mask = cfg.dropout.map(|d| d.mask::<T>());
    let longest = seqs.max_len();
    let scratch = BLOCK.min(longest) * KEYS.min(longest);
    let tasks = together(5 * longest * longest * cfg.head_dim * group);
    let outs = dqs.into_par_iter().zip(dks).zip(dvs);
    outs.enumerate().with_min_len(tasks).with_max_len(tasks).try_for_each(|(i, ((dq, dk), dv))| {
        let (s, kv_head) = (i / cfg.kv_heads, i % cfg.kv_heads);
        let mut p = Buffer::empty(&Device::Cpu, T::DTYPE, 2 * scratch)?;
        let (p, ds) = p.host_mut().split_at_mut(scratch);
        let mut task = Task {
            cfg,
            saved,
            mask: mask.as_ref(),
            start: bounds[s],
            len: seqs.range(s).len(),
            kv_head,
            p,
            ds,
            dq,
            dk,
            dv,
        };
        task.run([beta_q, beta_k, beta_v]);
        Ok(())
    })
}

struct Task<'a, T> {
    cfg: &'a Attention,
    saved: &'a Saved<'a, T>,
    mask: Option<&'a Mask<T>>,
    /// First token of the sequence and number of its tokens.
    start: usize,
    len: usize,
    kv_head: usize,
    /// Scratch: P and dS of queries × keys.
    p: &'a mut [T],
    ds: &'a mut [T],
    /// The gradients of the group's queries and of the key head.
    dq: HostMut<'a, T>,
    dk: HostMut<'a, T>,
    dv: HostMut<'a, T>,
}

impl<'a, T: Real> Task<'a, T> {
    fn run(&mut self, [beta_q, beta_k, beta_v]: [f64; 3]) {
        let (cfg, len) = (self.cfg, self.len);
        let group = cfg.heads / cfg.kv_heads;
        for g in 0..group {
            // From the last block on, which sees all keys: so the first writer of each row of dK and dV is known.
            for q0 in (0..len).step_by(BLOCK).rev() {
                let q1 = (q0 + BLOCK).min(len);
                let seen = if cfg.causal { q1 } else { len };
                let first = g == 0 && q1 == len;
                for k0 in (0..seen).step_by(KEYS) {
                    let betas = [
                        if k0 == 0 { beta_q } else { 1.0 },
                        if first { beta_k } else { 1.0 },
                        if first { beta_v } else { 1.0 },
                    ];
                    self.step(g, q0..q1, k0..(k0 + KEYS).min(seen), betas);
                }
            }
        }
    }

    /// The products of one block of queries with one block of keys.
    fn step(&mut self, g: usize, queries: Range<usize>, keys: Range<usize>, [beta_q, beta_k, beta_v]: [f64; 3]) {
        let (cfg, saved) = (self.cfg, self.saved);
        let head = self.kv_head * (cfg.heads / cfg.kv_heads) + g;
        let token = self.start + queries.start;
        let (m, n) = (queries.len(), keys.len());
        let at = |x: HostMat<'a, T>, r: &Range<usize>, h: usize| {
            x.block(self.start + r.start..self.start + r.end, cfg.head(h))
        };
        let (q, dout, out) =
            (at(saved.q, &queries, head), at(saved.dout, &queries, head), at(saved.out, &queries, head));
        let (k, v) = (at(saved.k, &keys, self.kv_head), at(saved.v, &keys, self.kv_head));

        let (p, ds) = (&mut self.p[..m * n], &mut self.ds[..m * n]);
        let [seen, of_queries, of_keys] = match cfg.causal {
            true => {
                // Not below zero: keys that a block of queries sees begin before it or with it.
                let first = queries.start - keys.start;
                [Part::Seen { first }, Part::OfQueries { first }, Part::OfKeys { first }]
            }
            false => [Part::All; 3],
        };
        gemm::serial(cfg.scale, q, k.t(), 0.0, HostMut::from_slice(p, m, n), seen);
        gemm::serial(1.0, dout, v.t(), 0.0, HostMut::from_slice(ds, m, n), seen);
        let dropout = self.mask.zip(cfg.dropout.as_ref());
        simd(
            #[inline(always)]
            || {
                for (i, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
                    let seen = if cfg.causal { (queries.start + i + 1).saturating_sub(keys.start).min(n) } else { n };
                    p[seen..].fill(T::ZERO);
                    ds[seen..].fill(T::ZERO);
                    let (p, ds) = (&mut p[..seen], &mut ds[..seen]);
                    let (lse, d) = (saved.lse.row(token + i)[head], rows::dot(dout.row(i), out.row(i)));
                    match dropout {
                        None => softmax_backward(p, ds, lse, d),
                        Some((mask, dropout)) => {
                            let row = dropout.row_offset.wrapping_add((token + i) as u32);
                            let mut factors = [T::ZERO; CHUNK];
                            for (c, (p, ds)) in p.chunks_mut(CHUNK).zip(ds.chunks_mut(CHUNK)).enumerate() {
                                mask.chunk(keys.start + c * CHUNK, row, head_site(dropout, head), &mut factors);
                                dropped_softmax_backward(p, ds, &mut factors[..p.len()], lse, d);
                            }
                        }
                    }
                }
            },
        );
        let (p, ds) = (HostMat::from_slice(p, m, n), HostMat::from_slice(ds, m, n));
        let hd = 0..cfg.head_dim;
        gemm::serial(1.0, p.t(), dout, beta_v, self.dv.block_mut(keys.clone(), hd.clone()), of_keys);
        gemm::serial(cfg.scale, ds.t(), q, beta_k, self.dk.block_mut(keys, hd), of_keys);
        gemm::serial(cfg.scale, ds, k, beta_q, self.dq.block_mut(queries, cfg.head(g)), of_queries);
    }
}

/// From S and dP of a row: P into `p`, dS = P ∘ (dP − D) into `ds`.
#[inline(always)]
pub(super) fn softmax_backward<T: Real>(p: &mut [T], ds: &mut [T], lse: T, d: T) {
    rows::lanes(
        [p, ds],
        T::ZERO,
        #[inline(always)]
        |[p, ds]| {
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = (*p - lse).exp();
                *ds = *p * (*ds - d);
            }
        },
    );
}

/// From S and dO·Vᵀ of a row, and its mask's factors: P ∘ M into `p`, dS = P ∘ (dO·Vᵀ ∘ M − D) into `ds`.
#[inline(always)]
pub(super) fn dropped_softmax_backward<T: Real>(p: &mut [T], ds: &mut [T], factors: &mut [T], lse: T, d: T) {
    rows::lanes(
        [p, ds, factors],
        T::ZERO,
        #[inline(always)]
        |[p, ds, factors]| {
            for ((p, ds), &mut f) in p.iter_mut().zip(ds).zip(factors) {
                let e = (*p - lse).exp();
                *ds = e * (*ds * f - d);
                *p = e * f;
            }
        },
    );
}
