//! Linear maps, with and without low-rank updates.

use lora_core::{lowrank::Layout, ops};
use lora_kernels::Activation;
use ndarray::{Axis, concatenate, s};

use crate::{
    ops::case::{Case, M, case},
    ops::oracles::linear,
};

pub(crate) fn linear_cases(all: &mut Vec<Case>) {
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
        "linear_wide with bias",
        &[("x", &[4, 3]), ("w", &[5, 3]), ("b", &[5])],
        |t, v| ops::linear_wide(t, &v[0], &v[1], Layout::OutIn, Some(&v[2])),
        |m| linear(&m[0], &m[1], Layout::OutIn) + &m[2],
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

/// Linear maps of blocks of columns, and the two that make a Kronecker product.
pub(crate) fn block_cases(all: &mut Vec<Case>) {
    let mixed = |x: &M, w: &M| {
        let q = x.ncols() / w.ncols();
        M::from_shape_fn((x.nrows(), w.nrows() * q), |(n, c)| {
            (0..w.ncols()).map(|j| w[[c / q, j]] * x[[n, j * q + c % q]]).sum()
        })
    };
    for (m, q, l) in [(3, 2, 5), (1, 4, 3), (4, 1, 1)] {
        let (x, w) = ([4, m * q], [l, m]);
        all.push(case(
            format!("linear_blocks of {m} blocks of {q} columns to {l}"),
            &[("x", &x), ("w", &w)],
            |t, v| ops::linear_blocks(t, &v[0], &v[1]),
            move |m| mixed(&m[0], &m[1]),
        ));
    }
    all.push(case(
        "a Kronecker product, one factor after the other, of x that is used again",
        &[("x", &[4, 6]), ("u", &[5, 3]), ("v", &[3, 2])],
        |t, mut v| {
            let x = v.remove(0);
            let again = x.share();
            let z = ops::linear_blocks(t, &x, &v[0])?;
            let z = ops::reshape(t, z, &[20, 2]);
            let z = ops::linear(t, &z, &v[1], Layout::OutIn, None)?;
            let z = ops::reshape(t, z, &[4, 15]);
            let again = ops::reshape(t, again, &[12, 2]);
            let again = ops::linear(t, &again, &v[1], Layout::OutIn, None)?;
            let again = ops::reshape(t, again, &[4, 9]);
            let z = ops::columns(t, &z, 3..12)?;
            ops::concat_rows(t, &z, &again)
        },
        |m| {
            let kron = |u: &M| M::from_shape_fn((3 * u.nrows(), 6), |(o, i)| u[[o / 3, i / 2]] * m[2][[o % 3, i % 2]]);
            let (z, same) = (m[0].dot(&kron(&m[1]).t()), m[0].dot(&kron(&M::eye(3)).t()));
            concatenate![Axis(0), z.slice(s![.., 3..12]), same]
        },
    ));
}

/// A projection with low-rank updates of some of its columns, in one operation and by plain loops.
pub(crate) fn lora_cases(all: &mut Vec<Case>) {
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
