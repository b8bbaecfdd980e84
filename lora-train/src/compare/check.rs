//! What can be found out before anything is trained.

use std::{collections::BTreeSet, path::Path};

use lora_core::peft::{Adapted, parameters};
use lora_kernels::{DType, Device};
use lora_model::{LoadOptions, config::RawConfig, generate::GenerationConfig, outline};

use super::Comparison;
use crate::{
    Encoder, Error, Result, TextJoiner,
    data::{self, Corpus, Format, TaskKind},
    generation, hub, place,
    task::{self, Fitted},
};

/// Reads and encodes the data and looks at the base, so that what is wrong with them, or with a row on them, is told before
/// anything is trained. Sequences are those of the bare base: virtual tokens of a row may leave less room.
pub(super) fn check(comparison: &Comparison) -> Result<()> {
    let config = &comparison.rows[0].config;
    let base = hub::resolve(&config.model)?;
    let task = config.task_row()?;
    let learned = task.filter(|task| task.kind != TaskKind::Completions);
    if learned.is_none() {
        task::check_causal(&base, task)?;
    }
    let read = |path: &Path, format: Option<Format>| match task {
        None => Ok(data::read(path, format.unwrap_or_else(|| Format::of_path(path)))?),
        Some(task) => task::read(path, task, format),
    };
    let judged_in = comparison.eval.get("format").and_then(toml::Value::as_str);
    let judged_in = judged_in.map(str::parse).transpose()?.or(config.format);
    let (training, test) = (read(&config.data, config.format)?, read(&comparison.test, judged_in)?);
    let raw = RawConfig::from_dir(&base)?;
    let mut fitted = None;
    for row in &comparison.rows {
        if let Some(task) = learned {
            let own = Fitted::to_train(task, &base, row.config.init_adapter.as_deref(), &training)?;
            let check = |corpus: &Corpus| own.labels.as_ref().map_or(Ok(()), |labels| labels.check(corpus));
            check(&training)?;
            check(&test)?;
            fitted = Some(own);
        }
        let head = fitted.as_ref().map(Fitted::head);
        let outline = outline(&raw, &LoadOptions { task: head, ..LoadOptions::default() })?;
        parameters(&*row.config.method_options()?, &outline)
            .map_err(|e| Error::Config { path: format!("[[run]] {}", row.name).into(), problem: e.to_string() })?;
    }

    // What is cut is said when it is trained or judged.
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), || {
        encode(comparison, &base, fitted.as_ref(), [&training, &test])
    })
}

/// Encodes the data for the bare base in each of the rows' lengths.
fn encode(comparison: &Comparison, base: &Path, fitted: Option<&Fitted>, corpora: [&Corpus; 2]) -> Result<()> {
    let config = &comparison.rows[0].config;
    let dtype = if config.dtype == place::name(DType::F32) { DType::F32 } else { DType::Bf16 };
    let options = LoadOptions { dtype, task: fitted.map(Fitted::head), ..LoadOptions::default() };
    let (model, none) = (lora_model::load_with(base, &Device::Cpu, &options)?, Adapted::none(&Device::Cpu)?);
    let model = &*model;
    let lengths: BTreeSet<usize> = comparison.rows.iter().map(|row| row.config.max_length).collect();
    let mut each = lengths.iter().flat_map(|length| corpora.map(|corpus| (corpus, *length)));
    if let Some(fitted) = fitted {
        let joiner = TextJoiner::from_dir(base, model)?;
        return each.try_for_each(|(corpus, length)| fitted.encode(corpus, &joiner, model, &none, length).map(drop));
    }
    let encoder = Encoder::from_dir(base, model)?;
    each.try_for_each(|(corpus, length)| task::encode_completions(corpus, &encoder, model, &none, length).map(drop))?;
    if config.task.is_some() {
        let [_, test] = corpora;
        generation::prompts(&data::references(test), &test.path, &encoder, model, &none, &GenerationConfig::default())?;
    }
    Ok(())
}
