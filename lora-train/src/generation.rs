//! Texts that a model makes of prompts, batch by batch, ended as training ends them. What they are judged by is in
//! [`metrics::text`](crate::metrics::text).
//!
//! ```
//! use lora_train::{data::{self, Format}, metrics::{Metric, text::Completions}};
//!
//! # let folder = tempfile::tempdir()?;
//! # let (data, said) = (folder.path().join("data.txt"), folder.path().join("said.txt"));
//! std::fs::write(&data, "name : The Mill||The Mill is a pub .\nname : The Mill||A pub is The Mill .\n")?;
//! std::fs::write(&said, "The Mill is a pub .\n")?; // or made here: `batches`, then `completion`
//! let corpus = data::read(&data, Format::E2e)?;
//! let prompts = data::references(&corpus);
//! let texts = data::read_predictions(&said, &prompts, &data)?;
//! let references: Vec<_> = prompts.iter().map(|p| &p.texts[..]).collect();
//! let bleu = Metric::Bleu.of_texts(&Completions::new(&texts, &references));
//! assert!((bleu.unwrap() - 100.0).abs() < 1e-9);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::path::Path;

use lora_core::peft::Adapted;
use lora_model::{
    Model,
    adapter::Adapters,
    generate::{self, Generated, GenerationConfig},
    tokenizer::Tokenizer,
};

use crate::{
    Encoder, Result,
    data::{self, Encode, References},
};

/// The tokens that end a text of the model in a folder: what its files say, and what training puts there.
///
/// # Errors
/// Those of [`generate::end_tokens`].
pub fn end_tokens(dir: &Path, encoder: &Encoder) -> Result<Vec<u32>> {
    let mut ends = generate::end_tokens(dir)?;
    if !ends.contains(&encoder.end_of_text()) {
        ends.push(encoder.end_of_text());
    }
    Ok(ends)
}

/// The tokens of the prompts of a data file, each of which can be continued: what [`batches`] takes.
///
/// # Errors
/// A tokenizer that fails, and those of [`generate::check`], with the prompt's line.
pub fn prompts(
    prompts: &[References],
    file: &Path,
    encoder: &Encoder,
    model: &dyn Model,
    adapted: &Adapted,
    config: &GenerationConfig,
) -> Result<Vec<Vec<u32>>> {
    let refused = |index: usize, problem: String| data::Error::Unprompted {
        path: file.to_owned(),
        line: prompts.get(index).map_or(0, |p| p.line),
        problem,
    };
    let tokens =
        |(i, p): (usize, &References)| data::encode_prompt(p.prompt, encoder).map_err(|e| refused(i, e.to_string()));
    let tokens = prompts.iter().enumerate().map(tokens).collect::<data::Result<Vec<_>>>()?;
    match generate::check(model, adapted, &tokens, config) {
        Err(lora_model::Error::Prompt { index, problem }) => Err(refused(index, problem).into()),
        Err(e) => Err(e.into()),
        Ok(()) => Ok(tokens),
    }
}

/// What prompts are continued with.
#[derive(Clone, Copy)]
pub enum Continued<'a> {
    /// All with the same.
    Alike(&'a Adapted),
    /// Each with an adapter of its own, by name, or with the bare base.
    Each(&'a Adapters, &'a [Option<String>]),
}

/// Continues prompts, `batch_size` at a time, when the next batch is asked for. Each prompt draws from a stream of its own,
/// whichever batch it is in.
///
/// # Errors
/// Each batch those of [`generate::generate`] and of [`Adapters::mixed`]; the index in [`lora_model::Error::Prompt`] is that within all prompts.
pub fn batches<'a>(
    model: &'a dyn Model,
    by: Continued<'a>,
    prompts: &'a [Vec<u32>],
    config: &'a GenerationConfig,
    batch_size: usize,
) -> impl Iterator<Item = lora_model::Result<Vec<Generated>>> + 'a {
    let batch_size = batch_size.max(1);
    prompts.chunks(batch_size).enumerate().map(move |(i, batch)| {
        let first = i * batch_size;
        let config = GenerationConfig { first_stream: config.first_stream + first as u64, ..config.clone() };
        let mixed;
        let adapted = match by {
            Continued::Alike(adapted) => adapted,
            Continued::Each(adapters, names) => {
                let names: Vec<Option<&str>> = names[first..first + batch.len()].iter().map(Option::as_deref).collect();
                mixed = adapters.mixed(&names, model, &model.device())?;
                &mixed
            }
        };
        generate::generate(model, adapted, batch, &config, None).map_err(|e| match e {
            lora_model::Error::Prompt { index, problem } => lora_model::Error::Prompt { index: first + index, problem },
            e => e,
        })
    })
}

/// The text that was generated after the tokens `before`, without the token that ends it.
///
/// # Errors
/// A tokenizer that fails.
pub fn text(tokenizer: &Tokenizer, before: &[u32], generated: &Generated, ends: &[u32]) -> Result<String> {
    let tokens = &generated.tokens;
    let shown = match tokens.split_last() {
        Some((last, rest)) if ends.contains(last) => rest,
        _ => tokens,
    };
    Ok(tokenizer.decode_after(before, shown, true)?)
}

/// As [`text()`], of a prompt that ends as in training: trimmed, on one line.
///
/// # Errors
/// A tokenizer that fails.
pub fn completion(tokenizer: &Tokenizer, before: &[u32], generated: &Generated, ends: &[u32]) -> Result<String> {
    Ok(text(tokenizer, before, generated, ends)?.trim().replace(['\r', '\n'], " "))
}

#[cfg(test)]
mod tests {
    use lora_kernels::Device;
    use lora_model::{Gpt2, config::Gpt2Config};

    use super::*;

    #[test]
    fn batches_are_continued_as_one_would_be() {
        let config =
            Gpt2Config { vocab_size: 40, n_positions: 24, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::small() };
        let model = Gpt2::init(config, Path::new(""), 3, &Device::Cpu).unwrap();
        let none = Adapted::none(&Device::Cpu).unwrap();
        let mut prompts: Vec<Vec<u32>> = (0..7).map(|i| (0..=i).collect()).collect();
        let config = GenerationConfig { max_new_tokens: 6, do_sample: true, temperature: 3.0, ..Default::default() };
        let all = |prompts: &[Vec<u32>], size| -> lora_model::Result<Vec<Generated>> {
            let batches: Vec<_> =
                batches(&model, Continued::Alike(&none), prompts, &config, size).collect::<lora_model::Result<_>>()?;
            Ok(batches.concat())
        };
        let together = generate::generate(&model, &none, &prompts, &config, None).unwrap();
        for size in [0, 1, 3, 7, 9] {
            assert_eq!(all(&prompts, size).unwrap(), together, "{size} at a time");
        }
        prompts[5] = vec![99];
        let error = all(&prompts, 2).unwrap_err();
        assert!(matches!(error, lora_model::Error::Prompt { index: 5, .. }), "{error}");
    }
}
