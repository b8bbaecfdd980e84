//! What LoRA costs on top of the projection that it adapts.

use anyhow::Result;
use lora_kernels::{
    Acc, DType, LoraPart, gemm, lora_backward_down, lora_backward_input, lora_backward_up, lora_down, lora_forward,
};

use super::{Bench, Measure, Rows, goal, needed};
use crate::report::Row;

pub(super) fn rows(bench: &Bench) -> Rows {
    let mut rows = Vec::new();
    for (width, rank, goal) in [(4096, 16, goal(1.10, 1.06)), (4096, 64, None), (768, 16, None), (768, 64, None)] {
        let [m, d, r] = bench.size([8192, width, rank], [70, 24, 3]);
        let forward: Measure = Box::new(move |bench, row| measure_forward(bench, [m, d, r], row));
        rows.push((Row::new(format!("LoRA forward over x·Wᵀ, bf16, M = {m}, {d}², r {r}"), "ms", goal), forward));
        let backward: Measure = Box::new(move |bench, row| measure_backward(bench, [m, d, r], row));
        rows.push((Row::new(format!("LoRA backward over dy·W, bf16, M = {m}, {d}², r {r}"), "ms", None), backward));
    }
    rows
}

const BF16: DType = DType::Bf16;

/// Time with LoRA, and without.
fn over(times: &[std::result::Result<Option<f64>, String>], row: Row) -> Result<Row> {
    let ms = |way: usize| Ok::<_, anyhow::Error>(needed(&times[way])?.map(|t| t * 1e3));
    Ok(Row { ours: ms(1)?, reference: ms(0)?, ..row })
}

fn measure_forward(bench: &Bench, [m, d, r]: [usize; 3], row: Row) -> Result<Row> {
    let copies = bench.copies((2 * m * d + d * d) * 2);
    let of = |rows, cols| bench.normal_copies(copies, BF16, rows, cols);
    let (x, w, a, b) = (of(m, d)?, of(d, d)?, of(r, d)?, of(d, r)?);
    let (mut h, mut y) = (bench.results(copies, BF16, m, r)?, bench.results(copies, BF16, m, d)?);
    let times = bench.medians(2, &mut |way, copy| {
        let i = copy % copies;
        if way == 0 {
            return Ok(gemm(1.0, x[i].mat(), w[i].t(), 0.0, y[i].make_mut()?)?);
        }
        lora_down(2.0, x[i].mat(), &[a[i].mat()], h[i].make_mut()?)?;
        let part = LoraPart { cols: 0..d, b: b[i].mat() };
        Ok(lora_forward(x[i].mat(), w[i].t(), None, h[i].mat(), &[part], y[i].make_mut()?)?)
    });
    over(&times, row)
}

/// dx, dA and dB against dx alone without LoRA.
fn measure_backward(bench: &Bench, [m, d, r]: [usize; 3], row: Row) -> Result<Row> {
    let copies = bench.copies((2 * m * d + d * d) * 2);
    let of = |rows, cols| bench.normal_copies(copies, BF16, rows, cols);
    let (x, dy, w, a, b, h) = (of(m, d)?, of(m, d)?, of(d, d)?, of(r, d)?, of(d, r)?, of(m, r)?);
    let (mut g, mut dx) = (bench.results(copies, BF16, m, r)?, bench.results(copies, BF16, m, d)?);
    let mut da = bench.results(copies, DType::F32, r, d)?;
    let mut db = bench.results(copies, DType::F32, d, r)?;
    let times = bench.medians(2, &mut |way, copy| {
        let i = copy % copies;
        if way == 0 {
            return Ok(gemm(1.0, dy[i].mat(), w[i].mat(), 0.0, dx[i].make_mut()?)?);
        }
        let part = LoraPart { cols: 0..d, b: b[i].mat() };
        let to_b = Acc { to: db[i].make_mut()?, beta: 0.0 };
        let to_g = Some(g[i].make_mut()?);
        lora_backward_up(2.0, dy[i].mat(), Some(h[i].mat()), &[part], to_g, vec![Some(to_b)])?;
        let to_a = Acc { to: da[i].make_mut()?, beta: 0.0 };
        lora_backward_down(g[i].mat(), x[i].mat(), vec![(0..r, to_a)])?;
        let to_x = Acc { to: dx[i].make_mut()?, beta: 0.0 };
        Ok(lora_backward_input(dy[i].mat(), w[i].t(), g[i].mat(), &[a[i].mat()], to_x)?)
    });
    over(&times, row)
}
