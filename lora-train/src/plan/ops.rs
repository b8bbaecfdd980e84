//! The operations of `lora_core::ops` without numbers: what each makes, keeps for its backward (only where a gradient must
//! pass), and makes on the way back. Each follows its namesake line by line.

use super::tape::{Tape, Var, WIDE};

/// A linear map: whether its matrix and its bias train.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub(super) outputs: u128,
    pub(super) w: bool,
    pub(super) b: bool,
}

pub(super) fn linear(t: &mut Tape, x: &Var, map: Map) -> Var {
    let y = t.empty(x.value.rows, map.outputs);
    let dx = x.slot.map(|s| (s, x.value.cols));
    let dw = map.w.then(|| x.value.clone());
    t.record(y, dx.is_some() || dw.is_some() || map.b, move |dy, g| {
        drop(dw);
        if let Some((s, cols)) = dx {
            g.add(s, dy.rows, cols);
        }
    })
}

/// A map with low-rank updates of these ranks beside it.
pub(super) fn lora_linear(t: &mut Tape, x: &Var, map: Map, ranks: u128) -> Var {
    let h = t.empty(x.value.rows, ranks);
    let y = t.empty(x.value.rows, map.outputs);
    let kept = x.value.clone();
    let dx = x.slot.map(|s| (s, x.value.cols));
    t.record(y, true, move |dy, g| {
        let _kept = (kept, h);
        let _back = g.scratch(dy.rows, ranks);
        if let Some((s, cols)) = dx {
            g.add(s, dy.rows, cols);
        }
    })
}

/// The same elements in another shape.
pub(super) fn reshape(t: &mut Tape, x: Var, rows: u128, cols: u128) -> Var {
    let (was, slot) = ([x.value.rows, x.value.cols], x.slot);
    t.record(x.value.reshaped(rows, cols), slot.is_some(), move |dy, g| {
        if let Some(s) = slot {
            g.pass(s, dy.reshaped(was[0], was[1]));
        }
    })
}

/// A map from m blocks of columns to l, whose matrix trains.
pub(super) fn linear_blocks(t: &mut Tape, x: &Var, [l, m]: [u128; 2]) -> Var {
    let (n, cols) = (x.value.rows, x.value.cols);
    let q = cols / m;
    let kept = t.empty(m, n * q);
    let blocks = t.empty(l, n * q);
    let y = t.empty(n, l * q);
    drop(blocks);
    let slot = x.slot;
    t.record(y, true, move |_dy, g| {
        let _dy = g.scratch(l, n * q);
        drop(kept);
        if let Some(s) = slot {
            let _blocks = g.scratch(m, n * q);
            g.add(s, n, cols);
        }
    })
}

/// y[:, some columns] += x·Wᵀ in place, where W may train.
pub(super) fn linear_onto(t: &mut Tape, y: Var, x: &Var, trains: bool) -> Var {
    let Var { mut value, slot } = y;
    value.make_mut(&t.ledger);
    let kept = trains.then(|| x.value.clone());
    let dx = x.slot.map(|s| (s, x.value.cols));
    let tracked = trains || dx.is_some();
    if !tracked {
        return Var { value, slot };
    }
    t.record(value, tracked, move |dy, g| {
        if let Some(s) = slot {
            g.pass(s, dy.clone());
        }
        drop(kept);
        if let Some((s, cols)) = dx {
            g.add(s, dy.rows, cols);
        }
    })
}

/// Rows times the same numbers, which may train.
pub(super) fn scale_columns(t: &mut Tape, x: &Var, trains: bool) -> Var {
    let y = t.empty(x.value.rows, x.value.cols);
    let dx = x.slot.map(|s| (s, x.value.cols));
    let kept = trains.then(|| x.value.clone());
    t.record(y, dx.is_some() || trains, move |dy, g| {
        drop(kept);
        if let Some((s, cols)) = dx {
            g.add(s, dy.rows, cols);
        }
    })
}

pub(super) fn gather(t: &mut Tape, table: &Var, rows: u128) -> Var {
    let y = t.empty(rows, table.value.cols);
    let d = table.slot.map(|s| (s, table.value.rows));
    t.record(y, d.is_some(), move |dy, g| {
        if let Some((s, rows)) = d {
            g.add(s, rows, dy.cols);
        }
    })
}

pub(super) fn add(t: &mut Tape, a: Var, b: Var) -> Var {
    let (a, b) = if b.value.is_unshared() { (b, a) } else { (a, b) };
    let Var { mut value, slot } = a;
    value.make_mut(&t.ledger);
    let (da, db) = (slot, b.slot);
    t.record(value, da.is_some() || db.is_some(), move |dy, g| match (da, db) {
        (Some(a), Some(b)) => {
            g.pass(a, dy.clone());
            g.pass(b, dy);
        }
        (Some(s), None) | (None, Some(s)) => g.pass(s, dy),
        (None, None) => {}
    })
}

pub(super) fn dropout(t: &mut Tape, x: Var, p: f64) -> Var {
    if p == 0.0 {
        return x;
    }
    let y = t.empty(x.value.rows, x.value.cols);
    let slot = x.slot;
    t.record(y, slot.is_some(), move |dy, g| {
        if let Some(s) = slot {
            g.add(s, dy.rows, dy.cols);
        }
    })
}

pub(super) fn activation(t: &mut Tape, x: &Var) -> Var {
    let y = t.empty(x.value.rows, x.value.cols);
    let dx = x.slot.map(|s| (s, x.value.clone()));
    t.record(y, dx.is_some(), move |_dy, g| {
        if let Some((s, x)) = dx {
            g.add(s, x.rows, x.cols);
        }
    })
}

pub(super) fn silu_gate(t: &mut Tape, gate: &Var, up: &Var) -> Var {
    let y = t.empty(gate.value.rows, gate.value.cols);
    let slots = [gate.slot, up.slot];
    let kept = (gate.value.clone(), gate.slot.map(|_| up.value.clone()));
    t.record(y, slots.iter().any(Option::is_some), move |_dy, g| {
        let (rows, cols) = (kept.0.rows, kept.0.cols);
        let open: Vec<_> = slots.into_iter().flatten().map(|s| (s, g.open(s, rows, cols))).collect();
        open.into_iter().for_each(|(s, m)| g.pass(s, m));
        drop(kept);
    })
}

/// LayerNorm with two statistics of each row, or (over `heads` parts of it) RMSNorm with one of each part.
pub(super) fn norm(t: &mut Tape, x: &Var, trains: [bool; 2], statistics: u128) -> Var {
    let y = t.empty(x.value.rows, x.value.cols);
    let kept = (x.value.clone(), t.wide(x.value.rows, statistics));
    let slot = x.slot;
    t.record(y, slot.is_some() || trains[0] || trains[1], move |_dy, g| {
        if let Some(s) = slot {
            g.add(s, kept.0.rows, kept.0.cols);
        }
        drop(kept);
    })
}

/// What attention reads.
pub(super) enum Qkv<'a> {
    Fused(&'a Var),
    Separate([&'a Var; 3]),
}

/// Attention of any kind over q, k and v; the result has `cols` columns. Over relative positions, with their tables and the
/// length of a sequence, it takes whole matrices of scores beside: those of one thread, because every thread takes its own.
pub(super) fn attention(t: &mut Tape, qkv: Qkv, relative: Option<(&[Var], u128)>, cols: u128, heads: u128) -> Var {
    let tables = relative.map_or(&[][..], |(tables, _)| tables);
    let of_scores = relative.and_then(|(tables, n)| Some((n, n * tables.first()?.value.rows.min(2 * n))));
    let read: Vec<&Var> = match qkv {
        Qkv::Fused(qkv) => vec![qkv],
        Qkv::Separate(all) => all.into_iter().chain(tables).collect(),
    };
    let n = read[0].value.rows;
    let y = t.empty(n, cols);
    let lse = t.wide(n, heads);
    drop(of_scores.map(|(n, table)| t.empty(1, n * n + table)));
    let tracked = read.iter().any(|v| v.slot.is_some());
    let kept: Vec<_> = read.iter().map(|v| (v.slot, v.value.clone())).collect();
    let (out, plain) = (y.clone(), tables.is_empty());
    t.record(y, tracked, move |_dy, g| {
        let mut wanted = Vec::new();
        let mut scratch = Vec::new();
        for (slot, x) in &kept {
            match slot {
                Some(s) => wanted.push((*s, g.open(*s, x.rows, x.cols))),
                // The plain kernel makes all three gradients.
                None if plain => scratch.push(g.scratch(x.rows, x.cols)),
                None => {}
            }
        }
        scratch.extend(of_scores.map(|(n, table)| g.scratch(1, 2 * n * n + table)));
        wanted.into_iter().for_each(|(s, m)| g.pass(s, m));
        drop((kept, out, lse, scratch));
    })
}

pub(super) fn rope(t: &mut Tape, x: &Var) -> Var {
    let y = t.empty(x.value.rows, x.value.cols);
    let slot = x.slot;
    t.record(y, slot.is_some(), move |dy, g| {
        if let Some(s) = slot {
            g.add(s, dy.rows, dy.cols);
        }
    })
}

pub(super) fn concat_rows(t: &mut Tape, a: &Var, b: &Var) -> Var {
    let y = t.empty(a.value.rows + b.value.rows, a.value.cols);
    let parts = [(a.slot, a.value.rows), (b.slot, b.value.rows)];
    t.record(y, a.slot.is_some() || b.slot.is_some(), move |dy, g| {
        for (slot, rows) in parts {
            if let Some(s) = slot {
                g.pass(s, dy.rows_in(rows));
            }
        }
    })
}

pub(super) fn columns(t: &mut Tape, x: &Var, cols: u128) -> Var {
    let y = t.empty(x.value.rows, cols);
    let dx = x.slot.map(|s| (s, x.value.rows, x.value.cols));
    t.record(y, dx.is_some(), move |_dy, g| {
        if let Some((s, rows, cols)) = dx {
            g.add(s, rows, cols);
        }
    })
}

pub(super) fn mix(t: &mut Tape, q: &Var, z: &Var) -> Var {
    let n = q.value.rows;
    let y = t.empty(n, q.value.cols);
    let p = t.wide(n, z.value.rows / n.max(1));
    let kept = [(q.slot, q.value.clone()), (z.slot, z.value.clone())];
    t.record(y, kept.iter().any(|k| k.0.is_some()), move |_dy, g| {
        let open: Vec<_> = kept.iter().filter_map(|(s, x)| s.map(|s| (s, g.open(s, x.rows, x.cols)))).collect();
        open.into_iter().for_each(|(s, m)| g.pass(s, m));
        drop((kept, p));
    })
}

/// A convolution over tokens of this width: the tokens unfolded, and a linear map.
pub(super) fn convolution(t: &mut Tape, x: &Var, width: u128, map: Map) -> Var {
    let y = t.empty(x.value.rows, x.value.cols * width);
    let dx = x.slot.map(|s| (s, x.value.rows, x.value.cols));
    let unfolded = t.record(y, dx.is_some(), move |_dy, g| {
        if let Some((s, rows, cols)) = dx {
            g.add(s, rows, cols);
        }
    });
    linear(t, &unfolded, map)
}

/// The head, with the input of what trains beside it, and its loss: `classes` outputs, of which one chunk of rows exists at a time.
pub(super) fn loss_head(t: &mut Tape, x: &Var, beside: Option<&Var>, classes: u128, map: Map) -> Var {
    let (n, d) = (x.value.rows, x.value.cols);
    let losses = t.wide(n, 1);
    let dx = x.slot.map(|s| (s, t.empty(n, d)));
    let du = beside.and_then(|u| Some((u.slot?, t.empty(n, u.value.cols), t.wide(classes, u.value.cols))));
    let dw = map.w.then(|| t.wide(classes, d));
    let db = map.b.then(|| t.wide(1, classes));
    // As `lora_kernels::loss_head` has it: 48 MiB on the CPU, which computes in f32, and 256 MiB on a CUDA device; 192 rows at
    // most where the head trains, or something beside it.
    let narrow = t.size() < WIDE;
    let most: u128 = if narrow { 256 << 20 } else { 48 << 20 };
    let fewer = if !narrow && (dw.is_some() || du.is_some()) { 192 } else { u128::MAX };
    let chunks = n.div_ceil((most / (WIDE * classes)).min(fewer).max(1)).max(1);
    let rows = n.div_ceil(chunks);
    let chunk = t.wide(rows, classes);
    let rounded = (narrow && (dx.is_some() || du.is_some() || dw.is_some())).then(|| t.empty(rows, classes));
    drop((chunk, rounded));
    let loss = t.wide(1, 1);
    drop(losses);
    t.record(loss, dx.is_some() || du.is_some() || dw.is_some() || db.is_some(), move |_dy, g| {
        if let Some((s, du, db)) = du {
            g.pass(s, du);
            drop(db);
        }
        if let Some((s, dx)) = dx {
            g.pass(s, dx);
        }
        drop((dw, db));
    })
}
