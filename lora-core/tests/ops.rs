//! Every operation, by table: gradients against finite differences in f64, values against plain loops in f64, for every
//! choice of what is trainable.

mod common;

use common::{NOISE, make_noisy, random, relative, tensor};
use lora_core::{Grads, Init, Params, ParamsBuilder, Result, Tape, Tensor, Var, gradcheck, lowrank::Layout, ops};
use lora_kernels::{Activation, Attention, DType, Device, Dropout, Sequences, philox};
use ndarray::{Array2, ArrayView2, s};

type M = Array2<f64>;
type Op = dyn Fn(&mut Tape, Vec<Var>) -> Result<Var>;
type Oracle = dyn Fn(&[M]) -> M;

/// One row of the table: an operation on inputs of the given shapes, and the same by plain loops.
struct Case {
    name: String,
    /// Name, shape and range of each input; any of them may train.
    inputs: Vec<(&'static str, Vec<usize>, f32)>,
    op: Box<Op>,
    oracle: Box<Oracle>,
}

fn case(
    name: impl Into<String>,
    inputs: &[(&'static str, &[usize])],
    op: impl Fn(&mut Tape, Vec<Var>) -> Result<Var> + 'static,
    oracle: impl Fn(&[M]) -> M + 'static,
) -> Case {
    let inputs = inputs.iter().map(|&(n, s)| (n, s.to_vec(), 1.0)).collect();
    Case { name: name.into(), inputs, op: Box::new(op), oracle: Box::new(oracle) }
}

// ---- oracles ----

fn times(x: ArrayView2<f64>, y: ArrayView2<f64>) -> M {
    assert_eq!(x.ncols(), y.nrows());
    M::from_shape_fn((x.nrows(), y.ncols()), |(i, j)| (0..x.ncols()).map(|k| x[[i, k]] * y[[k, j]]).sum())
}

fn linear(x: &M, w: &M, layout: Layout) -> M {
    match layout {
        Layout::OutIn => times(x.view(), w.t()),
        Layout::InOut => times(x.view(), w.view()),
    }
}

/// 0 or 1/(1 − p), as the documentation of `Dropout` and `Attention` defines it.
fn factor(p: f64, site: u32, row: usize, col: usize) -> f64 {
    let lanes = philox(NOISE.seed, [(col / 4) as u32, NOISE.row_offset + row as u32, site, NOISE.step]);
    if f64::from(lanes[col % 4]) >= p * 2f64.powi(32) { 1.0 / (1.0 - p) } else { 0.0 }
}

fn dropped(x: &M, p: f64, site: u32) -> M {
    M::from_shape_fn(x.dim(), |(i, j)| x[[i, j]] * factor(p, site, i, j))
}

/// erf x = 2/√π·∫₀ˣ e^(−t²) dt, by Simpson's rule.
fn erf(x: f64) -> f64 {
    let n = 2000;
    let f = |i: usize| (-(x * i as f64 / n as f64).powi(2)).exp();
    let inner: f64 = (1..n).map(|i| f(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (f(0) + inner + f(n)) * x / (3 * n) as f64 * 2.0 / std::f64::consts::PI.sqrt()
}

fn activated(kind: Activation, x: f64) -> f64 {
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

fn layer_norm(x: &M, gamma: &M, beta: &M, eps: f64) -> M {
    let n = x.ncols() as f64;
    M::from_shape_fn(x.dim(), |(i, j)| {
        let row = x.row(i);
        let mean = row.sum() / n;
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        gamma[[0, j]] * (x[[i, j]] - mean) / (var + eps).sqrt() + beta[[0, j]]
    })
}

fn rms_norm(x: &M, gamma: &M, eps: f64) -> M {
    let n = gamma.ncols();
    M::from_shape_fn(x.dim(), |(i, j)| {
        let head = j / n * n;
        let square = (head..head + n).map(|j| x[[i, j]].powi(2)).sum::<f64>() / n as f64;
        gamma[[0, j - head]] * x[[i, j]] / (square + eps).sqrt()
    })
}

fn attention(cfg: &Attention, lengths: &[usize], qkv: &M) -> M {
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
fn angle(position: u32, i: usize, head_dim: usize) -> f64 {
    f64::from(position) * 100f64.powf(-2.0 * i as f64 / head_dim as f64)
}

fn roped(x: &M, positions: &[u32], head_dim: usize) -> M {
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

fn loss(x: &M, w: &M, targets: &[u32], smoothing: f64, scale: f64) -> M {
    loss_of(&times(x.view(), w.t()), targets, smoothing, scale)
}

/// The loss of given logits.
fn loss_of(z: &M, targets: &[u32], smoothing: f64, scale: f64) -> M {
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

// ---- the table ----

/// Ids where the computation lies.
fn ids(t: &Tape, ids: &[u32]) -> Tensor {
    common::ids(ids).to_device(&t.device()).unwrap()
}

/// Numbers that are no input, such as targets, beside x and in the type of sums of its type.
fn numbers(x: &Var, shape: &[usize], values: &[f64]) -> Tensor {
    let x = x.value();
    tensor(DType::F64, shape, values).to_dtype(x.dtype().accumulator()).unwrap().to_device(&x.device()).unwrap()
}

fn linear_cases(all: &mut Vec<Case>) {
    for layout in [Layout::OutIn, Layout::InOut] {
        let w: &[usize] = if layout == Layout::OutIn { &[5, 3] } else { &[3, 5] };
        all.push(case(
            format!("linear {layout:?}"),
            &[("x", &[4, 3]), ("w", w)],
            move |t, v| ops::linear(t, &v[0], &v[1], layout, None),
            move |m| linear(&m[0], &m[1], layout),
        ));
        all.push(case(
            format!("linear {layout:?} with bias"),
            &[("x", &[4, 3]), ("w", w), ("b", &[5])],
            move |t, v| ops::linear(t, &v[0], &v[1], layout, Some(&v[2])),
            move |m| linear(&m[0], &m[1], layout) + &m[2],
        ));
    }
    all.push(case(
        "linear of a batch with three dimensions",
        &[("x", &[2, 2, 3]), ("w", &[5, 3])],
        |t, v| ops::linear(t, &v[0], &v[1], Layout::OutIn, None),
        |m| linear(&m[0], &m[1], Layout::OutIn),
    ));
    all.push(case(
        "linear of x with itself",
        &[("x", &[4, 3])],
        |t, v| ops::linear(t, &v[0], &v[0], Layout::OutIn, None),
        |m| linear(&m[0], &m[0], Layout::OutIn),
    ));
    for cols in [0..7, 0..3, 2..5, 6..7] {
        let w = [cols.len(), 3];
        let (c1, c2) = (cols.clone(), cols.clone());
        all.push(case(
            format!("linear_onto columns {cols:?}"),
            &[("y", &[4, 7]), ("x", &[4, 3]), ("w", &w)],
            move |t, mut v| ops::linear_onto(t, v.remove(0), c1.clone(), &v[0], &v[1], -1.5),
            move |m| {
                let mut y = m[0].clone();
                let mut part = y.slice_mut(s![.., c2.clone()]);
                part += &(linear(&m[1], &m[2], Layout::OutIn) * -1.5);
                y
            },
        ));
    }
    all.push(case(
        "linear_onto twice, on overlapping columns, of y itself and of x",
        &[("y", &[4, 5]), ("x", &[4, 3]), ("v", &[2, 5]), ("w", &[3, 3])],
        |t, mut v| {
            let y = v.remove(0);
            let was = y.share();
            let y = ops::linear_onto(t, y, 1..3, &was, &v[1], 0.5)?;
            ops::linear_onto(t, y, 2..5, &v[0], &v[2], 2.0)
        },
        |m| {
            let mut y = m[0].clone();
            let mut part = y.slice_mut(s![.., 1..3]);
            part += &(linear(&m[0], &m[2], Layout::OutIn) * 0.5);
            let mut part = y.slice_mut(s![.., 2..5]);
            part += &(linear(&m[1], &m[3], Layout::OutIn) * 2.0);
            y
        },
    ));
    all.push(case(
        "linear_onto a y that is used again",
        &[("y", &[4, 3]), ("x", &[4, 2]), ("w", &[3, 2])],
        |t, mut v| {
            let y = v.remove(0);
            let other = y.share();
            let y = ops::linear_onto(t, y, 0..3, &v[0], &v[1], 1.0)?;
            let z = ops::activation(t, Activation::Tanh, &other)?;
            ops::add(t, y, z)
        },
        |m| &m[0] + linear(&m[1], &m[2], Layout::OutIn) + m[0].mapv(f64::tanh),
    ));
}

/// A projection with low-rank updates of some of its columns, in one operation and by plain loops.
fn lora_cases(all: &mut Vec<Case>) {
    let s = -1.5;
    for layout in [Layout::OutIn, Layout::InOut] {
        let w: &[usize] = if layout == Layout::OutIn { &[7, 3] } else { &[3, 7] };
        for parts in [&[(0..7, 2)][..], &[(2..5, 1)], &[(0..2, 1), (2..4, 2), (6..7, 1)]] {
            for bias in [false, true] {
                let names = [("a_0", "b_0"), ("a_1", "b_1"), ("a_2", "b_2")];
                let shapes: Vec<_> = parts.iter().map(|(cols, r)| ([*r, 3], [cols.len(), *r])).collect();
                let mut inputs: Vec<(&'static str, &[usize])> = vec![("x", &[4, 3]), ("w", w)];
                for ((a, b), (a_shape, b_shape)) in names.into_iter().zip(&shapes) {
                    inputs.extend([(a, &a_shape[..]), (b, &b_shape[..])]);
                }
                if bias {
                    inputs.push(("bias", &[7]));
                }
                let (op_parts, oracle_parts) = (parts.to_vec(), parts.to_vec());
                all.push(case(
                    format!("lora_linear {layout:?} {parts:?}, bias {bias}"),
                    &inputs,
                    move |t, v| {
                        let mut v = v.into_iter();
                        let (x, w) = (v.next().unwrap(), v.next().unwrap());
                        let part = |(cols, _): &(std::ops::Range<usize>, usize)| ops::LoraPart {
                            cols: cols.clone(),
                            a: v.next().unwrap(),
                            b: v.next().unwrap(),
                        };
                        let parts: Vec<_> = op_parts.iter().map(part).collect();
                        ops::lora_linear(t, &x, &w, layout, v.next().as_ref(), &parts, s)
                    },
                    move |m| {
                        let mut y = linear(&m[0], &m[1], layout);
                        for (i, (cols, _)) in oracle_parts.iter().enumerate() {
                            let u = linear(&m[0], &m[2 + 2 * i], Layout::OutIn);
                            let mut part = y.slice_mut(s![.., cols.clone()]);
                            part += &(linear(&u, &m[3 + 2 * i], Layout::OutIn) * s);
                        }
                        if bias { y + &m[2 + 2 * oracle_parts.len()] } else { y }
                    },
                ));
            }
        }
    }
    all.push(case(
        "lora_linear of a batch with three dimensions, whose parts share A",
        &[("x", &[2, 2, 3]), ("w", &[5, 3]), ("a", &[2, 3]), ("b", &[2, 2])],
        move |t, v| {
            let part = |cols| ops::LoraPart { cols, a: v[2].share(), b: v[3].share() };
            ops::lora_linear(t, &v[0], &v[1], Layout::OutIn, None, &[part(0..2), part(3..5)], s)
        },
        move |m| {
            let mut y = linear(&m[0], &m[1], Layout::OutIn);
            let update = linear(&linear(&m[0], &m[2], Layout::OutIn), &m[3], Layout::OutIn) * s;
            for cols in [0..2, 3..5] {
                let mut part = y.slice_mut(s![.., cols]);
                part += &update;
            }
            y
        },
    ));
}

fn elementwise_cases(all: &mut Vec<Case>) {
    all.push(case(
        "add",
        &[("a", &[4, 3]), ("b", &[4, 3])],
        |t, mut v| {
            let b = v.remove(1);
            ops::add(t, v.remove(0), b)
        },
        |m| &m[0] + &m[1],
    ));
    all.push(case(
        "a + a",
        &[("a", &[4, 3])],
        |t, mut v| {
            let a = v.remove(0);
            let b = a.share();
            ops::add(t, a, b)
        },
        |m| &m[0] * 2.0,
    ));
    all.push(case(
        "a residual stream used twice",
        &[("h", &[4, 3])],
        |t, mut v| {
            let h = v.remove(0);
            let y = ops::activation(t, Activation::GeluTanh, &h)?;
            let h = ops::add(t, h, y)?;
            let y = ops::activation(t, Activation::Silu, &h)?;
            ops::add(t, h, y)
        },
        |m| {
            let h = m[0].mapv(|x| x + activated(Activation::GeluTanh, x));
            h.mapv(|x| x + activated(Activation::Silu, x))
        },
    ));
    for kind in [Activation::GeluTanh, Activation::GeluErf, Activation::Relu, Activation::Silu, Activation::Tanh] {
        let mut c = case(
            format!("{kind:?}"),
            &[("x", &[5, 7])],
            move |t, v| ops::activation(t, kind, &v[0]),
            move |m| m[0].mapv(|x| activated(kind, x)),
        );
        c.inputs[0].2 = 3.0;
        all.push(c);
    }
    let mut c = case(
        "silu_gate",
        &[("gate", &[5, 7]), ("up", &[5, 7])],
        |t, v| ops::silu_gate(t, &v[0], &v[1]),
        |m| m[0].mapv(|x| activated(Activation::Silu, x)) * &m[1],
    );
    c.inputs[0].2 = 3.0;
    all.push(c);
    all.push(case(
        "silu_gate of x with itself",
        &[("x", &[5, 7])],
        |t, v| ops::silu_gate(t, &v[0], &v[0]),
        |m| m[0].mapv(|x| activated(Activation::Silu, x) * x),
    ));
    for p in [0.0, 0.4] {
        all.push(case(
            format!("dropout {p}, the second of the model"),
            &[("x", &[5, 7])],
            move |t, mut v| {
                make_noisy(t, NOISE);
                let x = ops::dropout(t, v.remove(0), 0.0)?;
                ops::dropout(t, x, p)
            },
            move |m| dropped(&m[0], p, 1),
        ));
    }
    all.push(case(
        "dropout outside of training",
        &[("x", &[5, 7])],
        |t, mut v| ops::dropout(t, v.remove(0), 0.4),
        |m| m[0].clone(),
    ));
}

fn row_cases(all: &mut Vec<Case>) {
    all.push(case(
        "layer_norm",
        &[("x", &[4, 5]), ("gamma", &[5]), ("beta", &[5])],
        |t, v| ops::layer_norm(t, &v[0], &v[1], &v[2], 1e-5),
        |m| layer_norm(&m[0], &m[1], &m[2], 1e-5),
    ));
    all.push(case(
        "layer_norm whose γ is its β",
        &[("x", &[4, 5]), ("gamma", &[5])],
        |t, v| ops::layer_norm(t, &v[0], &v[1], &v[1], 1e-5),
        |m| layer_norm(&m[0], &m[1], &m[1], 1e-5),
    ));
    all.push(case(
        "rms_norm",
        &[("x", &[4, 5]), ("gamma", &[5])],
        |t, v| ops::rms_norm(t, &v[0], &v[1], 1e-5),
        |m| rms_norm(&m[0], &m[1], 1e-5),
    ));
    all.push(case(
        "rms_norm of heads",
        &[("x", &[4, 12]), ("gamma", &[4])],
        |t, v| ops::rms_norm(t, &v[0], &v[1], 1e-5),
        |m| rms_norm(&m[0], &m[1], 1e-5),
    ));
    const ROWS: [u32; 6] = [2, 0, 2, 5, 2, 0];
    all.push(case(
        "gather with repeated rows",
        &[("table", &[6, 3])],
        |t, v| ops::gather(t, &v[0], &ids(t, &ROWS)),
        |m| M::from_shape_fn((6, 3), |(i, j)| m[0][[ROWS[i] as usize, j]]),
    ));
    all.push(case(
        "gather of one table twice, added",
        &[("table", &[6, 3])],
        |t, v| {
            let (a, b) = (ops::gather(t, &v[0], &ids(t, &ROWS))?, ops::gather(t, &v[0], &ids(t, &[1; 6]))?);
            ops::add(t, a, b)
        },
        |m| M::from_shape_fn((6, 3), |(i, j)| m[0][[ROWS[i] as usize, j]] + m[0][[1, j]]),
    ));
    const TARGETS: [u32; 4] = [1, 6, 1, 0];
    for smoothing in [0.0, 0.1] {
        for scale in [1.0, 0.25] {
            all.push(case(
                format!("loss_head, smoothing {smoothing}, scale {scale}"),
                &[("x", &[4, 3]), ("w", &[7, 3])],
                move |t, v| ops::loss_head(t, &v[0], &v[1], None, &ids(t, &TARGETS), smoothing, scale),
                move |m| loss(&m[0], &m[1], &TARGETS, smoothing, scale),
            ));
            all.push(case(
                format!("loss_head with a bias, smoothing {smoothing}, scale {scale}"),
                &[("x", &[4, 3]), ("w", &[7, 3]), ("b", &[7])],
                move |t, v| ops::loss_head(t, &v[0], &v[1], Some(&v[2]), &ids(t, &TARGETS), smoothing, scale),
                move |m| loss_of(&(times(m[0].view(), m[1].t()) + &m[2]), &TARGETS, smoothing, scale),
            ));
        }
    }
    all.push(case(
        "loss_head of a tied embedding",
        &[("w", &[7, 3])],
        |t, v| {
            let x = ops::gather(t, &v[0], &ids(t, &[3, 3, 0, 6]))?;
            ops::loss_head(t, &x, &v[0], None, &ids(t, &TARGETS), 0.0, 0.5)
        },
        |m| {
            let x = m[0].select(ndarray::Axis(0), &[3, 3, 0, 6]);
            loss(&x, &m[0], &TARGETS, 0.0, 0.5)
        },
    ));
    const REALS: [f64; 6] = [0.5, -1.25, 3.0, 0.0, -0.75, 2.0];
    for shape in [[6, 1], [2, 3]] {
        all.push(case(
            format!("squared_error of {shape:?}"),
            &[("x", &shape)],
            |t, v| ops::squared_error(t, &v[0], &numbers(&v[0], &[6], &REALS), -0.75),
            |m| {
                let total: f64 = m[0].iter().zip(REALS).map(|(x, y)| (x - y).powi(2)).sum();
                M::from_elem((1, 1), -0.75 * total)
            },
        ));
    }
}

/// Operations that move rows and columns.
fn part_cases(all: &mut Vec<Case>) {
    for (n, m) in [(2, 3), (1, 4)] {
        all.push(case(
            format!("concat_rows of {n} and {m}"),
            &[("a", &[n, 4]), ("b", &[m, 4])],
            |t, v| ops::concat_rows(t, &v[0], &v[1]),
            |m| ndarray::concatenate![ndarray::Axis(0), m[0], m[1]],
        ));
    }
    all.push(case(
        "concat_rows of a with itself, used again",
        &[("a", &[2, 2, 3])],
        |t, mut v| {
            let a = v.remove(0);
            let y = ops::concat_rows(t, &a, &a)?;
            let z = ops::concat_rows(t, &a, &a)?;
            let z = ops::activation(t, Activation::Tanh, &z)?;
            ops::add(t, y, z)
        },
        |m| {
            let y = ndarray::concatenate![ndarray::Axis(0), m[0], m[0]];
            &y + &y.mapv(f64::tanh)
        },
    ));
    for cols in [0..7, 0..3, 2..5, 6..7] {
        let c = cols.clone();
        all.push(case(
            format!("columns {cols:?}"),
            &[("x", &[4, 7])],
            move |t, v| ops::columns(t, &v[0], cols.clone()),
            move |m| m[0].slice(s![.., c.clone()]).to_owned(),
        ));
    }
    all.push(case(
        "overlapping columns of one value, added",
        &[("x", &[4, 7])],
        |t, v| {
            let (a, b) = (ops::columns(t, &v[0], 1..4)?, ops::columns(t, &v[0], 3..6)?);
            let b = ops::activation(t, Activation::Tanh, &b)?;
            ops::add(t, a, b)
        },
        |m| &m[0].slice(s![.., 1..4]) + &m[0].slice(s![.., 3..6]).mapv(f64::tanh),
    ));
}

fn mix_cases(all: &mut Vec<Case>) {
    for many in [2, 3] {
        all.push(case(
            format!("mix of {many} candidates"),
            &[("q", &[4, 5]), ("z", &[4 * many, 5])],
            |t, v| ops::mix(t, &v[0], &v[1]),
            move |m| mixed(&m[0], &m[1]),
        ));
    }
    all.push(case(
        "mix of q with itself and another",
        &[("q", &[4, 5]), ("z", &[4, 5])],
        |t, v| {
            let z = ops::concat_rows(t, &v[0], &v[1])?;
            ops::mix(t, &v[0], &z)
        },
        |m| mixed(&m[0], &ndarray::concatenate![ndarray::Axis(0), m[0], m[1]]),
    ));
}

/// Each row's mean over its candidates, with weights softmax(q·z).
fn mixed(q: &M, z: &M) -> M {
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

const LENGTHS: [usize; 3] = [3, 1, 4];

fn attention_cases(all: &mut Vec<Case>) {
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

fn side_by_side(m: &[M]) -> M {
    ndarray::concatenate![ndarray::Axis(1), m[0], m[1], m[2]]
}

/// A pre-norm block: attention with LoRA on the queries and values of a fused projection, its own residual.
fn block_case(all: &mut Vec<Case>) {
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

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    linear_cases(&mut all);
    lora_cases(&mut all);
    elementwise_cases(&mut all);
    row_cases(&mut all);
    part_cases(&mut all);
    mix_cases(&mut all);
    attention_cases(&mut all);
    block_case(&mut all);
    all
}

// ---- what is done with each row ----

impl Case {
    /// The inputs' values, which f32 holds exactly.
    fn values(&self) -> Vec<Vec<f64>> {
        let len = |shape: &[usize]| shape.iter().product();
        self.inputs.iter().zip(1..).map(|((_, shape, scale), seed)| random(seed, len(shape), *scale)).collect()
    }

    fn expected(&self) -> M {
        let matrix = |(v, (_, shape, _)): (Vec<f64>, &(_, Vec<usize>, _))| {
            let cols = *shape.last().unwrap();
            M::from_shape_vec((v.len() / cols, cols), v).unwrap()
        };
        let inputs: Vec<M> = self.values().into_iter().zip(&self.inputs).map(matrix).collect();
        (self.oracle)(&inputs)
    }

    fn params(&self, dtype: DType, trains: &[bool]) -> Params {
        self.params_on(&Device::Cpu, dtype, trains)
    }

    fn params_on(&self, device: &Device, dtype: DType, trains: &[bool]) -> Params {
        let mut b = ParamsBuilder::new();
        for (((name, shape, _), v), _) in self.inputs.iter().zip(self.values()).zip(trains).filter(|(_, t)| **t) {
            b.add(*name, shape, Init::Copy(tensor(dtype.accumulator(), shape, &v)));
        }
        b.build(device, dtype, 0).unwrap()
    }

    /// The inputs as variables: what trains is a parameter itself, or a value computed from one.
    fn vars(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Vec<Var>> {
        let mut vars = Vec::new();
        let (device, dtype) = (params.device(), params.compute_dtype());
        let place = |v: &[f64], shape: &[usize]| tensor(DType::F64, shape, v).to_dtype(dtype)?.to_device(&device);
        for (((name, shape, _), v), &trains) in self.inputs.iter().zip(self.values()).zip(trains) {
            vars.push(match trains {
                false => t.constant(&place(&v, shape)?),
                true => {
                    let p = t.param(params.find(name).unwrap()).unwrap();
                    match p.slot() {
                        Some(s) if computed => {
                            let copy = place(&p.value().to_f64()?, shape)?;
                            t.record(copy, true, move |dy, g| g.pass(s, dy))
                        }
                        _ => p,
                    }
                }
            });
        }
        Ok(vars)
    }

    fn run(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Var> {
        let vars = self.vars(t, params, trains, computed)?;
        (self.op)(t, vars)
    }

    /// The operation twice on the same variables, added: each gradient has two sources.
    fn run_twice(&self, t: &mut Tape, params: &Params, trains: &[bool], computed: bool) -> Result<Var> {
        let vars = self.vars(t, params, trains, computed)?;
        let again = vars.iter().map(Var::share).collect();
        let y = (self.op)(t, vars)?;
        let z = (self.op)(t, again)?;
        ops::add(t, y, z)
    }
}

/// None, all, each alone, all but each: whatever can be frozen is frozen once.
fn choices(n: usize) -> Vec<Vec<bool>> {
    let mut all = vec![vec![false; n], vec![true; n]];
    for i in 0..n {
        all.push((0..n).map(|j| j == i).collect());
        all.push((0..n).map(|j| j != i).collect());
    }
    all.sort();
    all.dedup();
    all
}

#[test]
fn values_are_those_of_plain_loops() {
    for c in cases() {
        let want = c.expected();
        let want = want.as_slice().unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            let mut first = None;
            for trains in choices(c.inputs.len()) {
                for (record, computed) in [(false, false), (true, false), (true, true)] {
                    let params = c.params(dtype, &trains);
                    let mut t = if record { Tape::new(&params) } else { Tape::inference(&params) };
                    let y = c.run(&mut t, &params, &trains, computed).unwrap();
                    assert_eq!(y.is_tracked(), record && trains.contains(&true), "{}, {trains:?}: tracked", c.name);
                    let y = y.value().to_f64().unwrap();
                    let error = relative(&y, want);
                    assert!(error <= tolerance, "{}, {dtype:?}: off by {error}", c.name);
                    // What trains, and whether it is recorded, changes no bit; nor does a write in place.
                    let first = first.get_or_insert_with(|| y.clone());
                    assert_eq!(&y, first, "{}, {trains:?}", c.name);
                }
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for c in cases() {
        for trains in choices(c.inputs.len()) {
            let params = c.params(DType::F64, &trains);
            for computed in [false, true] {
                let once = gradcheck(&params, |t| c.run(t, &params, &trains, computed)).unwrap();
                let twice = gradcheck(&params, |t| c.run_twice(t, &params, &trains, computed)).unwrap();
                for worst in [once, twice] {
                    let what = format!("{}, {trains:?} trains, computed {computed}: {worst:?}", c.name);
                    assert!(worst.error <= 1e-8, "{what}");
                    assert!(worst.largest > 0.01 || !trains.contains(&true), "{what} checks nothing");
                }
            }
        }
    }
}

/// One operation or several: the same values and the same gradients.
#[test]
fn lora_linear_is_linear_and_linear_onto() {
    let (n, k, out, s) = (6, 5, 8, 0.75);
    let shapes: [(&str, &[usize]); 6] =
        [("x", &[n, k]), ("w", &[k, out]), ("a_0", &[2, k]), ("b_0", &[3, 2]), ("a_1", &[2, k]), ("b_1", &[4, 2])];
    let mut b = ParamsBuilder::new();
    for ((name, shape), seed) in shapes.iter().zip(1..) {
        b.add(*name, shape, Init::Copy(tensor(DType::F64, shape, &random(seed, shape.iter().product(), 1.0))));
    }
    let params = b.build(&Device::Cpu, DType::F64, 0).unwrap();
    let dy = tensor(DType::F64, &[n, out], &random(9, n * out, 1.0));
    let run = |fused: bool| {
        let mut t = Tape::new(&params);
        let mut v = params.ids().map(|id| t.param(id).unwrap()).collect::<Vec<_>>().into_iter();
        let mut next = || v.next().unwrap();
        let (x, w) = (next(), next());
        let parts = [0..3, 4..8].map(|cols| ops::LoraPart { cols, a: next(), b: next() });
        let y = if fused {
            ops::lora_linear(&mut t, &x, &w, Layout::InOut, None, &parts, s).unwrap()
        } else {
            let mut y = ops::linear(&mut t, &x, &w, Layout::InOut, None).unwrap();
            for part in &parts {
                let u = ops::linear(&mut t, &x, &part.a, Layout::OutIn, None).unwrap();
                y = ops::linear_onto(&mut t, y, part.cols.clone(), &u, &part.b, s).unwrap();
            }
            y
        };
        let values = y.value().to_f64().unwrap();
        let mut grads = Grads::new(&params).unwrap();
        t.backward_from(y, dy.clone(), &mut grads).unwrap();
        let gradients = params.ids().flat_map(|id| grads.get(id).unwrap().unwrap().to_f64().unwrap());
        values.into_iter().chain(gradients).collect::<Vec<_>>()
    };
    let error = relative(&run(true), &run(false));
    assert!(error <= 1e-14, "{error}");
}

/// Value and gradients of an operation all of whose inputs train.
#[cfg(feature = "cuda")]
fn value_and_gradients(c: &Case, device: &Device, dtype: DType, computed: bool) -> Vec<(String, Vec<f64>)> {
    let trains = vec![true; c.inputs.len()];
    let params = c.params_on(device, dtype, &trains);
    let mut t = Tape::new(&params);
    let y = c.run(&mut t, &params, &trains, computed).unwrap();
    let mut all = vec![("y".to_owned(), y.value().to_f64().unwrap())];
    let dy = tensor(DType::F64, y.value().shape(), &random(99, y.value().len(), 1.0));
    let dy = dy.to_dtype(y.value().dtype()).unwrap().to_device(device).unwrap();
    let mut grads = Grads::new(&params).unwrap();
    t.backward_from(y, dy, &mut grads).unwrap();
    for id in params.ids() {
        all.push((format!("d{}", params.name(id)), grads.get(id).unwrap().unwrap().to_f64().unwrap()));
    }
    all
}

/// The whole table on every GPU at hand (with their features the emulated device and the first CUDA device), in f32 and in
/// bf16, against the CPU in f64.
#[cfg(feature = "cuda")]
#[test]
fn devices_agree() {
    let gpus = [
        #[cfg(feature = "emulator")]
        lora_kernels::cuda::Gpu::emulated(0),
        lora_kernels::cuda::Gpu::open(0),
    ];
    for gpu in gpus {
        let device = match gpu {
            Ok(gpu) => Device::Cuda(gpu),
            Err(e) => {
                println!("skipped: no CUDA device ({e})");
                continue;
            }
        };
        // Not every kernel reads bf16 and writes the f32 gradient of a parameter: only those that meet one in a model.
        for (dtype, tolerance, ways) in [(DType::F32, 1e-5, &[false, true][..]), (DType::Bf16, 3e-2, &[true])] {
            for c in cases() {
                for &computed in ways {
                    let want = value_and_gradients(&c, &Device::Cpu, DType::F64, computed);
                    let got = value_and_gradients(&c, &device, dtype, computed);
                    for ((name, want), (_, got)) in want.iter().zip(&got) {
                        let error = relative(got, want);
                        assert!(error <= tolerance, "{} in {dtype:?}: {name} off by {error}", c.name);
                    }
                }
            }
        }
    }
}

#[test]
fn operations_leave_their_inputs_as_they_were() {
    for c in cases() {
        for trains in choices(c.inputs.len()) {
            let params = c.params(DType::F32, &trains);
            let before = params.flat().to_f64().unwrap();
            let mut t = Tape::new(&params);
            let shared: Vec<_> =
                c.inputs.iter().zip(c.values()).map(|((_, s, _), v)| tensor(DType::F32, s, &v)).collect();
            let vars = shared.iter().map(|x| t.constant(x)).collect();
            (c.op)(&mut t, vars).unwrap();
            for (x, v) in shared.iter().zip(c.values()) {
                assert_eq!(x.to_f64().unwrap(), v, "{}: an input was written", c.name);
            }
            let y = c.run(&mut t, &params, &trains, false).unwrap();
            assert_eq!(params.flat().to_f64().unwrap(), before, "{}: a parameter was written", c.name);
            drop(y);
        }
    }
}

#[test]
fn the_oracle_of_erf_is_erf() {
    for (x, want) in [(0.0, 0.0f64), (0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (-2.0, -0.9953222650189527)]
    {
        assert!((erf(x) - want).abs() < 1e-10, "erf {x}");
    }
}
