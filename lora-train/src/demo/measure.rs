//! What the demo counts.

use lora_core::peft::Adapted;
use lora_model::{
    Model, Texts,
    generate::{GenerationConfig, generate},
};

use crate::{
    Encoder, Result,
    data::{Dataset, Encode, encode_prompt},
};

/// Tokens that are generated; the sentences of the data are shorter.
const LONGEST: usize = 80;

/// What the model says to each record, greedily, as one line: the first text that is not empty, because a base that has
/// not learned the task may well end what it has not begun.
pub(super) fn sentences(
    model: &dyn Model,
    adapted: &Adapted,
    encoder: &Encoder,
    records: &[&str],
) -> Result<Vec<String>> {
    let prompts = records.iter().map(|r| encode_prompt(r, encoder)).collect::<crate::data::Result<Vec<_>>>()?;
    let room = prompts.iter().map(|p| model.limits().max_positions.saturating_sub(p.len())).min().unwrap_or(LONGEST);
    let config = GenerationConfig { max_new_tokens: LONGEST.min(room.max(1)), ..GenerationConfig::default() };
    let said = |tokens: &[u32]| -> Result<String> {
        let mut texts = tokens.split(|&t| t == encoder.end_of_text());
        let text = encoder.tokenizer().decode(texts.find(|t| !t.is_empty()).unwrap_or_default(), true)?;
        Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    generate(model, adapted, &prompts, &config, None)?.iter().map(|g| said(&g.tokens)).collect()
}

/// The share of names and words in the records that their sentences repeat, whatever the case of letters.
pub(super) fn facts(records: &[&str], sentences: &[String]) -> f64 {
    // Prices, ratings, children and hours are put into words of their own, so that they are not looked for.
    const VERBATIM: [&str; 6] = ["name", "type", "food", "dish", "area", "near"];
    let (mut all, mut told) = (0, 0);
    for (record, sentence) in records.iter().zip(sentences) {
        let sentence = sentence.to_lowercase();
        for (key, value) in record.split(" | ").filter_map(|field| field.split_once(" : ")) {
            if VERBATIM.contains(&key) {
                all += 1;
                told += usize::from(sentence.contains(&value.to_lowercase()));
            }
        }
    }
    f64::from(told as u32) / f64::from(all.max(1))
}

/// The largest absolute difference of the logits of two models in all rows of `data`.
pub(super) fn max_logit_diff(a: (&dyn Model, &Adapted), b: &dyn Model, data: &Dataset) -> Result<f64> {
    let none = Adapted::none(&b.device())?;
    let mut most = 0.0f64;
    for batch in data.batches(8) {
        let logits = |model: &dyn Model, adapted: &Adapted| -> Result<Vec<f64>> {
            let batch = model.batch(adapted, &Texts::new(&batch.tokens, &batch.lengths))?;
            Ok(model.logits(adapted, &batch)?.to_f64()?)
        };
        for (x, y) in logits(a.0, a.1)?.iter().zip(&logits(b, &none)?) {
            most = most.max((x - y).abs());
        }
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo_data::records;

    #[test]
    fn the_right_sentences_tell_all_facts_and_others_few() {
        let data = records(0, 200);
        let (of, mut said): (Vec<&str>, Vec<String>) = data.iter().map(|(r, s)| (r.as_str(), s.clone())).unzip();
        assert_eq!(facts(&of, &said), 1.0);
        said.rotate_left(1);
        let share = facts(&of, &said);
        assert!(share > 0.0 && share < 0.3, "{share}");
        assert_eq!(facts(&of, &vec![String::new(); 200]), 0.0);
    }
}
