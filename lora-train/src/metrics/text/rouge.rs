use super::Completions;

/// What recall counts beside precision.
const BETA: f64 = 1.2;

/// ROUGE-L (Lin 2004): the mean over predictions of
///
/// ```text
/// (1 + β²)·P·R / (R + β²·P)      β = 1.2
/// ```
/// with P the largest share of the prediction's words, over its references, that the longest common subsequence of both
/// has, and R the largest share of a reference's words; 0 where there is none in common.
///
/// This is pycocoevalcap's `Rouge`, to which a text without words is one empty word.
pub fn rouge_l(texts: &Completions) -> f64 {
    texts.mean(|pair| {
        let prediction = or_empty(&pair.prediction);
        let (mut precision, mut recall) = (0.0f64, 0.0f64);
        for reference in pair.references.iter().map(|r| or_empty(r)) {
            let common = f64::from(longest_common(prediction, reference));
            precision = precision.max(common / prediction.len() as f64);
            recall = recall.max(common / reference.len() as f64);
        }
        if precision == 0.0 {
            return 0.0;
        }
        let beta2 = BETA.powi(2);
        (1.0 + beta2) * precision * recall / (recall + beta2 * precision)
    })
}

/// The words, or one that no text has.
fn or_empty(words: &[u32]) -> &[u32] {
    if words.is_empty() { &[u32::MAX] } else { words }
}

/// Words of the longest common subsequence.
fn longest_common(a: &[u32], b: &[u32]) -> u32 {
    // The row of the words of `a` so far: for each j, the longest within b[..j].
    let mut row = vec![0; b.len() + 1];
    for &x in a {
        let mut diagonal = 0;
        for (j, &y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
