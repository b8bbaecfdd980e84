//! Texts against several references each.
//!
//! All five read the same words ([`words`]): in small letters, split by sacrebleu's `13a`. Each equals one published
//! program on these words, which its documentation names.

mod bleu;
mod cider;
mod meteor;
mod nist;
mod rouge;
mod tokens;

use std::collections::HashMap;

pub use bleu::bleu;
pub use cider::cider;
pub use meteor::meteor_exact_stem;
pub use nist::nist;
pub use rouge::rouge_l;
pub use tokens::words;

/// Predicted texts and the references of each, as words.
#[derive(Debug, Clone, Default)]
pub struct Completions {
    /// Every word once; texts hold indices into it.
    words: Vec<String>,
    pairs: Vec<Pair>,
}

/// A prediction with its references.
#[derive(Debug, Clone)]
struct Pair {
    prediction: Vec<u32>,
    /// At least one.
    references: Vec<Vec<u32>>,
}

impl Completions {
    /// Splits texts into words.
    ///
    /// # Panics
    /// When there are not as many predictions as sets of references, or a set is empty.
    pub fn new<P, S, R>(predictions: &[P], references: &[S]) -> Completions
    where
        P: AsRef<str>,
        S: AsRef<[R]>,
        R: AsRef<str>,
    {
        assert_eq!(predictions.len(), references.len(), "one set of references for each prediction");
        let mut known = HashMap::new();
        let mut split = |text: &str| -> Vec<u32> {
            let mut index = |word| {
                let next = known.len() as u32;
                *known.entry(word).or_insert(next)
            };
            words(text).into_iter().map(&mut index).collect()
        };
        let pairs = predictions.iter().zip(references).map(|(prediction, references)| {
            let references = references.as_ref();
            assert!(!references.is_empty(), "a prediction without references");
            let prediction = split(prediction.as_ref());
            Pair { prediction, references: references.iter().map(|r| split(r.as_ref())).collect() }
        });
        let pairs = pairs.collect();
        let mut words = vec![String::new(); known.len()];
        known.into_iter().for_each(|(word, i)| words[i as usize] = word);
        Completions { words, pairs }
    }

    /// How many predictions there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The mean of a score over all predictions; 0 of nothing.
    fn mean(&self, score: impl Fn(&Pair) -> f64) -> f64 {
        self.pairs.iter().map(score).sum::<f64>() / self.len().max(1) as f64
    }
}
