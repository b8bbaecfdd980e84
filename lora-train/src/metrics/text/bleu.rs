use std::collections::HashMap;

use super::{Completions, tokens::Counts};

/// Words of the longest n-grams.
const ORDER: usize = 4;

/// BLEU (Papineni et al. 2002) of all predictions together, from 0 to 100:
///
/// ```text
/// 100 · BP · (p₁·p₂·p₃·p₄)^¼      BP = exp(1 − r/c) where c < r, else 1
/// pₙ = n-grams that a reference has too, each as often as in the reference that has it most / n-grams of the predictions
/// ```
/// with c the predictions' words, and r those of the references that are closest to them in length (of two, the shorter).
/// A pₙ of 0 becomes 1/(2ᵏ·n-grams), the k-th such one, unless all are 0.
///
/// This is sacrebleu's `corpus_bleu(lowercase=True)`, signature
/// `nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0`.
pub fn bleu(texts: &Completions) -> f64 {
    let (mut right, mut all) = ([0u64; ORDER], [0u64; ORDER]);
    let (mut length, mut wanted) = (0, 0);
    for pair in &texts.pairs {
        let own = pair.prediction.len();
        length += own;
        wanted += pair.references.iter().map(Vec::len).min_by_key(|&n| (n.abs_diff(own), n)).unwrap_or_default();
        for n in 0..ORDER {
            let mut most: HashMap<&[u32], u32> = HashMap::new();
            for reference in &pair.references {
                for (ngram, count) in Counts::of(reference, n + 1).iter() {
                    let known = most.entry(ngram).or_default();
                    *known = count.max(*known);
                }
            }
            for (ngram, count) in Counts::of(&pair.prediction, n + 1).iter() {
                all[n] += u64::from(count);
                right[n] += u64::from(count.min(most.get(ngram).copied().unwrap_or(0)));
            }
        }
    }
    // Without n-grams of some order there is no mean.
    if right == [0; ORDER] || all.contains(&0) {
        return 0.0;
    }
    let mut smooth = 1.0;
    let log = |(&right, &all): (&u64, &u64)| {
        let all = all as f64;
        let share = match right {
            0 => {
                smooth *= 2.0;
                100.0 / (smooth * all)
            }
            right => 100.0 * right as f64 / all,
        };
        share.ln()
    };
    let logs: f64 = right.iter().zip(&all).map(log).sum();
    let brevity = if length < wanted { (1.0 - wanted as f64 / length as f64).exp() } else { 1.0 };
    brevity * (logs / ORDER as f64).exp()
}
