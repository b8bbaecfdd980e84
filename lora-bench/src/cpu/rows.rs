//! The comparisons with another stack: what each measures, and what its figures should be.

use std::path::PathBuf;

use super::work::{Kind, Lines, Type, Work};
use crate::{CEILING, report::Goal};

/// The modules of a Llama that are linear maps.
const ALL_LINEAR: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// What both sides do, and how their figures should compare.
pub struct Comparison {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, with its sizes.
    pub what: &'static str,
    /// The model's name among the published shapes.
    pub arch: &'static str,
    /// What this side does; without a folder of a model.
    pub ours: Work,
    /// The type that the peer does it in.
    pub theirs: Type,
    /// Tokens per second over the peer's, with its allocator as it is.
    pub speed: Goal,
    /// The same with its allocator tuned and its optimiser fused, where it is measured so.
    pub tuned: Option<Option<Goal>>,
    /// Peak memory over the peer's.
    pub memory: Option<Goal>,
    /// GEMM FLOPs per second over the ceiling.
    pub share: Option<Goal>,
}

const fn goal(at_least: f64, aim: f64) -> Goal {
    Goal { at_least, aim }
}

/// What the ceiling allows beyond it stands in a row of its own.
const fn at_least(limit: f64) -> Goal {
    Goal { at_least: limit, aim: f64::INFINITY }
}

/// LoRA r 4 on GPT-2's default projections.
fn work(kind: Kind, dtype: Type, [batch, tokens, steps]: [usize; 3]) -> Work {
    Work {
        kind,
        model: PathBuf::new(),
        dtype,
        method: "lora".into(),
        rank: 4,
        alpha: 32.0,
        targets: vec!["c_attn".into()],
        batch,
        tokens,
        steps,
        lines: None,
        new: 64,
        beams: 1,
        sizes: 1,
        ceiling_ms: CEILING.as_millis() as u64,
    }
}

fn lora(w: Work, rank: usize, targets: &[&str]) -> Work {
    Work { rank, targets: targets.iter().map(|t| t.to_string()).collect(), ..w }
}

fn row(name: &'static str, what: &'static str, arch: &'static str, ours: Work, speed: Goal) -> Comparison {
    Comparison { name, what, arch, theirs: ours.dtype, ours, speed, tuned: None, memory: None, share: None }
}

/// All comparisons. `tiny` is for tests: the same at sizes of a moment.
pub fn comparisons(lines: Option<&Lines>, tiny: bool) -> Vec<Comparison> {
    use {Kind::*, Type::*};
    let share = Some(goal(0.85, 0.95));
    let e2e = |dtype| Work { lines: lines.cloned(), ..work(Train, dtype, [8, 0, 12]) };
    let dense = |dtype| work(Train, dtype, [8, 128, 6]);
    let smollm = lora(work(Train, F32, [4, 256, 5]), 16, ALL_LINEAR);
    let roberta = |dtype| lora(work(Train, dtype, [16, 64, 6]), 8, &["query", "value"]);
    let full = Work { method: "full".into(), ..dense(F32) };
    let generate = |dtype, batch| work(Generate, dtype, [batch, 32, 3]);
    let beam = Work { beams: 10, steps: 2, ..generate(F32, 1) };
    let mut all = vec![
        Comparison {
            tuned: Some(Some(goal(1.9, 2.4))),
            memory: Some(goal(0.40, 0.30)),
            share,
            ..row("e2e-f32", "E2E LoRA training, GPT-2 small, batch 8, f32", "gpt2", e2e(F32), goal(2.0, 2.4))
        },
        Comparison {
            tuned: Some(Some(goal(2.2, 3.8))),
            memory: Some(goal(0.25, 0.20)),
            share: None,
            ..row("e2e-bf16", "E2E LoRA training, GPT-2 small, batch 8, bf16", "gpt2", e2e(Bf16), goal(2.8, 3.8))
        },
        Comparison {
            tuned: Some(None),
            share,
            ..row("dense-f32", "LoRA training, GPT-2 small, 8 × 128, f32", "gpt2", dense(F32), goal(1.5, 2.0))
        },
        Comparison {
            tuned: Some(None),
            ..row("dense-bf16", "LoRA training, GPT-2 small, 8 × 128, bf16", "gpt2", dense(Bf16), goal(1.4, 2.0))
        },
        Comparison {
            share,
            ..row("smollm", "LoRA r 16 on all, SmolLM-135M, 4 × 256, f32", "smollm-135m", smollm, goal(1.5, 1.7))
        },
        Comparison {
            share,
            ..row("roberta-f32", "LoRA r 8, RoBERTa base, 16 × 64, f32", "roberta-base", roberta(F32), goal(1.05, 1.15))
        },
        row("roberta-bf16", "LoRA r 8, RoBERTa base, 16 × 64, bf16", "roberta-base", roberta(Bf16), goal(1.1, 1.15)),
        Comparison {
            tuned: Some(None),
            share,
            ..row("full", "full fine-tuning, GPT-2 small, 8 × 128, f32", "gpt2", full, goal(1.6, 2.0))
        },
        row("generate-1", "greedy generation, GPT-2 small, batch 1, f32", "gpt2", generate(F32, 1), at_least(2.0)),
        row("generate-8", "greedy generation, GPT-2 small, batch 8, f32", "gpt2", generate(F32, 8), at_least(2.0)),
        Comparison {
            theirs: F32,
            ..row("generate-1-bf16", "the same, batch 1, bf16 over f32", "gpt2", generate(Bf16, 1), at_least(3.5))
        },
        row("beam", "beam search 10, 64 new tokens, GPT-2 small, f32", "gpt2", beam, at_least(4.0)),
    ];
    if tiny {
        all.iter_mut().for_each(|c| make_tiny(&mut c.ours));
    }
    all
}

/// LoRA beside the base and merged into it, forward.
pub(super) fn forward(tiny: bool) -> Work {
    sized(lora(work(Kind::Forward, Type::F32, [8, 128, 8]), 8, &["c_attn"]), tiny)
}

/// Steps with 256 tokens and ever twice as many, up to 8,192.
pub(super) fn cost(tiny: bool) -> Work {
    sized(Work { sizes: 6, ..work(Kind::Cost, Type::F32, [2, 128, 3]) }, tiny)
}

/// One batch again and again.
pub(super) fn steady(tiny: bool) -> Work {
    sized(Work { ceiling_ms: 0, ..work(Kind::Train, Type::F32, [8, 128, 8]) }, tiny)
}

fn sized(mut work: Work, tiny: bool) -> Work {
    if tiny {
        make_tiny(&mut work);
    }
    work
}

fn make_tiny(w: &mut Work) {
    w.batch = w.batch.min(2);
    w.tokens = w.tokens.min(8);
    w.steps = w.steps.min(4);
    (w.new, w.rank, w.sizes, w.ceiling_ms) = (4, 2, w.sizes.min(3), 0);
    w.beams = w.beams.min(3);
}
