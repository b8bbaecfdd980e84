use std::ops::Range;

use rayon::prelude::*;

use super::{Disentangled, Inputs, positions::Rows};
use crate::{
    Buffer, Device, Result,
    attention::{
        Sequences,
        backward::{dropped_softmax_backward, softmax_backward},
        head_site, rows, together,
    },
    dropout::{CHUNK, Mask},
    gemm::{self, Part},
    mat::{HostMat, HostMut},
    real::{Real, simd},
    reduce::put,
};

/// What the forward pass was given and gave, and the gradient of its result.
pub(super) struct Saved<'a, T> {
    pub(super) x: Inputs<'a, T>,
    pub(super) out: HostMat<'a, T>,
    pub(super) lse: HostMat<'a, T>,
    pub(super) dout: HostMat<'a, T>,
}

/// A gradient, if it is wanted, and its β.
type Grad<'a, T> = Option<(HostMut<'a, T>, f64)>;

/// One task per head and sequence, or per head alone where the gradient of a table is summed over the sequences.
pub(super) fn run<T: Real>(
    cfg: &Disentangled,
    seqs: &Sequences,
    saved: &Saved<T>,
    [dq, dk, dv, dpos_key, dpos_query]: [Grad<T>; 5],
) -> Result<()> {
    if [&dq, &dk, &dv, &dpos_key, &dpos_query].iter().all(|g| g.is_none()) {
        return Ok(());
    }
    let summed = dpos_key.is_some() || dpos_query.is_some();
    // The sequences of the tasks, and their tokens.
    let groups: Vec<usize> = if summed { vec![0, seqs.len()] } else { (0..=seqs.len()).collect() };
    let bounds: Vec<usize> =
        groups.iter().map(|&s| if s < seqs.len() { seqs.range(s).start } else { seqs.tokens() }).collect();
    let tables = [0, 2 * cfg.positions.span()];
    let (longest, count) = (seqs.max_len(), (groups.len() - 1) * cfg.heads);
    let positions = Rows::new(cfg.positions, longest);
    let mask = cfg.dropout.map(|d| d.mask::<T>());
    let (scores, table) = cfg.scratch(longest);
    let cut = |g, rows| cut(g, rows, cfg, count);
    let grads = cut(dq, &bounds).into_par_iter().zip(cut(dk, &bounds)).zip(cut(dv, &bounds));
    let grads = grads.zip(cut(dpos_key, &tables)).zip(cut(dpos_query, &tables));
    let tasks = together(8 * longest * longest * cfg.head_dim);
    grads.enumerate().with_min_len(tasks).with_max_len(tasks).try_for_each(
        |(i, ((((dq, dk), dv), dpos_key), dpos_query))| {
            let (group, head) = (i / cfg.heads, i % cfg.heads);
            let mut scratch = Buffer::empty(&Device::Cpu, T::DTYPE, 2 * scores + table)?;
            let (p, rest) = scratch.host_mut::<T>().split_at_mut(scores);
            let (ds, table) = rest.split_at_mut(scores);
            let mut task = Task {
                cfg,
                saved,
                positions: &positions,
                mask: mask.as_ref(),
                head,
                origin: bounds[group],
                p,
                ds,
                table,
                dq,
                dk,
                dv,
                dpos_key: dpos_key.map(begun),
                dpos_query: dpos_query.map(begun),
            };
            for s in groups[group]..groups[group + 1] {
                task.run(seqs.range(s));
            }
            Ok(())
        },
    )
}

/// The parts of a gradient that the tasks write.
fn cut<'a, T: Real>(g: Grad<'a, T>, rows: &[usize], cfg: &Disentangled, count: usize) -> Vec<Grad<'a, T>> {
    let cols: Vec<usize> = (0..=cfg.heads).map(|h| h * cfg.head_dim).collect();
    match g {
        Some((g, beta)) => g.grid(rows, &cols).into_iter().map(|part| Some((part, beta))).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// The gradient of a table after its β: from here on everything is added.
fn begun<T: Real>((mut g, beta): (HostMut<T>, f64)) -> HostMut<T> {
    if beta != 1.0 {
        for r in 0..g.rows {
            put(g.row_mut(r), T::of(beta), |_| T::ZERO);
        }
    }
    g
}

struct Task<'a, T> {
    cfg: &'a Disentangled,
    saved: &'a Saved<'a, T>,
    positions: &'a Rows,
    mask: Option<&'a Mask<T>>,
    head: usize,
    /// First token of the task's sequences.
    origin: usize,
    /// Scratch: P and dS of one sequence, and C or B.
    p: &'a mut [T],
    ds: &'a mut [T],
    table: &'a mut [T],
    /// The gradients of the task's sequences, and of its head's columns of the tables.
    dq: Grad<'a, T>,
    dk: Grad<'a, T>,
    dv: Grad<'a, T>,
    dpos_key: Option<HostMut<'a, T>>,
    dpos_query: Option<HostMut<'a, T>>,
}

impl<T: Real> Task<'_, T> {
    fn run(&mut self, seq: Range<usize>) {
        if seq.is_empty() {
            return;
        }
        let (n, hd, scale) = (seq.len(), 0..self.cfg.head_dim, self.cfg.scale);
        let cols = self.head * hd.end..(self.head + 1) * hd.end;
        let mine = seq.start - self.origin..seq.end - self.origin;
        let used = self.positions.used(n);
        let x = self.saved.x.part(self.cfg, self.positions, seq.clone(), self.head);
        let dout = self.saved.dout.block(seq.clone(), cols.clone());
        let scored = self.dq.is_some() || self.dk.is_some() || self.dpos_key.is_some() || self.dpos_query.is_some();

        let p = &mut self.p[..n * n];
        x.scores(scale, self.positions, p, self.table);
        let ds = &mut self.ds[..n * n];
        if scored {
            gemm::serial(1.0, dout, x.v.t(), 0.0, HostMut::from_slice(ds, n, n), Part::All);
        } else {
            ds.fill(T::ZERO); // Nobody reads dS.
        }
        self.softmax(seq, cols);

        let (p, ds) = (HostMat::from_slice(&self.p[..n * n], n, n), HostMat::from_slice(&self.ds[..n * n], n, n));
        if let Some((dv, beta)) = &mut self.dv {
            gemm::serial(1.0, p.t(), dout, *beta, dv.block_mut(mine.clone(), hd.clone()), Part::All);
        }
        if let Some((dq, beta)) = &mut self.dq {
            gemm::serial(scale, ds, x.k, *beta, dq.block_mut(mine.clone(), hd.clone()), Part::All);
        }
        if let Some((dk, beta)) = &mut self.dk {
            gemm::serial(scale, ds.t(), x.q, *beta, dk.block_mut(mine.clone(), hd.clone()), Part::All);
        }
        let (width, first) = (used.len(), used.start);
        if let Some(pos_key) = x.pos_key
            && (self.dq.is_some() || self.dpos_key.is_some())
        {
            let c = &mut self.table[..n * width];
            c.fill(T::ZERO);
            for (i, c) in c.chunks_exact_mut(width).enumerate() {
                for (&ds, &row) in ds.row(i).iter().zip(self.positions.of(i, n)) {
                    c[row as usize - first] += ds;
                }
            }
            let c = HostMat::from_slice(c, n, width);
            if let Some((dq, _)) = &mut self.dq {
                gemm::serial(scale, c, pos_key, 1.0, dq.block_mut(mine.clone(), hd.clone()), Part::All);
            }
            if let Some(d) = &mut self.dpos_key {
                gemm::serial(scale, c.t(), x.q, 1.0, d.block_mut(used.clone(), hd.clone()), Part::All);
            }
        }
        if let Some(pos_query) = x.pos_query
            && (self.dk.is_some() || self.dpos_query.is_some())
        {
            let b = &mut self.table[..n * width];
            b.fill(T::ZERO);
            for i in 0..n {
                for ((&ds, &row), b) in ds.row(i).iter().zip(self.positions.of(i, n)).zip(b.chunks_exact_mut(width)) {
                    b[row as usize - first] += ds;
                }
            }
            let b = HostMat::from_slice(b, n, width);
            if let Some((dk, _)) = &mut self.dk {
                gemm::serial(scale, b, pos_query, 1.0, dk.block_mut(mine, hd.clone()), Part::All);
            }
            if let Some(d) = &mut self.dpos_query {
                gemm::serial(scale, b.t(), x.k, 1.0, d.block_mut(used, hd), Part::All);
            }
        }
    }

    /// From S and dO·Vᵀ of a sequence: P ∘ M and dS.
    fn softmax(&mut self, seq: Range<usize>, cols: Range<usize>) {
        let (n, saved, head) = (seq.len(), self.saved, self.head);
        let (dout, out) = (saved.dout.block(seq.clone(), cols.clone()), saved.out.block(seq.clone(), cols));
        let dropout = self.mask.zip(self.cfg.dropout.as_ref());
        let (p, ds) = (&mut self.p[..n * n], &mut self.ds[..n * n]);
        simd(
            #[inline(always)]
            || {
                for (i, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
                    let token = seq.start + i;
                    let (lse, d) = (saved.lse.row(token)[head], rows::dot(dout.row(i), out.row(i)));
                    let Some((mask, dropout)) = dropout else {
                        softmax_backward(p, ds, lse, d);
                        continue;
                    };
                    let row = dropout.row_offset.wrapping_add(token as u32);
                    let mut factors = [T::ZERO; CHUNK];
                    for (c, (p, ds)) in p.chunks_mut(CHUNK).zip(ds.chunks_mut(CHUNK)).enumerate() {
                        mask.chunk(c * CHUNK, row, head_site(dropout, head), &mut factors);
                        dropped_softmax_backward(p, ds, &mut factors[..p.len()], lse, d);
                    }
                }
            },
        );
    }
}
