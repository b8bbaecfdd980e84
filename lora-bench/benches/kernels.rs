//! The kernels of a step besides its matrix products, at the sizes of GPT-2 small: attention (of other models too), norms, the
//! loss head in f32 and bf16, AdamW.

use std::time::Instant;

use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use lora_bench::{CEILING, ceiling, median, numbers, typed};
use lora_core::Tensor;
use lora_kernels::{
    Acc, AdamW, Attention, CachedRows, DType, Device, Sequences, adamw, attention, attention_backward,
    attention_cached, axpby, layer_norm, layer_norm_backward, loss_head, rms_norm, rms_norm_backward,
};

const TOKENS: usize = 1024;
const WIDTH: usize = 768;
const HEADS: usize = 12;
const VOCABULARY: usize = 50257;

/// The gradient's matrix, overwritten.
fn write(to: &mut Tensor) -> Acc<'_> {
    Acc { to: to.make_mut().expect("unshared"), beta: 0.0 }
}

/// Measures `run`, on a thread of the pool as training and generation are, and gives the median seconds of a call; NaN where a
/// filter leaves it out.
fn time(group: &mut BenchmarkGroup<WallTime>, id: BenchmarkId, mut run: impl FnMut() + Send) -> f64 {
    let mut times = Vec::new();
    group.bench_function(id, |b| {
        b.iter_custom(|rounds| {
            let all = Device::Cpu.run(|| {
                let start = Instant::now();
                (0..rounds).for_each(|_| run());
                start.elapsed()
            });
            times.push(all.as_secs_f64() / rounds as f64);
            all
        });
    });
    median(&times)
}

/// A model's attention, and the lengths of sequences that it is tried with.
struct Heads {
    model: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
    lengths: &'static [usize],
}

const ATTENTIONS: [Heads; 4] = [
    Heads { model: "GPT-2", heads: 12, kv_heads: 12, head_dim: 64, causal: true, lengths: &[64, 128, 512, 1024] },
    Heads { model: "RoBERTa", heads: 12, kv_heads: 12, head_dim: 64, causal: false, lengths: &[64, 512] },
    Heads { model: "SmolLM", heads: 9, kv_heads: 3, head_dim: 64, causal: true, lengths: &[256, 1024] },
    Heads { model: "MiniLM", heads: 12, kv_heads: 12, head_dim: 32, causal: false, lengths: &[64] },
];

/// 1024 tokens in sequences of each length: GFLOP/s over the pairs that see each other, two products forward and five
/// backward (the scores are made again).
fn attentions(c: &mut Criterion) {
    let ceiling = ceiling(DType::F32, CEILING);
    let mut group = c.benchmark_group("attention");
    group.sample_size(20).throughput(Throughput::Elements(TOKENS as u64));
    let cases = ATTENTIONS.iter().flat_map(|h| h.lengths.iter().map(move |&length| (h, length)));
    for (&Heads { model, heads, kv_heads, head_dim, causal, .. }, length) in cases {
        let seqs = Sequences::new(&vec![length; TOKENS / length]);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let cfg = Attention { heads, kv_heads, head_dim, scale, causal, dropout: None };
        let (width, shared) = (heads * head_dim, kv_heads * head_dim);
        let (qkv, dout) = (numbers(TOKENS, width + 2 * shared), numbers(TOKENS, width));
        let [q, k, v] =
            [0..width, width..width + shared, width + shared..width + 2 * shared].map(|c| qkv.mat().cols_in(c));
        let (mut out, mut lse) = (numbers(TOKENS, width), numbers(TOKENS, heads));
        let seen = if causal { (length + 1) as f64 / 2.0 } else { length as f64 };
        let product = 2.0 * (TOKENS * width) as f64 * seen;
        let say = |what: &str, products: f64, seconds: f64| {
            if seconds.is_nan() {
                return;
            }
            let rate = products * product / seconds;
            println!(
                "attention, {model}, {length}, {what}: {:.0} GFLOP/s, {:.0}% of the ceiling",
                rate / 1e9,
                100.0 * rate / ceiling
            );
        };
        let seconds = time(&mut group, BenchmarkId::new(format!("{model}, forward"), length), || {
            let (out, lse) = (out.make_mut().expect("unshared"), lse.make_mut().expect("unshared"));
            attention(&cfg, &seqs, q, k, v, out, lse).expect("memory");
        });
        say("forward", 2.0, seconds);
        let mut grads = [width, shared, shared].map(|cols| numbers(TOKENS, cols));
        let seconds = time(&mut group, BenchmarkId::new(format!("{model}, backward"), length), || {
            let [dq, dk, dv] = &mut grads;
            let saved = (out.mat(), lse.mat());
            let to = [write(dq), write(dk), write(dv)];
            let [dq, dk, dv] = to;
            attention_backward(&cfg, &seqs, q, k, v, saved.0, saved.1, dout.mat(), dq, dk, dv).expect("memory");
        });
        say("backward", 5.0, seconds);
    }
    // Generation: eight sequences of 200 positions, one new token each.
    let (pool, q, mut out) = (numbers(1600, WIDTH), numbers(8, WIDTH), numbers(8, WIDTH));
    let lists: Vec<Vec<u32>> = (0..8).map(|s| (s * 200..(s + 1) * 200).collect()).collect();
    let mut rows = CachedRows::new(&Device::Cpu, 1);
    rows.set(&lists, &[1; 8]).expect("memory");
    let head_dim = WIDTH / HEADS;
    let cfg = Attention { heads: HEADS, kv_heads: HEADS, head_dim, scale: 0.125, causal: true, dropout: None };
    group.throughput(Throughput::Elements(8));
    time(&mut group, BenchmarkId::new("cached", "8 × 200"), || {
        let out = out.make_mut().expect("unshared");
        attention_cached(&cfg, q.mat(), pool.mat(), pool.mat(), &rows, out).expect("memory");
    });
    group.finish();
}

fn norms(c: &mut Criterion) {
    let mut group = c.benchmark_group("norm");
    // Forward reads x and writes y; backward reads x and dy and writes dx.
    let moved = |matrices: usize| Throughput::Bytes((matrices * TOKENS * WIDTH * 4) as u64);
    let (x, dy, gamma, beta) = (numbers(TOKENS, WIDTH), numbers(TOKENS, WIDTH), numbers(1, WIDTH), numbers(1, WIDTH));
    let (mut y, mut dx) = (numbers(TOKENS, WIDTH), numbers(TOKENS, WIDTH));
    let mut stats = numbers(TOKENS, 2);
    group.throughput(moved(2));
    time(&mut group, BenchmarkId::new("layer norm", "forward"), || {
        let (y, stats) = (y.make_mut().expect("unshared"), stats.make_mut().expect("unshared"));
        layer_norm(x.mat(), gamma.mat(), beta.mat(), 1e-5, y, stats).expect("f32");
    });
    group.throughput(moved(3));
    time(&mut group, BenchmarkId::new("layer norm", "backward"), || {
        let dx = Some(write(&mut dx));
        layer_norm_backward(x.mat(), gamma.mat(), stats.mat(), dy.mat(), dx, None, None).expect("f32");
    });
    let mut stats = numbers(TOKENS, 1);
    group.throughput(moved(2));
    time(&mut group, BenchmarkId::new("rms norm", "forward"), || {
        let (y, stats) = (y.make_mut().expect("unshared"), stats.make_mut().expect("unshared"));
        rms_norm(x.mat(), gamma.mat(), 1e-5, y, stats).expect("f32");
    });
    group.throughput(moved(3));
    time(&mut group, BenchmarkId::new("rms norm", "backward"), || {
        rms_norm_backward(x.mat(), gamma.mat(), stats.mat(), dy.mat(), Some(write(&mut dx)), None).expect("f32");
    });
    group.finish();
}

/// The head with its loss and the gradient of its input, 256 targets, with a matrix in f32 and in bf16.
fn losses(c: &mut Criterion) {
    const ROWS: usize = 256;
    let mut group = c.benchmark_group("loss head");
    group.sample_size(10).throughput(Throughput::Elements(ROWS as u64));
    let (x, w) = (numbers(ROWS, WIDTH), numbers(VOCABULARY, WIDTH));
    let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * 191).collect();
    let targets = Tensor::from_slice(&Device::Cpu, &[1, ROWS], &ids).expect("memory");
    let (mut losses, mut dx) = (numbers(ROWS, 1), numbers(ROWS, WIDTH));
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
        let (w, ceiling) = (typed(&w, dtype), ceiling(dtype, CEILING));
        let seconds = time(&mut group, BenchmarkId::new(format!("forward and dx, {name}"), ROWS), || {
            let (losses, dx) = (losses.make_mut().expect("unshared"), Some(write(&mut dx)));
            loss_head(x.mat(), w.t(), None, targets.mat(), 0.0, 1.0, losses, dx, None, None).expect("memory");
        });
        let rate = 2.0 * 2.0 * (ROWS * WIDTH * VOCABULARY) as f64 / seconds;
        if rate.is_finite() {
            println!("loss head, {name}: {:.0} GFLOP/s, {:.0}% of the ceiling", rate / 1e9, 100.0 * rate / ceiling);
        }
    }
    group.finish();
}

/// AdamW reads four numbers of a parameter and writes three; a copy reads one and writes one, for which the processor reads
/// what it overwrites, too.
fn optimiser(c: &mut Criterion) {
    const N: usize = 16 << 20;
    let mut group = c.benchmark_group("adamw");
    group.sample_size(10);
    let (mut p, g, mut m, mut v) = (numbers(1, N), numbers(1, N), numbers(1, N), numbers(1, N));
    axpby(0.0, g.mat(), 0.0, v.make_mut().expect("unshared")).expect("f32");
    group.throughput(Throughput::Bytes(12 * N as u64));
    let copy = time(&mut group, BenchmarkId::new("copy", N), || {
        axpby(1.0, g.mat(), 0.0, m.make_mut().expect("unshared")).expect("f32");
    });
    let rule = AdamW { lr: 1e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1000 };
    group.throughput(Throughput::Bytes(28 * N as u64));
    let step = time(&mut group, BenchmarkId::new("step", N), || {
        let [p, m, v] = [&mut p, &mut m, &mut v].map(|t| t.make_mut().expect("unshared"));
        adamw(&rule, p, g.mat(), m, v).expect("f32");
    });
    let (copy, step) = (12.0 * N as f64 / copy, 28.0 * N as f64 / step);
    if step.is_finite() && copy.is_finite() {
        println!("adamw: {:.1} GB/s, a copy {:.1} GB/s: {:.0}%", step / 1e9, copy / 1e9, 100.0 * step / copy);
    }
    group.finish();
}

criterion_group!(benches, attentions, norms, losses, optimiser);
criterion_main!(benches);
