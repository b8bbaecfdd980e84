use std::ops::Range;

use rayon::prelude::*;

use super::{Disentangled, Inputs, positions::Rows};
use crate::{
    Buffer, Device, Result,
    attention::{Sequences, head_site, rows, together},
    gemm::{self, Part},
    mat::{HostMat, HostMut},
    real::{Real, simd},
};

/// One task per sequence and head.
pub(super) fn run<T: Real>(
    cfg: &Disentangled,
    seqs: &Sequences,
    x: &Inputs<T>,
    out: HostMut<T>,
    lse: HostMut<T>,
) -> Result<()> {
    let bounds: Vec<usize> = (0..seqs.len()).map(|s| seqs.range(s).start).chain([seqs.tokens()]).collect();
    let heads = |width: usize| (0..=cfg.heads).map(|h| h * width).collect::<Vec<_>>();
    let longest = seqs.max_len();
    let positions = Rows::new(cfg.positions, longest);
    let (scores, table) = cfg.scratch(longest);
    let mask = cfg.dropout.map(|d| (d, d.mask::<T>()));
    let tasks = together(4 * longest * longest * cfg.head_dim);
    let outs = out.grid(&bounds, &heads(cfg.head_dim)).into_par_iter().zip(lse.grid(&bounds, &heads(1)));
    outs.enumerate().with_min_len(tasks).with_max_len(tasks).try_for_each(|(i, (mut out, mut lse))| {
        let (seq, head) = (seqs.range(i / cfg.heads), i % cfg.heads);
        if seq.is_empty() {
            return Ok(());
        }
        let (n, start) = (seq.len(), seq.start);
        let mut scratch = Buffer::empty(&Device::Cpu, T::DTYPE, scores + table)?;
        let (p, table) = scratch.host_mut::<T>().split_at_mut(scores);
        let p = &mut p[..n * n];
        let part = x.part(cfg, &positions, seq, head);
        part.scores(cfg.scale, &positions, p, table);
        simd(
            #[inline(always)]
            || {
                for (i, p) in p.chunks_exact_mut(n).enumerate() {
                    let (max, sum) = rows::exp(p);
                    lse.row_mut(i)[0] = max + sum.ln();
                    if let Some((d, mask)) = &mask {
                        rows::drop(mask, d.row_offset.wrapping_add((start + i) as u32), head_site(d, head), p);
                    }
                    let inverse = T::ONE / sum;
                    p.iter_mut().for_each(|p| *p *= inverse);
                }
            },
        );
        gemm::serial(1.0, HostMat::from_slice(p, n, n), part.v, 0.0, out.reborrow(), Part::All);
        Ok(())
    })
}

impl<'a, T: Real> Inputs<'a, T> {
    /// What one sequence and head reads. Of the tables the rows that its distances have.
    pub(super) fn part(&self, cfg: &Disentangled, positions: &Rows, seq: Range<usize>, head: usize) -> Inputs<'a, T> {
        let cols = head * cfg.head_dim..(head + 1) * cfg.head_dim;
        let used = positions.used(seq.len());
        let table = |m: &HostMat<'a, T>| m.block(used.clone(), cols.clone());
        Inputs {
            q: self.q.block(seq.clone(), cols.clone()),
            k: self.k.block(seq.clone(), cols.clone()),
            v: self.v.block(seq.clone(), cols.clone()),
            pos_key: self.pos_key.as_ref().map(table),
            pos_query: self.pos_query.as_ref().map(table),
        }
    }

    /// S of one sequence and head. `scratch` holds tokens × rows of a table.
    pub(super) fn scores(&self, scale: f64, positions: &Rows, s: &mut [T], scratch: &mut [T]) {
        let n = self.q.rows;
        let first = positions.used(n).start;
        gemm::serial(scale, self.q, self.k.t(), 0.0, HostMut::from_slice(s, n, n), Part::All);
        // Row i of Q·K̂ᵀ has what query i adds; row j of K·Q̂ᵀ what is added at key j.
        if let Some(table) = self.pos_key {
            let c = &mut scratch[..n * table.rows];
            gemm::serial(scale, self.q, table.t(), 0.0, HostMut::from_slice(c, n, table.rows), Part::All);
            for (i, (s, c)) in s.chunks_exact_mut(n).zip(c.chunks_exact(table.rows)).enumerate() {
                for (s, &row) in s.iter_mut().zip(positions.of(i, n)) {
                    *s += c[row as usize - first];
                }
            }
        }
        if let Some(table) = self.pos_query {
            let b = &mut scratch[..n * table.rows];
            gemm::serial(scale, self.k, table.t(), 0.0, HostMut::from_slice(b, n, table.rows), Part::All);
            for (i, s) in s.chunks_exact_mut(n).enumerate() {
                for ((s, &row), b) in s.iter_mut().zip(positions.of(i, n)).zip(b.chunks_exact(table.rows)) {
                    *s += b[row as usize - first];
                }
            }
        }
    }
}
