//! How well a model does on held-out data.

use lora_core::{Tape, Tensor, peft::Adapted};
use lora_kernels::axpby;
use lora_model::Model;
use serde::Serialize;

use crate::{
    Error, Result,
    data::{Batch, Dataset, Goal},
    metrics::Scores,
};

/// The loss on held-out data, and what else predictions are judged by.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean cross-entropy per target token or label, or mean squared error per number.
    pub loss: f64,
    /// e^loss, where tokens are predicted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Target tokens, or sequences with a label or a number.
    pub targets: usize,
    /// The metrics of the data's task.
    #[serde(flatten)]
    pub scores: Scores,
}

/// The mean loss over all targets of `data`, without dropout and smoothing, `batch_size` sequences at a time; of data with
/// labels or numbers also the metrics that it names.
///
/// # Errors
/// What a forward pass can cause; [`Error::NotFinite`] where the loss is no number, which metrics would hide.
///
/// # Panics
/// When the goals of the data are not of the model's kind.
pub fn evaluate(model: &dyn Model, adapted: &Adapted, data: &Dataset, batch_size: usize) -> Result<Evaluation> {
    let evaluation = model.device().run(|| match data.sequences.first().map(|s| &s.goal) {
        None | Some(Goal::After(_) | Goal::Within(_)) => tokens(model, adapted, data, batch_size),
        Some(_) => sequences(model, adapted, data, batch_size),
    })?;
    match evaluation.loss.is_finite() {
        true => Ok(evaluation),
        false => Err(Error::NotFinite { loss: evaluation.loss }),
    }
}

fn tokens(model: &dyn Model, adapted: &Adapted, data: &Dataset, batch_size: usize) -> Result<Evaluation> {
    let mut counts = Vec::new();
    // The batches' losses stay on the device until all are there.
    let batches = data.sequences.len().div_ceil(batch_size.max(1));
    let mut means = Tensor::zeros(&model.device(), model.dtype().accumulator(), &[batches, 1])?;
    for (i, b) in data.batches(batch_size).enumerate() {
        let batch = model.batch(adapted, &b.texts())?;
        let mut tape = Tape::inference(&adapted.params);
        // The mean of a batch, not its sum: f32 keeps more of its digits.
        let mean = model.loss(&mut tape, adapted, &batch, 0.0, 1.0 / b.targets() as f64)?;
        axpby(1.0, mean.value().mat(), 0.0, means.make_mut()?.rows_in(i..i + 1))?;
        counts.push(b.targets());
    }
    let targets: usize = counts.iter().sum();
    let sum: f64 = means.to_f64()?.iter().zip(&counts).map(|(mean, &n)| mean * n as f64).sum();
    let loss = sum / targets as f64;
    Ok(Evaluation { loss, perplexity: Some(loss.exp()), targets, scores: Scores::default() })
}

/// Loss and metrics from the few logits of each sequence, in f64 on the host.
fn sequences(model: &dyn Model, adapted: &Adapted, data: &Dataset, batch_size: usize) -> Result<Evaluation> {
    let logits = |b: Batch| Ok(model.logits(adapted, &model.batch(adapted, &b.texts())?)?);
    // All of them are asked for before the first is waited for.
    let logits: Vec<Tensor> = data.batches(batch_size).map(logits).collect::<Result<_>>()?;
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(data.sequences.len());
    for t in &logits {
        rows.extend(t.to_f64()?.chunks(t.cols()).map(<[f64]>::to_vec));
    }
    let labels = data.sequences.iter().map(|s| if let Goal::Label(l) = s.goal { Some(l) } else { None });
    let (sum, scores) = match labels.collect::<Option<Vec<u32>>>() {
        Some(labels) => {
            let predicted: Vec<u32> = rows.iter().map(|row| largest(row) as u32).collect();
            let loss = rows.iter().zip(&labels).map(|(row, &label)| cross_entropy(row, label as usize)).sum::<f64>();
            (loss, Scores::of(data.metrics, |m| m.of_labels(&predicted, &labels, data.positive)))
        }
        None => {
            let value =
                |goal: &Goal| if let Goal::Value(v) = goal { f64::from(*v) } else { panic!("{goal:?} among numbers") };
            let truth: Vec<f64> = data.sequences.iter().map(|s| value(&s.goal)).collect();
            let predicted: Vec<f64> = rows.iter().map(|row| row[0]).collect();
            let loss = predicted.iter().zip(&truth).map(|(p, t)| (p - t).powi(2)).sum::<f64>();
            (loss, Scores::of(data.metrics, |m| m.of_values(&predicted, &truth)))
        }
    };
    let targets = rows.len();
    Ok(Evaluation { loss: sum / targets as f64, perplexity: None, targets, scores })
}

/// Index of the largest; of equal ones the first.
fn largest(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// −log softmax(row)\[label\].
fn cross_entropy(row: &[f64], label: usize) -> f64 {
    let most = row[largest(row)];
    most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln() - row[label]
}
