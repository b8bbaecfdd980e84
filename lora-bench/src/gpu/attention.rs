//! Attention, for information: nothing that it could be compared with is at hand.

use anyhow::Result;
use lora_kernels::{Acc, Attention, DType, Sequences, attention, attention_backward};

use super::{Bench, Measure, Rows, needed};
use crate::report::Row;

const BF16: DType = DType::Bf16;

/// Sequences of one length.
#[derive(Clone, Copy)]
struct Case {
    sequences: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
    backward: bool,
}

pub(super) fn rows(bench: &Bench) -> Rows {
    let mut rows: Rows = Vec::new();
    for (sequences, length, heads, head_dim) in [(8, 1024, 16, 64), (2, 4096, 32, 128), (64, 64, 16, 64)] {
        for backward in [false, true] {
            let (sequences, length, heads, head_dim) = bench.size((sequences, length, heads, head_dim), (2, 19, 2, 16));
            let case = Case { sequences, length, heads, head_dim, backward };
            let what = format!(
                "causal attention{}, bf16, {sequences}×{length}, {heads} heads of {head_dim}",
                if backward { " backward" } else { "" }
            );
            let measure: Measure = Box::new(move |bench, row| measure(bench, &case, row));
            rows.push((Row::new(what, "TFLOP/s", None), measure));
        }
    }
    rows
}

fn measure(bench: &Bench, case: &Case, row: Row) -> Result<Row> {
    let Case { sequences, length, heads, head_dim, backward } = *case;
    let (tokens, d) = (sequences * length, heads * head_dim);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let cfg = Attention { heads, kv_heads: heads, head_dim, scale, causal: true, dropout: None };
    let seqs = Sequences::new(&vec![length; sequences]);
    let copies = bench.copies(4 * tokens * d * 2);
    let qkv = bench.normal_copies(copies, BF16, tokens, 3 * d)?;
    let dout = bench.normal_copies(copies, BF16, tokens, d)?;
    let mut dqkv = bench.results(copies, BF16, tokens, 3 * d)?;
    let mut out = bench.results(copies, BF16, tokens, d)?;
    let mut lse = bench.results(copies, DType::F32, tokens, heads)?;
    let mut forward = |i: usize| -> Result<()> {
        let [q, k, v] = [0, 1, 2].map(|part| qkv[i].mat().cols_in(part * d..(part + 1) * d));
        Ok(attention(&cfg, &seqs, q, k, v, out[i].make_mut()?, lse[i].make_mut()?)?)
    };
    (0..copies).try_for_each(&mut forward)?;
    let times = match backward {
        false => bench.medians(1, &mut |_, copy| forward(copy % copies)),
        true => bench.medians(1, &mut |_, copy| {
            let i = copy % copies;
            let [q, k, v] = [0, 1, 2].map(|part| qkv[i].mat().cols_in(part * d..(part + 1) * d));
            let (dq, rest) = dqkv[i].make_mut()?.split_cols(d);
            let (dk, dv) = rest.split_cols(d);
            let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta: 0.0 });
            let (out, lse) = (out[i].mat(), lse[i].mat());
            Ok(attention_backward(&cfg, &seqs, q, k, v, out, lse, dout[i].mat(), dq, dk, dv)?)
        }),
    };
    // Two products over half of the keys, five in the backward pass.
    let products = if backward { 5.0 } else { 2.0 };
    let flops = products * 2.0 * (tokens * length * d) as f64 / 2.0;
    Ok(Row { ours: needed(&times[0])?.map(|seconds| flops / seconds / 1e12), ..row })
}
