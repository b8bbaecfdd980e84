//! From logits to a choice: Transformers' logits processors, in its order.

use std::cmp::Ordering;

use super::GenerationConfig;

/// Repetition penalty, then n-gram blocking, in place. `history` is the text with its prompt. In f32, as in Transformers,
/// so that ties come out the same.
pub(super) fn process(config: &GenerationConfig, history: &[u32], scores: &mut [f32]) {
    if config.repetition_penalty != 1.0 {
        let penalty = config.repetition_penalty as f32;
        let mut seen = history.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            let z = &mut scores[token as usize];
            *z = if *z < 0.0 { *z * penalty } else { *z / penalty };
        }
    }
    let n = config.no_repeat_ngram_size;
    if n > 0 && history.len() >= n {
        let begun = &history[history.len() + 1 - n..];
        for window in history.windows(n) {
            if let Some(token) = window.strip_prefix(begun) {
                scores[token[0] as usize] = f32::NEG_INFINITY;
            }
        }
    }
}

/// What the next token of a text is drawn from: tokens and their probabilities, which add up to 1. `history` is the text
/// with its prompt, `logits` the model's after it.
///
/// In Transformers' order: repetition penalty, blocked n-grams, temperature, `top_k`, `top_p`. `top_p` removes the least
/// likely tokens as long as they make up no more than 1 − `top_p`; the likeliest always stays. Probabilities are f64.
///
/// # Panics
/// When a token of the history has no logit.
pub fn distribution(config: &GenerationConfig, history: &[u32], mut logits: Vec<f32>) -> Vec<(u32, f64)> {
    process(config, history, &mut logits);
    warp(config, &logits)
}

/// Temperature, `top_k`, `top_p`: the tokens left. None when all are banned.
pub(super) fn warp(config: &GenerationConfig, scores: &[f32]) -> Vec<(u32, f64)> {
    let mut floor = f64::NEG_INFINITY;
    if (1..scores.len()).contains(&config.top_k) {
        let top = largest(config.top_k, scores.iter().map(|&z| (f64::from(z), ())));
        floor = top[config.top_k - 1].0;
    }
    let max = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let kept = scores.iter().zip(0u32..).map(|(&z, token)| (token, f64::from(z)));
    let kept = kept.filter(|&(_, z)| z >= floor && z != f64::NEG_INFINITY);
    let mut kept: Vec<(u32, f64)> = kept.map(|(token, z)| (token, ((z - max) / config.temperature).exp())).collect();
    normalize(&mut kept);
    if config.top_p < 1.0 && !kept.is_empty() {
        nucleus(config.top_p, &mut kept);
        normalize(&mut kept);
    }
    kept
}

fn nucleus(top_p: f64, kept: &mut Vec<(u32, f64)>) {
    let (n, most) = (kept.len() as f64, kept.iter().map(|k| k.1).fold(0.0, f64::max));
    // Tokens below (1 − top_p)/n go in any case, since all of them together stay below 1 − top_p: only the others have
    // to be sorted.
    kept.retain(|&(_, p)| p * n > 1.0 - top_p || p == most);
    kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    // The tail from a token on stays above 1 − top_p exactly as long as the tokens before it make up less than top_p.
    let mut before = 0.0;
    let stay = kept.iter().position(|&(_, p)| {
        let full = before >= top_p;
        before += p;
        full
    });
    kept.truncate(stay.unwrap_or(kept.len()));
}

fn normalize(kept: &mut [(u32, f64)]) {
    let sum: f64 = kept.iter().map(|k| k.1).sum();
    for (_, p) in kept {
        *p /= sum;
    }
}

/// The first of the largest, as torch.argmax.
pub(super) fn argmax(scores: &[f32]) -> u32 {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (token, &z) in (0..).zip(scores) {
        if z > max {
            (best, max) = (token, z);
        }
    }
    best
}

/// zᵢ − log Σⱼ exp zⱼ, in place; the sum in f64.
pub(super) fn log_softmax(z: &mut [f32]) {
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = z.iter().map(|&z| f64::from((z - max).exp())).sum();
    let log_sum = f64::from(max) + sum.ln();
    for z in z {
        *z = (f64::from(*z) - log_sum) as f32;
    }
}

/// The k largest, in descending order, equal ones by their labels; all when there are fewer. Takes one comparison for
/// nearly every item: it keeps at most 2k, and halves them by selection whenever they are so many.
pub(super) fn largest<T: Ord + Copy>(k: usize, items: impl Iterator<Item = (f64, T)>) -> Vec<(f64, T)> {
    let order = |a: &(f64, T), b: &(f64, T)| -> Ordering { b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)) };
    let mut best: Vec<(f64, T)> = Vec::new();
    let mut floor = f64::NEG_INFINITY;
    for item in items {
        if item.0 < floor {
            continue;
        }
        best.push(item);
        if best.len() == 2 * k {
            best.select_nth_unstable_by(k - 1, order);
            best.truncate(k);
            floor = best[k - 1].0;
        }
    }
    best.sort_unstable_by(order);
    best.truncate(k);
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f32 = f32::INFINITY;

    fn config() -> GenerationConfig {
        GenerationConfig { top_k: 0, ..Default::default() }
    }

    #[test]
    fn repetition_penalty_counts_a_token_once_and_makes_it_less_likely_on_either_side_of_zero() {
        let mut z = [2.0, -2.0, 0.0, 3.0];
        process(&GenerationConfig { repetition_penalty: 2.0, ..config() }, &[1, 0, 1, 2, 0], &mut z);
        assert_eq!(z, [1.0, -4.0, 0.0, 3.0]);
    }

    #[test]
    fn n_grams_are_blocked_by_their_beginning() {
        for (n, history, banned) in [
            (1, &[0, 2, 0][..], &[0, 2][..]),
            (2, &[1, 2, 1, 3, 1], &[2, 3]),
            (2, &[1, 1], &[1]),
            (2, &[1], &[]),
            (3, &[1, 2, 3, 0, 1, 2], &[3]),
            (3, &[1, 2], &[]),
            (0, &[1, 1, 1], &[]),
        ] {
            let mut z = [0.0; 4];
            process(&GenerationConfig { no_repeat_ngram_size: n, ..config() }, history, &mut z);
            let found: Vec<usize> = (0..4).filter(|&i| z[i] == -INF).collect();
            assert_eq!(found, banned, "{n} {history:?}");
        }
    }

    #[test]
    fn top_k_keeps_ties_and_top_p_keeps_what_makes_up_the_probability() {
        let logits = |p: &[f64]| p.iter().map(|p| p.ln() as f32).collect::<Vec<_>>();
        let p = logits(&[0.1, 0.4, 0.2, 0.0, 0.3]);
        let ties = [1.0, 2.0, 1.0, 1.0, 0.0];
        for (top_k, top_p, scores, tokens) in [
            (0, 1.0, &p[..], &[0, 1, 2, 4][..]),
            (2, 1.0, &p, &[1, 4]),
            (9, 1.0, &p, &[0, 1, 2, 4]),
            (2, 1.0, &ties, &[0, 1, 2, 3]),
            (0, 0.39, &p, &[1]),
            (0, 1e-20, &p, &[1]),
            (0, 0.41, &p, &[1, 4]),
            (0, 0.69, &p, &[1, 4]),
            (0, 0.71, &p, &[1, 2, 4]),
            (0, 0.95, &p, &[0, 1, 2, 4]),
            // Of the two left by top_k the first has 4/7.
            (2, 0.56, &p, &[1]),
            (2, 0.58, &p, &[1, 4]),
            (0, 0.5, &[-INF; 3], &[]),
        ] {
            let mut found = warp(&GenerationConfig { top_k, top_p, ..config() }, scores);
            found.sort_unstable_by_key(|k| k.0);
            assert_eq!(found.iter().map(|k| k.0).collect::<Vec<_>>(), tokens, "{top_k} {top_p}");
            assert!(found.is_empty() || (found.iter().map(|k| k.1).sum::<f64>() - 1.0).abs() < 1e-12);
        }
        let flat = warp(&GenerationConfig { temperature: 0.5, ..config() }, &logits(&[0.2, 0.8]));
        assert!((flat[1].1 - 16.0 / 17.0).abs() < 1e-6, "probabilities are squared: {flat:?}");
    }

    #[test]
    fn the_largest_are_those_of_a_full_sort() {
        // Few distinct values, so that there are ties at every border.
        let items: Vec<(f64, u32)> = (0..500u32).map(|i| (f64::from(i * 7919 % 101 % 23), i)).collect();
        let mut sorted = items.clone();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        for k in [1, 2, 7, 100, 499, 500, 900] {
            assert_eq!(largest(k, items.iter().copied()), sorted[..k.min(500)], "{k}");
        }
        assert_eq!(argmax(&[1.0, 3.0, -INF, 3.0]), 1);
        assert_eq!(argmax(&[-INF; 3]), 0);
    }

    #[test]
    fn log_softmax_adds_up_to_one_far_from_zero() {
        let mut z = [1e4, 1e4 - 1.0, -1e4];
        log_softmax(&mut z);
        assert!((f64::from(z[0]) + (1.0 + (-1f64).exp()).ln()).abs() < 1e-6, "{z:?}");
        assert!((z[0].exp() + z[1].exp() - 1.0).abs() < 1e-6);
    }
}
