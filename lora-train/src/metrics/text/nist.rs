use std::collections::HashMap;

use super::{Completions, tokens::Counts};

/// Words of the longest n-grams.
const ORDER: usize = 5;

/// NIST (Doddington 2002) of all predictions together, with n-grams of up to five words:
///
/// ```text
/// Σₙ (Σ info of the n-grams that the best reference has too / n-grams of the predictions) · exp(β · ln² min(1, c/r))
/// info(w₁ … wₙ) = log₂ (occurrences of w₁ … wₙ₋₁ / occurrences of w₁ … wₙ), in all references; of one word, all words / its
/// β = ln ½ / ln² 1.5
/// ```
/// with c the predictions' words and r those of the best references: for each n, those that share most information with
/// the prediction (of equal ones, the longest).
///
/// This is nltk's `corpus_nist(n=5)`; where it divides by zero, because no prediction has five words, with the n of the longest.
pub fn nist(texts: &Completions) -> f64 {
    let references = || texts.pairs.iter().flat_map(|pair| &pair.references);
    let mut occurrences: HashMap<&[u32], u64> = HashMap::new();
    for reference in references() {
        for n in 1..=ORDER {
            reference.windows(n).for_each(|ngram| *occurrences.entry(ngram).or_default() += 1);
        }
    }
    let all_words: u64 = references().map(|r| r.len() as u64).sum();
    let info = |ngram: &[u32]| {
        let shorter = if ngram.len() == 1 { all_words } else { occurrences[&ngram[..ngram.len() - 1]] };
        (shorter as f64 / occurrences[ngram] as f64).ln() / 2f64.ln()
    };

    let mut precision = 0.0;
    let (mut length, mut wanted) = (0, 0);
    let longest = texts.pairs.iter().map(|pair| pair.prediction.len()).max().unwrap_or_default();
    for n in 1..=ORDER.min(longest) {
        let (mut shared, mut all) = (0.0, 0);
        for pair in &texts.pairs {
            let own = Counts::of(&pair.prediction, n);
            let (informed, len) = best(pair.references.iter().map(|reference| {
                let theirs = Counts::of(reference, n);
                let common = own.iter().map(|(ngram, count)| (ngram, count.min(theirs.get(ngram))));
                (sum(common.filter(|(_, c)| *c > 0).map(|(ngram, c)| info(ngram) * f64::from(c))), reference.len())
            }));
            shared += informed;
            all += (pair.prediction.len() + 1).saturating_sub(n);
            wanted += len;
            length += pair.prediction.len();
        }
        precision += shared / all as f64;
    }
    if wanted == 0 {
        return 0.0;
    }
    precision * penalty(length as f64 / wanted as f64)
}

/// The reference with the most information; of equal ones the longest.
fn best(references: impl Iterator<Item = (f64, usize)>) -> (f64, usize) {
    references.max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).unwrap_or_default()
}

fn penalty(ratio: f64) -> f64 {
    if ratio > 0.0 && ratio < 1.0 {
        let beta = 0.5f64.ln() / 1.5f64.ln().powi(2);
        (beta * ratio.ln().powi(2)).exp()
    } else {
        ratio.min(1.0)
    }
}

/// A sum that is the same for any order of its terms but in the rarest cases (Neumaier 1974), so that references with the
/// same information are known as equal.
fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0);
    for term in terms {
        let next = sum + term;
        lost += if sum.abs() >= term.abs() { (sum - next) + term } else { (term - next) + sum };
        sum = next;
    }
    sum + lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_order() {
        let terms = [0.1, 0.2, 0.3];
        let forwards = sum(terms.into_iter());
        assert_eq!(forwards, sum(terms.into_iter().rev()));
        assert_ne!(terms.iter().sum::<f64>(), terms.iter().rev().sum::<f64>(), "these do, added up plainly");
    }
}
