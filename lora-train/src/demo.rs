//! The story of `lora demo`: everything this crate does, on data that it makes itself.
//!
//! ```text
//! prose ──pretrain──▶ base ─┬─ lora ─▶ adapter ─┐
//!                           ├─ full ─▶ model    ┴─▶ loss, facts told, bytes, logits of the merged model
//! records ──────────────────┴─ every method, a few steps ─▶ a table of losses
//! ```
//! LoRA and full fine-tuning are told in full; then every method of [`METHODS`] runs for a few steps. All figures are a
//! function of the [`DemoConfig`], except for seconds; and they are taken from what was saved and loaded again, not from
//! what was trained in memory.

mod base;
mod measure;

use std::path::{Path, PathBuf};

use lora_core::peft::{Adapted, METHODS, MethodRow, Modules, find};
use lora_kernels::Device;
use lora_model::{Model, adapter, files};
use serde::{Deserialize, Serialize};

use crate::{
    Encoder, Evaluation, Observer, PretrainConfig, Result, Summary, TrainConfig, checkpoint::Spent, data::Format,
    demo_data, demo_data::Downstream, evaluate, load_data, train, weight_bytes,
};

/// What a run of the demo depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct DemoConfig {
    /// Seed of the data, the base and the adaptation.
    pub seed: u64,
    /// The folder in which pretrained bases are kept from run to run; `None` pretrains anew.
    pub cache: Option<PathBuf>,
    /// Bytes of prose to pretrain on.
    pub prose: usize,
    /// How the base is pretrained; `text`, `out` and `seed` are filled in.
    pub pretrain: PretrainConfig,
    /// Records to adapt on.
    pub records: usize,
    /// Records to evaluate on.
    pub held_out: usize,
    /// How it is adapted; paths, `method`, `lr` and `seed` are filled in.
    pub adapt: TrainConfig,
    /// Learning rates by method, and that of methods without one of their own.
    pub lr: (Vec<(&'static str, f64)>, f64),
    /// Steps of each method in the table of all.
    pub table_steps: u64,
    /// Held-out records for which sentences are generated, to count the facts in them.
    pub told: usize,
    /// The records among them that are shown.
    pub shown: usize,
}

impl Default for DemoConfig {
    fn default() -> Self {
        DemoConfig {
            seed: 0,
            cache: None,
            prose: 5_000_000,
            pretrain: PretrainConfig {
                vocab: 1024,
                layers: 2,
                dim: 128,
                heads: 4,
                context: 192,
                steps: Some(4000),
                batch_size: 16,
                lr: 3e-3,
                warmup: 100,
                weight_decay: 0.01,
                ..PretrainConfig::default()
            },
            records: 10_000,
            held_out: 128,
            adapt: TrainConfig {
                targets: ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"].into_iter().collect(),
                // Of two layers.
                layers: "last:1".into(),
                drop_layers: Some("first:1".into()),
                bottleneck: 16,
                steps: Some(1000),
                warmup: 10,
                clip: 1.0,
                ..TrainConfig::default()
            },
            lr: (
                vec![("full", 1e-3), ("top2", 1e-3), ("bitfit", 1e-2), ("pre-embed", 5e-2), ("pre-layer", 5e-2)],
                5e-3,
            ),
            table_steps: 100,
            told: 48,
            shown: 3,
        }
    }
}

impl DemoConfig {
    /// A smaller run, for a test of the whole.
    pub fn short() -> Self {
        let DemoConfig { pretrain, adapt, .. } = DemoConfig::default();
        DemoConfig {
            prose: 1_000_000,
            pretrain: PretrainConfig { steps: Some(500), ..pretrain },
            records: 2000,
            held_out: 64,
            adapt: TrainConfig { steps: Some(200), ..adapt },
            table_steps: 20,
            told: 16,
            ..DemoConfig::default()
        }
    }

    fn lr(&self, method: &str) -> f64 {
        let (own, other) = &self.lr;
        own.iter().find(|(name, _)| *name == method).map_or(*other, |(_, lr)| *lr)
    }
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The base.
    pub pretrain: Pretrained,
    /// LoRA and full fine-tuning.
    pub methods: Vec<MethodReport>,
    /// Every method after the same few steps.
    pub table: Vec<TableRow>,
    /// The largest absolute difference between the logits of a merged model, saved and loaded again, and those of base
    /// and adapter, on the held-out records.
    pub merge_max_logit_diff: f64,
    /// What the base and the first adapted model say to some held-out records.
    pub samples: Vec<Sample>,
}

/// The base and how it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pretrained {
    /// Scalars of the model.
    pub parameters: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Optimiser steps.
    pub steps: u64,
    /// Training loss of the last step.
    pub loss: f64,
    /// Seconds of the steps, when it was made.
    pub seconds: f64,
    /// Whether it comes from the cache.
    #[serde(default)]
    pub cached: bool,
}

/// What one method made of the base.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MethodReport {
    /// The method's name in the table.
    pub name: &'static str,
    /// Trainable scalars.
    pub trainable: usize,
    /// Trainable scalars as a share of the base's.
    pub trainable_share: f64,
    /// Bytes of the weights that it saved.
    pub checkpoint_bytes: u64,
    /// Mean cross-entropy per target token on the held-out records, of the base.
    pub loss_before: f64,
    /// The same after adaptation.
    pub loss_after: f64,
    /// Of what held-out records name (place, kind, food, dish, area, landmark), the share that greedily generated
    /// sentences repeat; of the base.
    pub facts_before: f64,
    /// The same after adaptation.
    pub facts_after: f64,
    /// Seconds of its optimiser steps.
    pub seconds: f64,
}

/// What one method made of the base in a few steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TableRow {
    /// The method's name in the table.
    pub name: &'static str,
    /// Trainable scalars.
    pub trainable: usize,
    /// Trainable scalars as a share of the base's.
    pub trainable_share: f64,
    /// Bytes of the weights that it saved.
    pub checkpoint_bytes: u64,
    /// Mean cross-entropy per target token on the held-out records.
    pub loss: f64,
    /// Seconds of its optimiser steps.
    pub seconds: f64,
}

/// What was said to one record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// The record.
    pub record: String,
    /// The base's continuation.
    pub before: String,
    /// The adapted model's.
    pub after: String,
}

/// What the demo is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Pretrain the base.
    Pretrain,
    /// Use the base in the cache.
    Cached,
    /// Adapt the base with a method.
    Adapt(&'static str),
    /// Load a method's result again and measure it.
    Measure(&'static str),
    /// Train every method for so many steps.
    Table(u64),
    /// Train this method for the table.
    Row(&'static str),
}

/// Watches the demo. A `true` of [`Observer::stop`] ends it.
pub trait Watcher: Observer {
    /// A stage begins.
    fn stage(&mut self, _stage: Stage) {}
}

impl Watcher for () {}

/// Runs the whole story; `None` when the watcher stopped it. Data, adapters and models go into `work`, a folder that is
/// new or empty and that may be thrown away afterwards.
///
/// # Errors
/// What writing and reading files can cause, a diverging run, options that make no sense. A cache that cannot be used is
/// none of them: it is warned of, and done without.
pub fn run(config: &DemoConfig, work: &Path, watcher: &mut dyn Watcher) -> Result<Option<Report>> {
    files::create_folder(work)?;
    let Some((base_dir, pretrained)) = base::obtain(config, work, watcher)? else { return Ok(None) };
    let Downstream { train: records, valid } = Downstream::new(config.seed, config.records, config.held_out);
    let (data, held_out) = (work.join("train.txt"), work.join("valid.txt"));
    files::write_bytes(&data, demo_data::lines(&records).as_bytes())?;
    files::write_bytes(&held_out, demo_data::lines(&valid).as_bytes())?;

    let device = Device::Cpu;
    let model = lora_model::load(&base_dir, &device)?;
    let encoder = Encoder::from_dir(&base_dir, &*model)?;
    let none = Adapted::none(&device)?;
    let longest = config.adapt.max_length;
    let held_for = |adapted: &Adapted| load_data(&held_out, Some(Format::E2e), &encoder, &*model, adapted, longest);
    let held = held_for(&none)?;
    let told: Vec<&str> = valid.iter().take(config.told.max(config.shown)).map(|(record, _)| record.as_str()).collect();
    let measured = |model: &dyn Model, adapted: &Adapted| -> Result<Measured> {
        let Evaluation { loss, .. } = evaluate(model, adapted, &held, config.adapt.batch_size)?;
        let sentences = measure::sentences(model, adapted, &encoder, &told)?;
        Ok(Measured { loss, facts: measure::facts(&told, &sentences), sentences })
    };
    let before = measured(&*model, &none)?;

    let (mut methods, mut first, mut merge_max_logit_diff) = (Vec::new(), None, 0.0);
    let run_of = |row: &MethodRow, out: &Path| TrainConfig {
        model: base_dir.clone(),
        data: data.clone(),
        out: out.into(),
        format: Some(Format::E2e),
        method: row.name.into(),
        lr: config.lr(row.name),
        seed: config.seed,
        // They are linear maps, and (IA)³ and LN tuning have others.
        targets: if row.options.contains(&"layers-to-transform") {
            config.adapt.targets.clone()
        } else {
            Modules::default()
        },
        ..config.adapt.clone()
    };
    for row in [find("lora")?, find("full")?] {
        watcher.stage(Stage::Adapt(row.name));
        let out = work.join(row.name);
        let run = run_of(row, &out);
        let Summary { trainable, spent: Spent { seconds, .. }, interrupted, .. } = train(&run, false, watcher)?;
        if interrupted {
            return Ok(None);
        }
        watcher.stage(Stage::Measure(row.name));
        let after = if adapter::is_adapter(&out) {
            let adapted = adapter::attach(&out, &*model, &device)?;
            let merged = merged(&work.join(format!("{}-merged", row.name)), &*model, &adapted)?;
            merge_max_logit_diff =
                measure::max_logit_diff((&*model, &adapted), &*merged, &held)?.max(merge_max_logit_diff);
            measured(&*model, &adapted)?
        } else {
            measured(&*lora_model::load(&out, &device)?, &none)?
        };
        methods.push(MethodReport {
            name: row.name,
            trainable,
            trainable_share: trainable as f64 / pretrained.parameters as f64,
            checkpoint_bytes: weight_bytes(&out)?,
            loss_before: before.loss,
            loss_after: after.loss,
            facts_before: before.facts,
            facts_after: after.facts,
            seconds,
        });
        first.get_or_insert(after);
    }

    watcher.stage(Stage::Table(config.table_steps));
    let table_dir = work.join("table");
    // What a fusion combines: an adapter of the table, and one of another seed.
    let fuse = ["adapter-p", "adapter-p-2"].map(|name| table_dir.join(name));
    let mut table = Vec::new();
    for row in METHODS {
        watcher.stage(Stage::Row(row.name));
        let out = table_dir.join(row.name);
        let short = TrainConfig { steps: Some(config.table_steps), ..run_of(row, &out) };
        let run = if row.options.contains(&"fuse") { TrainConfig { fuse: fuse.to_vec(), ..short } } else { short };
        let Summary { trainable, spent: Spent { seconds, .. }, interrupted, .. } = train(&run, false, watcher)?;
        let stopped = interrupted
            || row.name == "adapter-p"
                && train(&TrainConfig { out: fuse[1].clone(), seed: run.seed + 1, ..run }, false, watcher)?.interrupted;
        if stopped {
            return Ok(None);
        }
        let loss = |model: &dyn Model, adapted: &Adapted| -> Result<Evaluation> {
            // Virtual tokens take positions of their own.
            evaluate(model, adapted, &held_for(adapted)?, config.adapt.batch_size)
        };
        let Evaluation { loss, .. } = match adapter::is_adapter(&out) {
            true => loss(&*model, &adapter::attach(&out, &*model, &device)?)?,
            false => loss(&*lora_model::load(&out, &device)?, &none)?,
        };
        table.push(TableRow {
            name: row.name,
            trainable,
            trainable_share: trainable as f64 / pretrained.parameters as f64,
            checkpoint_bytes: weight_bytes(&out)?,
            loss,
            seconds,
        });
    }

    let after = first.map(|m: Measured| m.sentences).unwrap_or_default();
    let samples = told.iter().zip(before.sentences).zip(after).take(config.shown);
    let samples = samples.map(|((record, before), after)| Sample { record: (*record).into(), before, after }).collect();
    Ok(Some(Report { pretrain: pretrained, methods, table, merge_max_logit_diff, samples }))
}

struct Measured {
    loss: f64,
    facts: f64,
    sentences: Vec<String>,
}

/// The model with the adapter in its weights, written to `dir` and read from there.
fn merged(dir: &Path, model: &dyn Model, adapted: &Adapted) -> Result<Box<dyn Model>> {
    files::create_folder(dir)?;
    model.save(dir, &adapted.merged(model)?)?;
    Ok(lora_model::load(dir, &model.device())?)
}
