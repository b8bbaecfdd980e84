//! Attention and what stands around it.

use lora_core::{lowrank::Layout, ops};
use lora_kernels::{Attention, Dropout, Sequences};
use ndarray::s;

use crate::{
    common::{NOISE, make_noisy},
    ops::case::{Case, M, case, ids, numbers},
    ops::oracles::{angle, attention, dropped, layer_norm, linear, roped},
};

pub(crate) const LENGTHS: [usize; 3] = [3, 1, 4];

pub(crate) fn attention_cases(all: &mut Vec<Case>) {
    for causal in [true, false] {
        for kv_heads in [1, 2] {
            for dropout in [false, true] {
                let mask =
                    Dropout { p: 0.3, seed: NOISE.seed, step: NOISE.step, site: 2, row_offset: NOISE.row_offset };
                let dropout = dropout.then_some(mask);
                let cfg = Attention { heads: 2, kv_heads, head_dim: 3, scale: 0.7, causal, dropout };
                all.push(case(
                    format!("attention {cfg:?}"),
                    &[("qkv", &[8, 6 + 6 * kv_heads])],
                    move |t, v| ops::attention(t, cfg, &Sequences::new(&LENGTHS), ops::Qkv::Fused(&v[0])),
                    move |m| attention(&cfg, &LENGTHS, &m[0]),
                ));
                all.push(case(
                    format!("attention of separate projections, {cfg:?}"),
                    &[("q", &[8, 6]), ("k", &[8, 3 * kv_heads]), ("v", &[8, 3 * kv_heads])],
                    move |t, v| {
                        let qkv = ops::Qkv::Separate { q: &v[0], k: &v[1], v: &v[2] };
                        ops::attention(t, cfg, &Sequences::new(&LENGTHS), qkv)
                    },
                    move |m| attention(&cfg, &LENGTHS, &side_by_side(m)),
                ));
            }
        }
    }
    let cfg = Attention { heads: 2, kv_heads: 2, head_dim: 3, scale: 0.7, causal: true, dropout: None };
    all.push(case(
        "attention of x with itself",
        &[("x", &[8, 6])],
        move |t, v| {
            let qkv = ops::Qkv::Separate { q: &v[0], k: &v[0], v: &v[0] };
            ops::attention(t, cfg, &Sequences::new(&LENGTHS), qkv)
        },
        move |m| attention(&cfg, &LENGTHS, &side_by_side(&[m[0].clone(), m[0].clone(), m[0].clone()])),
    ));
    const POSITIONS: [u32; 5] = [0, 1, 6, 2, 6];
    for head_dim in [2, 6] {
        all.push(case(
            format!("rope in heads of {head_dim}"),
            &[("x", &[5, 12])],
            move |t, v| {
                let table = |f: fn(f64) -> f64| {
                    let values = (0..7 * head_dim / 2).map(|i| {
                        let at = angle(i as u32 / (head_dim as u32 / 2), i % (head_dim / 2), head_dim);
                        f64::from(f(at) as f32)
                    });
                    numbers(&v[0], &[7, head_dim / 2], &values.collect::<Vec<_>>())
                };
                ops::rope(t, &v[0], &ids(t, &POSITIONS), &table(f64::cos), &table(f64::sin), head_dim)
            },
            move |m| roped(&m[0], &POSITIONS, head_dim),
        ));
    }
}

pub(crate) fn side_by_side(m: &[M]) -> M {
    ndarray::concatenate![ndarray::Axis(1), m[0], m[1], m[2]]
}

/// A pre-norm block: attention with LoRA on the queries and values of a fused projection, its own residual.
pub(crate) fn block_case(all: &mut Vec<Case>) {
    let cfg = Attention { heads: 2, kv_heads: 2, head_dim: 2, scale: 0.7, causal: true, dropout: None };
    let (s, p) = (0.5, 0.2);
    let parts = [0..4, 8..12];
    let oracle_parts = parts.clone();
    all.push(case(
        "pre-norm block with LoRA",
        &[
            ("h", &[8, 4]),
            ("gamma", &[4]),
            ("beta", &[4]),
            ("w", &[4, 12]),
            ("b", &[12]),
            ("a_q", &[1, 4]),
            ("b_q", &[4, 1]),
            ("a_v", &[1, 4]),
            ("b_v", &[4, 1]),
            ("proj", &[4, 4]),
        ],
        move |t, mut v| {
            make_noisy(t, NOISE);
            let h = v.remove(0);
            let x = ops::layer_norm(t, &h, &v[0], &v[1], 1e-5)?;
            let mut qkv = ops::linear(t, &x, &v[2], Layout::InOut, Some(&v[3]))?;
            let x = ops::dropout(t, x, p)?;
            for (i, cols) in parts.iter().enumerate() {
                let u = ops::linear(t, &x, &v[4 + 2 * i], Layout::OutIn, None)?;
                qkv = ops::linear_onto(t, qkv, cols.clone(), &u, &v[5 + 2 * i], s)?;
            }
            let y = ops::attention(t, cfg, &Sequences::new(&LENGTHS), ops::Qkv::Fused(&qkv))?;
            let y = ops::linear(t, &y, &v[8], Layout::OutIn, None)?;
            let y = ops::dropout(t, y, p)?;
            ops::add(t, h, y)
        },
        move |m| {
            let x = layer_norm(&m[0], &m[1], &m[2], 1e-5);
            let mut qkv = linear(&x, &m[3], Layout::InOut) + &m[4];
            let x = dropped(&x, p, 0);
            for (i, cols) in oracle_parts.iter().enumerate() {
                let u = linear(&x, &m[5 + 2 * i], Layout::OutIn);
                let mut part = qkv.slice_mut(s![.., cols.clone()]);
                part += &(linear(&u, &m[6 + 2 * i], Layout::OutIn) * s);
            }
            let y = linear(&attention(&cfg, &LENGTHS, &qkv), &m[9], Layout::OutIn);
            &m[0] + dropped(&y, p, 1)
        },
    ));
}
