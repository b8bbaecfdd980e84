//! The matrix products of the steps of GPT-2 small, RoBERTa base and SmolLM-135M, 1024 tokens, with weights in f32 and bf16:
//! GFLOP/s and the share of the ceilings measured in the same run.

use std::time::Instant;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use lora_bench::{CEILING, ceiling, median, numbers, typed};
use lora_kernels::{DType, Device, gemm};

const TOKENS: usize = 1024;

/// x [m, k]·W [k, n].
struct Shape {
    name: &'static str,
    sizes: [usize; 3],
    /// Whether x is stored [k, m], and W [n, k].
    transposed: [bool; 2],
    /// Whether W is a weight that does not train, and so may be bf16.
    frozen: bool,
}

/// A product with a frozen weight.
const fn frozen(name: &'static str, sizes: [usize; 3], transposed: bool) -> Shape {
    Shape { name, sizes, transposed: [false, transposed], frozen: true }
}

/// A product with what trains.
const fn trained(name: &'static str, sizes: [usize; 3], transposed: [bool; 2]) -> Shape {
    Shape { name, sizes, transposed, frozen: false }
}

const SHAPES: &[Shape] = &[
    frozen("c_attn", [TOKENS, 768, 2304], false),
    frozen("attn.c_proj", [TOKENS, 768, 768], false),
    frozen("c_fc", [TOKENS, 768, 3072], false),
    frozen("mlp.c_proj", [TOKENS, 3072, 768], false),
    frozen("c_fc, dx = dy·Wᵀ", [TOKENS, 3072, 768], true),
    frozen("mlp.c_proj, dx = dy·Wᵀ", [TOKENS, 768, 3072], true),
    trained("c_fc, dW = xᵀ·dy", [768, TOKENS, 3072], [true, false]),
    frozen("head, 256 rows", [256, 768, 50257], true),
    frozen("head, dx, 256 rows", [256, 50257, 768], false),
    frozen("RoBERTa query", [TOKENS, 768, 768], true),
    frozen("RoBERTa query, dx = dy·W", [TOKENS, 768, 768], false),
    frozen("RoBERTa intermediate", [TOKENS, 768, 3072], true),
    frozen("RoBERTa output", [TOKENS, 3072, 768], true),
    frozen("RoBERTa output, dx = dy·W", [TOKENS, 768, 3072], false),
    frozen("SmolLM gate", [TOKENS, 576, 1536], true),
    frozen("SmolLM down", [TOKENS, 1536, 576], true),
    frozen("SmolLM k", [TOKENS, 576, 192], true),
    trained("lora A, r 8", [TOKENS, 768, 8], [false, true]),
    trained("lora B, r 8", [TOKENS, 8, 2304], [false, true]),
    trained("dA, r 8", [8, TOKENS, 768], [true, false]),
    frozen("one token, c_fc", [1, 768, 3072], false),
    frozen("one token, head", [1, 768, 50257], true),
    frozen("eight tokens, c_fc", [8, 768, 3072], false),
];

/// Bytes that no cache holds.
const UNCACHED: usize = 256 << 20;

fn gemms(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    group.sample_size(20);
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
        let ceiling = ceiling(dtype, CEILING);
        println!("measured ceiling, {name}: {:.0} GFLOP/s", ceiling / 1e9);
        for shape in SHAPES.iter().filter(|s| s.frozen || dtype == DType::F32) {
            measure(&mut group, (name, dtype), shape, ceiling);
        }
    }
    group.finish();
}

fn measure(group: &mut BenchmarkGroup<WallTime>, (name, dtype): (&str, DType), shape: &Shape, ceiling: f64) {
    let [m, k, n] = shape.sizes;
    let [of_x, of_w] = shape.transposed;
    let stored = |rows, cols, transposed| if transposed { numbers(cols, rows) } else { numbers(rows, cols) };
    // Few rows are bound by reading W, which comes from memory in a model, not from a cache.
    let copies = if shape.frozen && m <= 8 { UNCACHED / (k * n * dtype.size()) + 1 } else { 1 };
    let ws: Vec<_> = (0..copies).map(|_| typed(&stored(k, n, of_w), dtype)).collect();
    let (x, mut y) = (stored(m, k, of_x), numbers(m, n));
    let flops = 2.0 * m as f64 * k as f64 * n as f64;
    group.throughput(Throughput::Elements(flops as u64));
    let mut times = Vec::new();
    group.bench_function(format!("{} {m}×{k}×{n}, {name}", shape.name), |b| {
        b.iter_custom(|rounds| {
            // On a thread of the pool, as training and generation are.
            let all = Device::Cpu.run(|| {
                let start = Instant::now();
                for i in 0..rounds as usize {
                    let w = ws[i % copies].mat().t_if(of_w);
                    gemm(1.0, x.mat().t_if(of_x), w, 0.0, y.make_mut().expect("unshared")).expect("types that fit");
                }
                start.elapsed()
            });
            times.push(all.as_secs_f64() / rounds as f64);
            all
        });
    });
    if !times.is_empty() {
        let rate = flops / median(&times);
        println!("{}, {name}: {:.0} GFLOP/s, {:.0}% of the ceiling", shape.name, rate / 1e9, 100.0 * rate / ceiling);
    }
}

criterion_group!(benches, gemms);
criterion_main!(benches);
