use rayon::prelude::*;

use super::{Attention, BLOCK, forward::Block, rows, together};
use crate::{
    Buffer, Device, Result,
    mat::{HostMat, HostMut},
    real::{Real, simd},
};

/// From so many queries on, matrix products over gathered rows are faster than dot products with the pool's.
const GATHER: usize = 4;

/// One task per block of queries and head, as in the forward pass.
pub(super) fn run<T: Real>(
    cfg: &Attention,
    q: HostMat<T>,
    k: HostMat<T>,
    v: HostMat<T>,
    pool_rows: &[Vec<u32>],
    new: &[usize],
    out: HostMut<T>,
) -> Result<()> {
    // Per block: the pool's rows of its sequence and the position of its first query there.
    let (mut bounds, mut blocks, mut start) = (vec![0], Vec::new(), 0);
    for (rows, &new) in pool_rows.iter().zip(new) {
        for done in (0..new).step_by(BLOCK) {
            blocks.push((&rows[..], rows.len() - new + done));
            bounds.push(start + (done + BLOCK).min(new));
        }
        start += new;
    }
    let longest = pool_rows.iter().map(|r| r.len()).max().unwrap_or(0);
    let tall = new.iter().copied().max().unwrap_or(0).min(BLOCK);
    let gathered = if tall < GATHER { 0 } else { longest * cfg.head_dim };
    let tasks = together(2 * tall * longest * cfg.head_dim);
    let outs = out.grid(&bounds, &cfg.head_bounds());
    outs.into_par_iter().enumerate().with_min_len(tasks).with_max_len(tasks).try_for_each(|(i, mut out)| {
        let (b, head) = (i / cfg.heads, i % cfg.heads);
        let ((rows, first), kv) = (blocks[b], cfg.head(cfg.kv_head(head)));
        let q = q.block(bounds[b]..bounds[b + 1], cfg.head(head));
        let (k, v) = (k.block(0..k.rows, kv.clone()), v.block(0..v.rows, kv));
        let rows = &rows[..first + q.rows];
        let mut scratch = Buffer::empty(&Device::Cpu, T::DTYPE, tall * longest + 2 * gathered)?;
        let (p, copies) = scratch.host_mut().split_at_mut(tall * longest);
        if q.rows < GATHER {
            simd(
                #[inline(always)]
                || {
                    for j in 0..q.rows {
                        attend(cfg.scale, q.row(j), k, v, &rows[..first + j + 1], p, out.row_mut(j));
                    }
                },
            );
            return Ok(());
        }
        let (keys, values) = copies.split_at_mut(gathered);
        for (pool, copy) in [(k, &mut *keys), (v, &mut *values)] {
            for (&r, copy) in rows.iter().zip(copy.chunks_exact_mut(cfg.head_dim)) {
                copy.copy_from_slice(pool.row(r as usize));
            }
        }
        let block = Block {
            q,
            k: HostMat::from_slice(keys, rows.len(), cfg.head_dim),
            v: HostMat::from_slice(values, rows.len(), cfg.head_dim),
            first,
            causal: true,
            scale: cfg.scale,
            dropout: None,
        };
        block.run(p, out, |_, _| ());
        Ok(())
    })
}

/// One query over these rows of the pool.
#[inline(always)]
fn attend<T: Real>(scale: f64, q: &[T], k: HostMat<T>, v: HostMat<T>, pool_rows: &[u32], p: &mut [T], out: &mut [T]) {
    let (scale, p) = (T::of(scale), &mut p[..pool_rows.len()]);
    for (p, &r) in p.iter_mut().zip(pool_rows) {
        *p = scale * rows::dot(q, k.row(r as usize));
    }
    let (_, sum) = rows::exp(p);
    let inverse = T::ONE / sum;
    out.fill(T::ZERO);
    for (&p, &r) in p.iter().zip(pool_rows) {
        for (o, &v) in out.iter_mut().zip(v.row(r as usize)) {
            *o = p.mul_add(v, *o);
        }
    }
    for o in out {
        *o *= inverse;
    }
}
