//! What a process measures: described in JSON, so that this side and its peer get the same words.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lora_core::peft::{Adapted, Modules};
use lora_kernels::{DType, Device};
use lora_model::{
    LoadOptions, Model, Task,
    config::RawConfig,
    generate::{GenerationConfig, generate},
};
use lora_train::{
    TrainConfig, Trainer,
    data::{Dataset, Goal, Sequence},
    latency::{LatencyConfig, Shape, latency},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::flops::Needed;
use crate::{ceiling, median, peak_memory_mib, processor_seconds, read_bandwidth, training};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Steps of training; the first is not counted.
    Train,
    /// Texts that are continued.
    Generate,
    /// Forward passes of the base, of LoRA beside it and merged into it, in turn.
    Forward,
    /// Steps of training with batches of several sizes in turn: `batch` sequences and then ever twice as many, `sizes` times.
    Cost,
}

/// The type of the base's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Type {
    /// f32
    F32,
    /// bf16; what trains is f32.
    Bf16,
}

impl Type {
    fn dtype(self) -> DType {
        match self {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::Bf16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Type::F32 => "f32",
            Type::Bf16 => "bf16",
        }
    }
}

/// Real data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lines {
    /// A file of `context||reference` lines.
    pub data: PathBuf,
    /// The folder of the model's tokenizer.
    pub tokenizer: PathBuf,
}

/// One measurement in a process of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// What is done.
    pub kind: Kind,
    /// Folder of the model.
    pub model: PathBuf,
    /// The type of the base's weights.
    pub dtype: Type,
    /// `lora` or `full`.
    pub method: String,
    /// Rank of LoRA.
    pub rank: usize,
    /// α of LoRA.
    pub alpha: f64,
    /// Modules that LoRA adapts.
    pub targets: Vec<String>,
    /// Sequences of a batch.
    pub batch: usize,
    /// Tokens of each, or of each prompt.
    pub tokens: usize,
    /// Steps, or texts, or passes of each variant.
    pub steps: usize,
    /// Real lines in place of sequences of `tokens` tokens.
    pub lines: Option<Lines>,
    /// New tokens of each text.
    pub new: usize,
    /// Beams; 1 takes the likeliest token.
    pub beams: usize,
    /// Sizes of batches.
    pub sizes: usize,
    /// For how many milliseconds the ceiling is looked for: of GEMM after training, of reading memory after generation.
    pub ceiling_ms: u64,
}

impl Work {
    /// Measures in this process: one JSON object.
    ///
    /// # Errors
    /// What loading, training or generating can cause.
    pub fn once(&self) -> Result<Value> {
        match self.kind {
            Kind::Train => self.train(),
            Kind::Generate => self.generate(),
            Kind::Forward => self.forward(),
            Kind::Cost => self.cost(),
        }
    }

    fn load(&self) -> Result<Box<dyn Model>> {
        let raw = RawConfig::from_dir(&self.model)?;
        let task = (raw.architecture()?.task)(&raw)?.unwrap_or(Task::Classification { labels: 2 });
        let options = LoadOptions { dtype: self.dtype.dtype(), task: Some(task), ..LoadOptions::default() };
        let mut model = lora_model::load_with(&self.model, &Device::Cpu, &options)?;
        model.set_base_dropout(0.0);
        Ok(model)
    }

    fn config(&self) -> TrainConfig {
        TrainConfig {
            method: self.method.clone(),
            rank: self.rank,
            alpha: self.alpha,
            targets: if self.method == "lora" { self.targets.clone().into() } else { Modules::default() },
            batch_size: self.batch,
            steps: Some(self.steps as u64),
            no_shuffle: true,
            ..TrainConfig::default()
        }
    }

    /// Lines, or random tokens: of E2E's lengths when `tokens` is 0. All random tokens are predicted, or a label for each
    /// sequence.
    fn data(&self, model: &dyn Model) -> Result<Dataset> {
        let limits = model.limits();
        if let Some(Lines { data, tokenizer }) = &self.lines {
            return training::lines(data, tokenizer, model);
        }
        if self.tokens == 0 {
            return Ok(training::like_e2e(self.batch * self.steps, limits.vocab_size, limits.max_positions));
        }
        let mut next = training::random(limits.vocab_size);
        let sequences = (0..self.batch).map(|i| {
            let tokens: Vec<u32> = (0..self.tokens).map(|_| next()).collect();
            match model.task() {
                Task::CausalLm => Sequence::after(tokens, 1),
                _ => Sequence { second_from: tokens.len(), tokens, goal: Goal::Label(i as u32 % 2) },
            }
        });
        Ok(Dataset::new(sequences.collect()))
    }

    fn train(&self) -> Result<Value> {
        let model = self.load()?;
        let (data, config) = (self.data(&*model)?, self.config());
        let measured = training::measure(&*model, &data, &config)?;
        let mut result = measured.json();
        let needed = Needed::of(&*model, &*config.method_options()?)?;
        let flops: Vec<_> = data.batches(self.batch).map(|b| needed.step(&b)).collect();
        let counted = 1..measured.seconds.len();
        let seconds: f64 = measured.seconds[counted.clone()].iter().sum();
        let total: f64 = counted.map(|step| flops[step % flops.len()].total()).sum();
        result["gemm_flops_per_s"] = json!(total / seconds);
        result["gemm_flops_of_last_step"] = json!(flops[(measured.seconds.len() - 1) % flops.len()]);
        // After the steps, because the peak of memory is theirs.
        result["ceiling"] = json!(ceiling(self.dtype.dtype(), Duration::from_millis(self.ceiling_ms)));
        Ok(result)
    }

    fn generate(&self) -> Result<Value> {
        let model = self.load()?;
        let adapted = Adapted::none(&Device::Cpu)?;
        let mut next = training::random(model.limits().vocab_size);
        let prompts: Vec<Vec<u32>> = (0..self.batch).map(|_| (0..self.tokens).map(|_| next()).collect()).collect();
        let run = |new| -> Result<f64> {
            let start = Instant::now();
            let config = GenerationConfig { max_new_tokens: new, num_beams: self.beams, ..GenerationConfig::default() };
            let texts = generate(&*model, &adapted, &prompts, &config, None)?;
            anyhow::ensure!(texts.iter().all(|t| t.tokens.len() == new), "a text has fewer than {new} new tokens");
            Ok(start.elapsed().as_secs_f64())
        };
        run(self.new.min(4))?;
        let begun = processor_seconds();
        let seconds = (0..self.steps).map(|_| run(self.new)).collect::<Result<Vec<f64>>>()?;
        let cores = begun.zip(processor_seconds()).map(|(from, to)| (to - from) / seconds.iter().sum::<f64>());
        let passes_per_s = self.new as f64 / median(&seconds);
        let weights: usize = model.tensors().map(|(_, t)| t.len() * t.dtype().size()).sum();
        Ok(json!({
            "tokens_per_s": self.batch as f64 * passes_per_s,
            "seconds": seconds,
            "cores": cores,
            "peak_rss_mib": peak_memory_mib(),
            // All weights for every new token; the first one's pass has the prompt's tokens, too.
            "weights_read_per_s": weights as f64 * passes_per_s,
            "bandwidth": read_bandwidth(Duration::from_millis(self.ceiling_ms)),
        }))
    }

    fn forward(&self) -> Result<Value> {
        let config = LatencyConfig {
            model: Some(self.model.clone()),
            shapes: vec![Shape { batch: self.batch, seq: self.tokens, theta: None }],
            rounds: vec![self.steps],
            rank: self.rank,
            targets: self.targets.clone(),
            only: ["base", "lora, merged", "lora"].map(String::from).into(),
            dtype: self.dtype.name().into(),
            ..LatencyConfig::default()
        };
        let report = latency(&config, &mut ())?;
        let shape = report.shapes.first().context("no whole round")?;
        let of = |f: &dyn Fn(&lora_train::latency::LatencyRow) -> f64| {
            Value::Object(shape.rows.iter().map(|row| (row.name.clone(), json!(f(row)))).collect())
        };
        Ok(json!({ "ms": of(&|row| row.ms.median), "ratio": of(&|row| row.ratio.median) }))
    }

    /// Seconds of steps, by size and round.
    fn cost(&self) -> Result<Value> {
        let model = self.load()?;
        let works: Vec<Work> = (0..self.sizes).map(|i| Work { batch: self.batch << i, ..self.clone() }).collect();
        let parts = works.iter().map(|w| Ok((w.data(&*model)?, w.config()))).collect::<Result<Vec<_>>>()?;
        let mut trainers = parts
            .iter()
            .map(|(data, config)| {
                let method = config.method_options()?;
                let adapted = Adapted::new(&*method, &*model, &Device::Cpu, model.dtype(), 0)?;
                Ok(Trainer::new(&*model, adapted, config, data.sequences.len())?)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut seconds = vec![Vec::new(); self.sizes];
        for step in 0..self.steps {
            for (i, trainer) in trainers.iter_mut().enumerate() {
                let start = Instant::now();
                trainer.step(&parts[i].0)?;
                if step > 0 {
                    seconds[i].push(start.elapsed().as_secs_f64());
                }
            }
        }
        let tokens: Vec<usize> = works.iter().map(|w| w.batch * w.tokens).collect();
        Ok(json!({ "tokens": tokens, "seconds": seconds }))
    }
}
