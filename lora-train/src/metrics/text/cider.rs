use std::collections::{HashMap, HashSet};

use super::{Completions, tokens::Counts};

/// Words of the longest n-grams.
const ORDER: usize = 4;

/// Words by which lengths may differ.
const SIGMA: f64 = 6.0;

/// CIDEr (Vedantam et al. 2015) in its form D without stems: the mean over predictions of
///
/// ```text
/// 10 · mean over n = 1 … 4 and over references of exp(−(l − lᵣ)²/2σ²) · Σ min(g, gᵣ)·gᵣ / (‖g‖·‖gᵣ‖)      σ = 6
/// ```
/// with g(ngram) = how often the text has it · ln (predictions / predictions one of whose references has it), and l the
/// text's pairs of words. Of a single prediction all g are 0, and so is the score.
///
/// This is pycocoevalcap's `Cider`.
pub fn cider(texts: &Completions) -> f64 {
    let mut documents: HashMap<&[u32], u32> = HashMap::new();
    for pair in &texts.pairs {
        let grams = |r| (1..=ORDER).flat_map(move |n| <[u32]>::windows(r, n));
        let seen: HashSet<&[u32]> = pair.references.iter().flat_map(|r| grams(r)).collect();
        seen.into_iter().for_each(|ngram| *documents.entry(ngram).or_default() += 1);
    }
    let all = (texts.len() as f64).ln();
    let weight = |ngram: &[u32]| all - f64::from(documents.get(ngram).copied().unwrap_or(1)).ln();
    texts.mean(|pair| {
        let own = Vector::of(&pair.prediction, &weight);
        let score: f64 = pair.references.iter().map(|r| own.similarity(&Vector::of(r, &weight))).sum();
        10.0 * score / pair.references.len() as f64
    })
}

/// The weighted n-grams of a text.
struct Vector<'a> {
    orders: Vec<Order<'a>>,
    /// Pairs of words.
    length: f64,
}

/// Those of one length.
struct Order<'a> {
    counts: Counts<'a>,
    /// In the order of the counts.
    weights: Vec<f64>,
    norm: f64,
}

impl<'a> Vector<'a> {
    fn of(words: &'a [u32], weight: &impl Fn(&[u32]) -> f64) -> Vector<'a> {
        let order = |n| {
            let counts = Counts::of(words, n);
            let weights: Vec<f64> = counts.iter().map(|(ngram, count)| f64::from(count) * weight(ngram)).collect();
            let norm = weights.iter().map(|w| w * w).sum::<f64>().sqrt();
            Order { counts, weights, norm }
        };
        Vector { orders: (1..=ORDER).map(order).collect(), length: words.len().saturating_sub(1) as f64 }
    }

    /// The mean over n of the cosines, clipped and damped.
    fn similarity(&self, reference: &Vector) -> f64 {
        let damped = (-(self.length - reference.length).powi(2) / (2.0 * SIGMA.powi(2))).exp();
        let cosines: f64 = self.orders.iter().zip(&reference.orders).map(|(own, theirs)| own.cosine(theirs)).sum();
        damped * cosines / ORDER as f64
    }
}

impl Order<'_> {
    fn cosine(&self, reference: &Order) -> f64 {
        let terms = self.counts.iter().zip(&self.weights).filter_map(|((ngram, _), &weight)| {
            let theirs = reference.weights[reference.counts.index(ngram)?];
            Some(weight.min(theirs) * theirs)
        });
        let dot: f64 = terms.sum();
        if dot == 0.0 { 0.0 } else { dot / (self.norm * reference.norm) }
    }
}
