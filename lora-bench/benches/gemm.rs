//! The matrix products of a GPT-2 small step, 1024 tokens: GFLOP/s and the share of the ceiling measured in the same run.

use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lora_bench::{ceiling, median, numbers};
use lora_kernels::gemm;

const TOKENS: usize = 1024;

fn gemms(c: &mut Criterion) {
    let ceiling = ceiling();
    println!("measured ceiling: {:.0} GFLOP/s", ceiling / 1e9);
    let mut group = c.benchmark_group("gemm");
    group.sample_size(20);
    // name, [m, k, n] of x [m, k]·W [k, n], and whether W is stored transposed
    let shapes = [
        ("c_attn", [TOKENS, 768, 2304], false),
        ("attn.c_proj", [TOKENS, 768, 768], false),
        ("c_fc", [TOKENS, 768, 3072], false),
        ("mlp.c_proj", [TOKENS, 3072, 768], false),
        ("c_fc, dx = dy·Wᵀ", [TOKENS, 3072, 768], true),
        ("c_fc, dW = xᵀ·dy", [768, TOKENS, 3072], false),
        ("head, 256 rows", [256, 768, 50257], true),
        ("lora A, r 8", [TOKENS, 768, 8], true),
        ("lora B, r 8", [TOKENS, 8, 2304], true),
        ("dA, r 8", [8, TOKENS, 768], false),
        ("one token, c_fc", [1, 768, 3072], false),
    ];
    for (name, [m, k, n], transposed) in shapes {
        let x = numbers(m, k);
        let w = if transposed { numbers(n, k) } else { numbers(k, n) };
        let mut y = numbers(m, n);
        let flops = 2.0 * m as f64 * k as f64 * n as f64;
        group.throughput(Throughput::Elements(flops as u64));
        let mut times = Vec::new();
        group.bench_function(format!("{name} {m}×{k}×{n}"), |b| {
            b.iter_custom(|rounds| {
                let start = Instant::now();
                for _ in 0..rounds {
                    let w = w.mat().t_if(transposed);
                    gemm(1.0, x.mat(), w, 0.0, y.make_mut().expect("unshared")).expect("f32");
                }
                let all = start.elapsed();
                times.push(all.as_secs_f64() / rounds as f64);
                all
            });
        });
        if !times.is_empty() {
            let rate = flops / median(&times);
            println!("{name}: {:.0} GFLOP/s, {:.0}% of the ceiling", rate / 1e9, 100.0 * rate / ceiling);
        }
    }
    group.finish();
}

criterion_group!(benches, gemms);
criterion_main!(benches);
