//! Operations on single elements, and on rows.

use lora_core::ops;
use lora_kernels::Activation;
use ndarray::s;

use crate::{
    common::{NOISE, make_noisy, tensor},
    ops::case::{Case, M, case, ids, numbers},
    ops::oracles::{activated, dropped, layer_norm, loss, loss_of, mixed, rms_norm, times},
};

pub(crate) fn elementwise_cases(all: &mut Vec<Case>) {
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
        "subtract",
        &[("a", &[4, 3]), ("b", &[4, 3])],
        |t, mut v| {
            let a = v.remove(0);
            ops::subtract(t, a, &v[0])
        },
        |m| &m[0] - &m[1],
    ));
    all.push(case(
        "add_bias",
        &[("x", &[4, 3]), ("b", &[3])],
        |t, mut v| {
            let x = v.remove(0);
            ops::add_bias(t, x, &v[0])
        },
        |m| &m[0] + &m[1],
    ));
    for (what, shape) in [("a row", &[1, 3][..]), ("a column", &[3, 1]), ("a vector", &[3])] {
        all.push(case(
            format!("scale_columns by {what}"),
            &[("x", &[4, 3]), ("g", shape)],
            |t, v| ops::scale_columns(t, &v[0], &v[1]),
            |m| &m[0] * &m[1].clone().into_shape_with_order((1, 3)).unwrap(),
        ));
    }
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

pub(crate) fn row_cases(all: &mut Vec<Case>) {
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
        "loss_head beside two products",
        &[("x", &[4, 3]), ("w", &[7, 3]), ("u", &[4, 2]), ("b", &[7, 2]), ("o", &[4, 1]), ("p", &[7, 1])],
        |t, v| {
            let more = [(0.5, 2), (-2.0, 4)];
            let more = more.map(|(factor, i)| ops::BesideHead { factor, x: v[i].share(), w: v[i + 1].share() });
            ops::loss_head_beside(t, &v[0], &v[1], None, &more, &ids(t, &TARGETS), 0.1, 0.25)
        },
        |m| {
            let product = |i: usize| times(m[i].view(), m[i + 1].t());
            loss_of(&(product(0) + product(2) * 0.5 + product(4) * -2.0), &TARGETS, 0.1, 0.25)
        },
    ));
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
/// How far rows, or columns, are from orthonormal.
pub(crate) fn orthogonality_cases(all: &mut Vec<Case>) {
    for (rows, cols, columns) in [(2, 5, false), (5, 3, true), (4, 2, false), (1, 1, true)] {
        let r = if columns { cols } else { rows };
        all.push(case(
            format!("orthogonality of {rows} rows and {cols} columns, columns {columns}"),
            &[("x", &[rows, cols])],
            move |t, v| {
                let identity: Vec<f64> = (0..r * r).map(|i| f64::from(i / r == i % r)).collect();
                let identity = tensor(v[0].value().dtype(), &[r, r], &identity).to_device(&t.device())?;
                ops::orthogonality(t, &v[0], &identity, columns, -1.5)
            },
            move |m| {
                let gram = if columns { m[0].t().dot(&m[0]) } else { m[0].dot(&m[0].t()) };
                let far = (gram - M::eye(r)).mapv(|v| v * v).sum().sqrt();
                M::from_elem((1, 1), -1.5 * far)
            },
        ));
    }
}

pub(crate) fn part_cases(all: &mut Vec<Case>) {
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

pub(crate) fn mix_cases(all: &mut Vec<Case>) {
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
