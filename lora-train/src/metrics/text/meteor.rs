use std::collections::HashMap;

use rust_stemmers::{Algorithm, Stemmer};

use super::Completions;

/// METEOR (Lavie and Agarwal 2007) with matches of equal words and of equal stems alone, not of synonyms: the mean over
/// predictions of
///
/// ```text
/// max over references of (1 − ½·(chunks/m)³) · P·R / (0.9·P + 0.1·R)      P = m / words, R = m / words of the reference
/// ```
/// with m the words that are matched, and chunks the fewest runs of neighbours that they form in both texts; 0 where m is.
/// Words are matched from the end, each with the last of its equals that is free; then, of those left, equal stems.
///
/// This is nltk's `meteor_score` with its `SnowballStemmer("english")` and a WordNet without synonyms. The stemmer here is
/// Snowball's own; nltk's takes another course on very few words, such as `realization`.
pub fn meteor_exact_stem(texts: &Completions) -> f64 {
    let stemmer = Stemmer::create(Algorithm::English);
    let mut known = HashMap::new();
    let stem = |word: &String| {
        let next = known.len() as u32;
        *known.entry(stemmer.stem(word).into_owned()).or_insert(next)
    };
    let stems: Vec<u32> = texts.words.iter().map(stem).collect();
    texts.mean(|pair| {
        let of = |reference: &Vec<u32>| one(&pair.prediction, reference, &stems);
        pair.references.iter().map(of).fold(0.0, f64::max)
    })
}

fn one(prediction: &[u32], reference: &[u32], stems: &[u32]) -> f64 {
    let mut matches = vec![None; prediction.len()];
    let mut taken = vec![false; reference.len()];
    align(&mut matches, &mut taken, (prediction, reference), |word| word);
    align(&mut matches, &mut taken, (prediction, reference), |word| stems[word as usize]);
    let pairs: Vec<(usize, usize)> = matches.iter().enumerate().filter_map(|(i, m)| Some((i, (*m)?))).collect();
    if pairs.is_empty() {
        return 0.0;
    }
    let m = pairs.len() as f64;
    let (precision, recall) = (m / prediction.len() as f64, m / reference.len() as f64);
    let mean = precision * recall / (0.9 * precision + 0.1 * recall);
    let breaks = pairs.windows(2).filter(|w| (w[0].0 + 1, w[0].1 + 1) != w[1]).count();
    let chunks = (breaks + 1) as f64;
    (1.0 - 0.5 * (chunks / m).powi(3)) * mean
}

/// Matches words that are free and have the same `form`, the last with the last.
fn align(
    matches: &mut [Option<usize>],
    taken: &mut [bool],
    (prediction, reference): (&[u32], &[u32]),
    form: impl Fn(u32) -> u32,
) {
    let mut free: HashMap<u32, Vec<usize>> = HashMap::new();
    for (j, &word) in reference.iter().enumerate().filter(|(j, _)| !taken[*j]) {
        free.entry(form(word)).or_default().push(j);
    }
    for (i, &word) in prediction.iter().enumerate().rev().filter(|(i, _)| matches[*i].is_none()).collect::<Vec<_>>() {
        if let Some(j) = free.get_mut(&form(word)).and_then(Vec::pop) {
            matches[i] = Some(j);
            taken[j] = true;
        }
    }
}
