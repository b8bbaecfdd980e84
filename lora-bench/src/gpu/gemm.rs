//! Matrix products against the best that cuBLASLt proposes.

use anyhow::{Result, bail};
use lora_kernels::{
    DType,
    cuda::{GemmEngine, GemmFamily, gemm_by, gemm_engines},
};

use super::{Bench, Measure, Rows, goal};
use crate::report::Row;

/// A product `C = A·B` by one family of our kernels.
#[derive(Clone, Copy)]
struct Product {
    family: GemmFamily,
    dtype: DType,
    /// Whether A is stored as [k, m] and B as [n, k].
    transposed: [bool; 2],
    sizes: [usize; 3],
}

/// How a linear layer's weights are stored in most models: y = x·Wᵀ.
const NT: [bool; 2] = [false, true];
const NN: [bool; 2] = [false, false];
const TN: [bool; 2] = [true, false];

pub(super) fn rows(bench: &Bench) -> Rows {
    use GemmFamily::{Base, Wgmma};
    let product = |family, dtype, transposed, sizes| Product { family, dtype, transposed, sizes };
    let hopper = |sizes| product(Wgmma, DType::Bf16, NT, sizes);
    let mut rows = Vec::new();
    let mut add = |p: Product, goal| {
        let p = Product { sizes: bench.size(p.sizes, toy(p.sizes)), ..p };
        let [m, n, k] = p.sizes;
        let name = match (p.family, p.dtype) {
            (Wgmma, _) => "wgmma bf16",
            (_, DType::F32) => "SIMT f32",
            _ => "mma.sync bf16",
        };
        let layout = ["N", "T"];
        let letters = p.transposed.map(|t| layout[usize::from(t)]).concat();
        let measure: Measure = Box::new(move |bench, row| measure(bench, &p, row));
        rows.push((Row::new(format!("{name} {letters} {m}×{n}×{k}"), "TFLOP/s", goal), measure));
    };
    for n in [4096, 8192] {
        add(hopper([n; 3]), goal(0.90, 1.00));
    }
    let widths = bench.size(&[768, 2304, 3072, 4096, 11008][..], &[768][..]);
    for &k in widths {
        for &n in widths {
            add(hopper([8192, n, k]), goal(0.85, 0.95));
        }
    }
    add(hopper([8191, 50257, 768]), goal(0.75, 0.90));
    for transposed in [NN, TN] {
        add(product(Wgmma, DType::Bf16, transposed, [4096; 3]), None);
    }
    add(product(Base, DType::F32, NT, [4096; 3]), goal(0.80, 0.93));
    add(product(Base, DType::F32, NN, [4096; 3]), goal(0.80, 0.93));
    add(product(Base, DType::F32, NT, [8192, 3072, 768]), goal(0.80, 0.93));
    add(product(Base, DType::Bf16, NT, [4096; 3]), goal(0.50, 0.60));
    add(product(Base, DType::Bf16, NN, [4096; 3]), None);
    add(product(Base, DType::Bf16, NT, [8, 4096, 4096]), None);
    rows
}

/// Sizes for an emulated device, odd where the real ones are.
fn toy(sizes: [usize; 3]) -> [usize; 3] {
    sizes.map(|n| (n / 256).clamp(5, 40) + n % 2)
}

fn measure(bench: &Bench, p: &Product, row: Row) -> Result<Row> {
    let [m, n, k] = p.sizes;
    let stored = |rows, cols, t| if t { [cols, rows] } else { [rows, cols] };
    let ([ar, ac], [br, bc]) = (stored(m, k, p.transposed[0]), stored(k, n, p.transposed[1]));
    let copies = bench.copies((m * k + k * n + m * n) * p.dtype.size());
    let a = bench.normal_copies(copies, p.dtype, ar, ac)?;
    let b = bench.normal_copies(copies, p.dtype, br, bc)?;
    let mut c = bench.results(copies, p.dtype, m, n)?;
    let [ta, tb] = p.transposed;
    let all = gemm_engines(a[0].mat().t_if(ta), b[0].mat().t_if(tb), c[0].make_mut()?)?;
    let wanted = [p.family, GemmFamily::CublasLt];
    let engines: Vec<GemmEngine> = all.into_iter().filter(|e| wanted.contains(&e.family())).collect();
    if !engines.iter().any(|e| e.family() == p.family) {
        return Ok(row.noted("this device has no such kernel for it"));
    }
    let times = bench.medians(engines.len(), &mut |way, copy| {
        let i = copy % copies;
        Ok(gemm_by(engines[way], a[i].mat().t_if(ta), b[i].mat().t_if(tb), c[i].make_mut()?)?)
    });
    // The library may refuse what it proposed, our kernels may not.
    let ours_failed = engines.iter().zip(&times).find_map(|(e, t)| match t {
        Err(why) if e.family() == p.family => Some(format!("{e}: {why}")),
        _ => None,
    });
    if let Some(why) = ours_failed {
        bail!("{why}");
    }
    let best = |of: &dyn Fn(&GemmEngine) -> bool| {
        let timed = engines.iter().zip(&times).filter(|(e, _)| of(e));
        timed.filter_map(|(e, t)| Some((e, t.clone().ok()??))).min_by(|x, y| x.1.total_cmp(&y.1))
    };
    let rate = |seconds: f64| 2.0 * (m * n) as f64 * k as f64 / seconds / 1e12;
    let ours = best(&|e| e.family() == p.family && e.is_candidate());
    let any = best(&|e| e.family() == p.family);
    let library = best(&|e| e.family() == GemmFamily::CublasLt);
    let mut notes: Vec<String> = [ours, library].iter().flatten().map(|(e, _)| e.to_string()).collect();
    match (ours, any) {
        (Some((_, ours)), Some((e, any))) if any < 0.98 * ours => {
            notes.push(format!("{e}, which is not tried, takes {:.2} of the time", any / ours));
        }
        _ => {}
    }
    if !engines.iter().any(|e| e.family() == GemmFamily::CublasLt) {
        notes.push("no cuBLASLt here".into());
    }
    let [ours, reference] = [ours, library].map(|x| x.map(|(_, seconds)| rate(seconds)));
    Ok(Row { ours, reference, note: notes.join("; "), ..row })
}
