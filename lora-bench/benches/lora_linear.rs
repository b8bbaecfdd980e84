//! A linear layer of GPT-2 small (c_attn, 1024 tokens) with LoRA at ranks 1 to 64, forward and forward + backward, beside
//! the bare layer ("r 0"). An element of throughput is a FLOP of matrix products. The floor of LoRA's extra work is its
//! FLOPs: r·(1/in + 1/out) of the layer's.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lora_bench::numbers;
use lora_core::{
    Grads, Result, Tape, Tensor, Var,
    lowrank::Layout,
    peft::{Adapted, Base, Linear, LinearSite, Lora, LoraConfig, Outline, Site, SiteKind},
};
use lora_kernels::{DType, Device};

const TOKENS: usize = 1024;
const IN: usize = 768;
const OUT: usize = 2304;

/// One linear layer as a base.
struct Layer {
    w: Tensor,
    outline: Outline,
}

impl Base for Layer {
    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        Box::new([("layer.weight", &self.w)].into_iter())
    }

    fn outline(&self) -> &Outline {
        &self.outline
    }
}

impl Layer {
    fn forward(&self, t: &mut Tape, adapted: &Adapted, x: &Var) -> Result<Var> {
        let w = adapted.weight(t, "layer.weight", &self.w).unwrap();
        adapted.project(t, "layer", x, &Linear { w, layout: Layout::InOut, bias: None })
    }
}

fn adapted(layer: &Layer, rank: usize) -> Result<Adapted> {
    if rank == 0 {
        return Adapted::none(&Device::Cpu);
    }
    let config = LoraConfig { rank, targets: ["layer"].into_iter().collect(), ..LoraConfig::default() };
    Adapted::new(&Lora::new(config)?, layer, &Device::Cpu, DType::F32, 0)
}

/// On a thread of the pool, as training is.
fn time(rounds: u64, mut run: impl FnMut() + Send) -> Duration {
    Device::Cpu.run(|| {
        let start = Instant::now();
        (0..rounds).for_each(|_| run());
        start.elapsed()
    })
}

fn lora(c: &mut Criterion) {
    let linear = LinearSite { inputs: IN, outputs: OUT, layout: Layout::InOut, parts: vec![] };
    let site = Site { name: "layer".into(), layer: Some(0), kind: SiteKind::Linear(linear) };
    let outline = Outline { sites: vec![site], ..Outline::default() };
    let layer = Layer { w: numbers(IN, OUT), outline };
    let (x, dy) = (numbers(TOKENS, IN), numbers(TOKENS, OUT));
    let mut group = c.benchmark_group("lora_linear");
    group.sample_size(20);
    for rank in [0, 1, 4, 8, 16, 64] {
        let adapted = adapted(&layer, rank).expect("a layer with LoRA");
        let (whole, low) = (2 * TOKENS * IN * OUT, 2 * TOKENS * rank * (IN + OUT));
        group.throughput(Throughput::Elements((whole + low) as u64));
        group.bench_function(format!("forward, r {rank}"), |b| {
            b.iter_custom(|rounds| {
                time(rounds, || {
                    let mut t = Tape::inference(&adapted.params);
                    let x = t.constant(&x);
                    black_box(layer.forward(&mut t, &adapted, &x).expect("forward"));
                })
            });
        });
        // dx costs what y did, and dA and dB once more what A and B did.
        group.throughput(Throughput::Elements((2 * whole + 3 * low) as u64));
        // What reaches the layer inside a network is tracked, so that dx is part of the work at every rank.
        group.bench_function(format!("forward + backward, r {rank}"), |b| {
            let mut grads = Grads::new(&adapted.params).expect("memory");
            b.iter_custom(|rounds| {
                time(rounds, || {
                    grads.reset();
                    let mut t = Tape::new(&adapted.params);
                    let x = t.tracked(&x);
                    let y = layer.forward(&mut t, &adapted, &x).expect("forward");
                    t.backward_from(y, dy.clone(), &mut grads).expect("backward");
                })
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lora);
criterion_main!(benches);
