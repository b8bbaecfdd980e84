//! Operations by plain loops.

use lora_core::lowrank::Layout;
use lora_kernels::{Activation, Attention, philox};
use ndarray::ArrayView2;

use crate::{common::NOISE, ops::case::M};

pub(crate) fn times(x: ArrayView2<f64>, y: ArrayView2<f64>) -> M {
    assert_eq!(x.ncols(), y.nrows());
    M::from_shape_fn((x.nrows(), y.ncols()), |(i, j)| (0..x.ncols()).map(|k| x[[i, k]] * y[[k, j]]).sum())
}

pub(crate) fn linear(x: &M, w: &M, layout: Layout) -> M {
    match layout {
        Layout::OutIn => times(x.view(), w.t()),
        Layout::InOut => times(x.view(), w.view()),
    }
}

/// 0 or 1/(1 − p), as the documentation of `Dropout` and `Attention` defines it.
pub(crate) fn factor(p: f64, site: u32, row: usize, col: usize) -> f64 {
    let lanes = philox(NOISE.seed, [(col / 4) as u32, NOISE.row_offset + row as u32, site, NOISE.step]);
    if f64::from(lanes[col % 4]) >= p * 2f64.powi(32) { 1.0 / (1.0 - p) } else { 0.0 }
}

pub(crate) fn dropped(x: &M, p: f64, site: u32) -> M {
    M::from_shape_fn(x.dim(), |(i, j)| x[[i, j]] * factor(p, site, i, j))
}

/// erf x = 2/√π·∫₀ˣ e^(−t²) dt, by Simpson's rule.
pub(crate) fn erf(x: f64) -> f64 {
    let n = 2000;
    let f = |i: usize| (-(x * i as f64 / n as f64).powi(2)).exp();
    let inner: f64 = (1..n).map(|i| f(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (f(0) + inner + f(n)) * x / (3 * n) as f64 * 2.0 / std::f64::consts::PI.sqrt()
}

pub(crate) fn activated(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::GeluTanh => {
            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::GeluErf => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
    }
}

pub(crate) fn layer_norm(x: &M, gamma: &M, beta: &M, eps: f64) -> M {
    let n = x.ncols() as f64;
    M::from_shape_fn(x.dim(), |(i, j)| {
        let row = x.row(i);
        let mean = row.sum() / n;
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        gamma[[0, j]] * (x[[i, j]] - mean) / (var + eps).sqrt() + beta[[0, j]]
    })
}

pub(crate) fn rms_norm(x: &M, gamma: &M, eps: f64) -> M {
    let n = gamma.ncols();
    M::from_shape_fn(x.dim(), |(i, j)| {
        let head = j / n * n;
        let square = (head..head + n).map(|j| x[[i, j]].powi(2)).sum::<f64>() / n as f64;
        gamma[[0, j - head]] * x[[i, j]] / (square + eps).sqrt()
    })
}

pub(crate) fn attention(cfg: &Attention, lengths: &[usize], qkv: &M) -> M {
    let hd = cfg.head_dim;
    let mut y = M::zeros((qkv.nrows(), cfg.heads * hd));
    let mut start = 0;
    for &n in lengths {
        for h in 0..cfg.heads {
            let g = h / (cfg.heads / cfg.kv_heads);
            let (k0, v0) = ((cfg.heads + g) * hd, (cfg.heads + cfg.kv_heads + g) * hd);
            for i in 0..n {
                let seen = if cfg.causal { i + 1 } else { n };
                let score = |j: usize| -> f64 {
                    let qk = (0..hd).map(|c| qkv[[start + i, h * hd + c]] * qkv[[start + j, k0 + c]]);
                    cfg.scale * qk.sum::<f64>()
                };
                let e: Vec<f64> = (0..seen).map(|j| score(j).exp()).collect();
                let sum: f64 = e.iter().sum();
                for (j, e) in e.iter().enumerate() {
                    let m = cfg.dropout.map_or(1.0, |d| factor(d.p, d.site + ((h as u32) << 16), start + i, j));
                    for c in 0..hd {
                        y[[start + i, h * hd + c]] += e / sum * m * qkv[[start + j, v0 + c]];
                    }
                }
            }
        }
        start += n;
    }
    y
}

/// The angles of the rotary embedding, as Su et al. 2021 have them: position·base^(−2i/head_dim).
pub(crate) fn angle(position: u32, i: usize, head_dim: usize) -> f64 {
    f64::from(position) * 100f64.powf(-2.0 * i as f64 / head_dim as f64)
}

pub(crate) fn roped(x: &M, positions: &[u32], head_dim: usize) -> M {
    let half = head_dim / 2;
    M::from_shape_fn(x.dim(), |(t, j)| {
        let (head, i) = (j / head_dim * head_dim, j % head_dim % half);
        // What the table holds: f32 numbers, so that all types see the same.
        let (sin, cos) = angle(positions[t], i, head_dim).sin_cos();
        let (c, s) = (f64::from(cos as f32), f64::from(sin as f32));
        let (x1, x2) = (x[[t, head + i]], x[[t, head + half + i]]);
        if j % head_dim < half { x1 * c - x2 * s } else { x2 * c + x1 * s }
    })
}

pub(crate) fn loss(x: &M, w: &M, targets: &[u32], smoothing: f64, scale: f64) -> M {
    loss_of(&times(x.view(), w.t()), targets, smoothing, scale)
}

/// The loss of given logits.
pub(crate) fn loss_of(z: &M, targets: &[u32], smoothing: f64, scale: f64) -> M {
    let v = z.ncols() as f64;
    let total: f64 = targets
        .iter()
        .enumerate()
        .map(|(i, &t)| {
            let z = z.row(i);
            let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
            log_sum - (1.0 - smoothing) * z[t as usize] - smoothing * z.sum() / v
        })
        .sum();
    M::from_elem((1, 1), scale * total)
}

/// Each row's mean over its candidates, with weights softmax(q·z).
pub(crate) fn mixed(q: &M, z: &M) -> M {
    let (n, many) = (q.nrows(), z.nrows() / q.nrows());
    let mut y = M::zeros(q.dim());
    for i in 0..n {
        let e: Vec<f64> = (0..many).map(|c| q.row(i).dot(&z.row(c * n + i)).exp()).collect();
        for (c, e_c) in e.iter().enumerate() {
            y.row_mut(i).scaled_add(e_c / e.iter().sum::<f64>(), &z.row(c * n + i));
        }
    }
    y
}

#[test]
fn the_oracle_of_erf_is_erf() {
    for (x, want) in [(0.0, 0.0f64), (0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (-2.0, -0.9953222650189527)]
    {
        assert!((erf(x) - want).abs() < 1e-10, "erf {x}");
    }
}
