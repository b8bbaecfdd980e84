//! The matrix products of the steps of GPT-2 small, RoBERTa base and SmolLM-135M, 1024 tokens, with weights in f32 and bf16:
//! GFLOP/s and the share of the ceilings measured in the same run.

use std::time::Instant;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use lora_bench::{CEILING, bf16, ceiling, ceiling_bf16, median, numbers};
use lora_core::Tensor;
use lora_kernels::gemm;

const TOKENS: usize = 1024;

/// x [m, k]·W [k, n].
struct Shape {
    name: &'static str,
    sizes: [usize; 3],
    /// Whether W is stored [n, k].
    transposed: bool,
    /// Whether W is a weight that does not train, and so may be bf16.
    frozen: bool,
}

const fn shape(name: &'static str, sizes: [usize; 3], transposed: bool, frozen: bool) -> Shape {
    Shape { name, sizes, transposed, frozen }
}

const SHAPES: &[Shape] = &[
    shape("c_attn", [TOKENS, 768, 2304], false, true),
    shape("attn.c_proj", [TOKENS, 768, 768], false, true),
    shape("c_fc", [TOKENS, 768, 3072], false, true),
    shape("mlp.c_proj", [TOKENS, 3072, 768], false, true),
    shape("c_fc, dx = dy·Wᵀ", [TOKENS, 3072, 768], true, true),
    shape("mlp.c_proj, dx = dy·Wᵀ", [TOKENS, 768, 3072], true, true),
    shape("c_fc, dW = xᵀ·dy", [768, TOKENS, 3072], false, false),
    shape("head, 256 rows", [256, 768, 50257], true, true),
    shape("head, dx, 256 rows", [256, 50257, 768], false, true),
    shape("RoBERTa query", [TOKENS, 768, 768], true, true),
    shape("RoBERTa query, dx = dy·W", [TOKENS, 768, 768], false, true),
    shape("RoBERTa intermediate", [TOKENS, 768, 3072], true, true),
    shape("RoBERTa output", [TOKENS, 3072, 768], true, true),
    shape("RoBERTa output, dx = dy·W", [TOKENS, 768, 3072], false, true),
    shape("SmolLM gate", [TOKENS, 576, 1536], true, true),
    shape("SmolLM down", [TOKENS, 1536, 576], true, true),
    shape("SmolLM k", [TOKENS, 576, 192], true, true),
    shape("lora A, r 8", [TOKENS, 768, 8], true, false),
    shape("lora B, r 8", [TOKENS, 8, 2304], true, false),
    shape("dA, r 8", [8, TOKENS, 768], false, false),
    shape("one token, c_fc", [1, 768, 3072], false, true),
    shape("one token, head", [1, 768, 50257], true, true),
    shape("eight tokens, c_fc", [8, 768, 3072], false, true),
];

fn gemms(c: &mut Criterion) {
    let f32 = ceiling(CEILING);
    println!("measured ceiling, f32: {:.0} GFLOP/s", f32 / 1e9);
    let mut group = c.benchmark_group("gemm");
    group.sample_size(20);
    for shape in SHAPES {
        measure(&mut group, "f32", shape, &shape.w(), f32);
    }
    match ceiling_bf16(CEILING) {
        Some(ceiling) => {
            println!("measured ceiling, bf16: {:.0} GFLOP/s", ceiling / 1e9);
            for shape in SHAPES.iter().filter(|s| s.frozen) {
                measure(&mut group, "bf16", shape, &bf16(&shape.w()).expect("bf16"), ceiling);
            }
        }
        None => println!("bf16: no products with it on the CPU"),
    }
    group.finish();
}

impl Shape {
    fn w(&self) -> Tensor {
        let [_, k, n] = self.sizes;
        if self.transposed { numbers(n, k) } else { numbers(k, n) }
    }
}

fn measure(group: &mut BenchmarkGroup<WallTime>, dtype: &str, shape: &Shape, w: &Tensor, ceiling: f64) {
    let [m, k, n] = shape.sizes;
    let (x, mut y) = (numbers(m, k), numbers(m, n));
    let flops = 2.0 * m as f64 * k as f64 * n as f64;
    group.throughput(Throughput::Elements(flops as u64));
    let mut times = Vec::new();
    group.bench_function(format!("{} {m}×{k}×{n}, {dtype}", shape.name), |b| {
        b.iter_custom(|rounds| {
            let start = Instant::now();
            for _ in 0..rounds {
                let w = w.mat().t_if(shape.transposed);
                gemm(1.0, x.mat(), w, 0.0, y.make_mut().expect("unshared")).expect("types that go together");
            }
            let all = start.elapsed();
            times.push(all.as_secs_f64() / rounds as f64);
            all
        });
    });
    if !times.is_empty() {
        let rate = flops / median(&times);
        println!("{}, {dtype}: {:.0} GFLOP/s, {:.0}% of the ceiling", shape.name, rate / 1e9, 100.0 * rate / ceiling);
    }
}

criterion_group!(benches, gemms);
criterion_main!(benches);
