//! Whole models: training steps against another stack, and generating a token with and without recorded launches. Each is
//! measured in a process of its own, which begins with nothing loaded, as its rival does.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result};
use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::{Gpt2, Model, config::Gpt2Config};
use serde_json::{Value, json};

use crate::{
    json_of, median,
    report::{Goal, Row},
    training,
};

/// Sequences of a batch, as the scripts of other stacks have them.
const BATCH: usize = 8;

/// What is measured in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Once {
    /// Training steps.
    Train,
    /// Tokens generated one by one.
    Decode,
}

/// A model on its device, and data for it.
pub struct Setup {
    /// Where it computes.
    pub device: Device,
    /// Whether sizes are those of a test on an emulated device.
    pub toy: bool,
    /// Folder of the model.
    pub model: PathBuf,
    /// Lines `context||reference` and the folder of their tokenizer; sequences like those of E2E when absent.
    pub data: Option<(PathBuf, PathBuf)>,
}

/// Writes a GPT-2 medium with random weights (a tiny one for an emulated device) into `dir`, unless there is a model.
/// Speed does not depend on the weights.
///
/// # Errors
/// What writing a file can cause.
pub fn prepare(dir: &Path, toy: bool) -> Result<()> {
    if dir.join("config.json").exists() {
        return Ok(());
    }
    let tiny =
        Gpt2Config { vocab_size: 61, n_positions: 128, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::small() };
    let config = match toy {
        true => Gpt2Config { bos_token_id: Some(0), eos_token_id: Some(0), ..tiny },
        false => Gpt2Config::medium(),
    };
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    Gpt2::init(config, dir, 0, &Device::Cpu)?.save(dir, &Default::default())?;
    Ok(())
}

impl Setup {
    /// Measures in this process: one JSON object.
    ///
    /// # Errors
    /// What loading, training or generating can cause.
    pub fn once(&self, what: Once) -> Result<Value> {
        let mut model = lora_model::load_as(&self.model, &self.device, DType::Bf16)?;
        match what {
            Once::Train => {
                let steps = if self.toy { 2 } else { 50 };
                let data = match &self.data {
                    Some((lines, tokenizer)) => training::lines(lines, tokenizer, &*model)?,
                    None => {
                        let limits = model.limits();
                        training::like_e2e(BATCH * steps, limits.vocab_size, limits.max_positions)
                    }
                };
                model.set_base_dropout(0.0);
                Ok(training::measure(&*model, &data, &training::lora(BATCH, steps as u64))?.json())
            }
            Once::Decode => self.decode(&*model),
        }
    }

    /// Milliseconds of one token after a prompt of 64, one sequence.
    fn decode(&self, model: &dyn Model) -> Result<Value> {
        let (prompt, tokens) = if self.toy { (5, 4) } else { (64, 200) };
        let adapted = Adapted::none(&self.device)?;
        let mut cache = model.cache(1, prompt + tokens)?;
        model.step(&adapted, &mut cache, &vec![1; prompt], &[prompt])?;
        let mut seconds = Vec::new();
        for _ in 0..tokens {
            let start = Instant::now();
            // Read back, as whoever picks the next token does.
            model.step(&adapted, &mut cache, &[1], &[1])?.to_f64()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        // The first tokens compile, choose and record.
        let steady = &seconds[tokens / 4..];
        Ok(json!({ "ms_per_token": (!self.toy).then_some(median(steady) * 1e3) }))
    }
}

fn number(of: &Value, key: &str) -> Result<f64> {
    of[key].as_f64().with_context(|| format!("no number {key} in {of}"))
}

/// A token generated with recorded launches against one without, for information. `own` measures [`Once::Decode`].
pub fn decode_row(toy: bool, own: impl Fn() -> Command) -> Row {
    let row = Row::new("time of a token, GPT-2 medium, bf16, batch 1, recorded over not", "ms", None);
    let measured = || -> Result<Row> {
        let plain = json_of(own().env("LORA_CUDA_GRAPHS", "0"))?;
        let recorded = json_of(own().env_remove("LORA_CUDA_GRAPHS"))?;
        if toy {
            return Ok(row.clone());
        }
        let (ours, reference) = (number(&recorded, "ms_per_token")?, number(&plain, "ms_per_token")?);
        Ok(Row { ours: Some(ours), reference: Some(reference), ..row.clone() })
    };
    measured().unwrap_or_else(|e| row.clone().failed(&e))
}

/// Tokens per second of one run: the larger of two figures. All tokens but those of the first step over their time counts
/// compilation in later steps; tokens of an average step over the median step does not.
fn tokens_per_s(run: &Value, tokens_per_step: f64) -> Result<f64> {
    Ok(number(run, "tokens_per_s")?.max(tokens_per_step / number(run, "step_s")?))
}

/// Training against another stack's command, one after the other in each of `rounds` rounds; the ratio is the median of the
/// rounds' own. `own` measures [`Once::Train`]. The peer prints one JSON object with `tokens_per_s` and `step_s` as its last
/// line, of a run over the same sequences.
pub fn train_row(toy: bool, own: impl Fn() -> Command, peer: Option<&str>, rounds: usize) -> Row {
    let goal = Goal { at_least: 1.5, aim: 2.5 };
    let row = Row::new("GPT-2 medium, LoRA training, bf16, batches of 8 like E2E", "tokens/s", Some(goal));
    let measured = || -> Result<Row> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 1..=if peer.is_some() { rounds } else { 1 } {
            let rival = peer.map(|command| json_of(Command::new("sh").arg("-c").arg(command))).transpose()?;
            let run = json_of(&mut own())?;
            let tokens = number(&run, "tokens_per_step")?;
            ours.push(tokens_per_s(&run, tokens)?);
            if let Some(rival) = rival {
                theirs.push(tokens_per_s(&rival, tokens)?);
            }
            eprintln!("round {round}: {ours:.0?} against {theirs:.0?} tokens/s");
        }
        if toy {
            return Ok(row.clone());
        }
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        let row = Row { ours: Some(median(&ours)), ..row.clone() };
        Ok(match peer {
            Some(peer) => Row { reference: Some(median(&theirs)), ratio: Some(median(&ratios)), ..row }.noted(peer),
            None => row.noted("peer not available"),
        })
    };
    measured().unwrap_or_else(|e| row.clone().failed(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(print: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo warming up; echo '{print}'")]);
        command
    }

    #[test]
    fn a_peer_is_compared_round_by_round_by_its_better_figure() {
        let own = || shell(r#"{"tokens_per_s": 300, "step_s": 2, "tokens_per_step": 500}"#);
        // 500 tokens in 5 seconds are more than 90 per second.
        let peer = r#"echo '{"tokens_per_s": 90, "step_s": 5}'"#;
        let row = train_row(false, own, Some(peer), 2);
        assert_eq!((row.ours, row.reference, row.ratio()), (Some(300.0), Some(100.0), Some(3.0)), "{row:?}");
        assert_eq!(row.note, peer);

        let alone = train_row(false, own, None, 2);
        assert_eq!((alone.ours, alone.ratio()), (Some(300.0), None));
        assert_eq!(alone.note, "peer not available");

        let failed = train_row(false, own, Some("echo not JSON; exit 3"), 2);
        assert!(failed.ours.is_none() && failed.note.starts_with("failed: "), "{failed:?}");
    }

    #[test]
    fn recorded_tokens_are_compared_with_others() {
        let own = || {
            let mut command = Command::new("sh");
            command.args(["-c", r#"echo "{\"ms_per_token\": 1${LORA_CUDA_GRAPHS:-5}}""#]);
            command
        };
        let row = decode_row(false, own);
        assert_eq!((row.ours, row.reference, row.ratio()), (Some(15.0), Some(10.0), Some(1.5)), "{row:?}");
    }
}
