//! From logits to a choice: Transformers' logits processors, in its order.

use std::cmp::Ordering;

use super::GenerationConfig;

/// Repetition penalty, then n-gram blocking, in place. `history` is the text with its prompt, which has `start` tokens. In
/// f32, as in Transformers, so that ties come out the same.
pub(super) fn process(config: &GenerationConfig, history: &[u32], start: usize, scores: &mut [f32]) {
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
    let history = if config.repeat_prompt_ngrams { &history[start..] } else { history };
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
/// with its prompt, which has `start` tokens; `logits` are the model's after it.
///
/// In Transformers' order: repetition penalty, blocked n-grams, temperature, `top_k`, `top_p`. `top_p` removes the least
/// likely tokens as long as they make up no more than 1 − `top_p`; the likeliest always stays. Probabilities are f64.
///
/// # Panics
/// When a token of the history has no logit, or the history is shorter than its prompt.
pub fn distribution(config: &GenerationConfig, history: &[u32], start: usize, mut logits: Vec<f32>) -> Vec<(u32, f64)> {
    process(config, history, start, &mut logits);
    warp(config, &logits)
}

/// Temperature, `top_k`, `top_p`: the tokens left. None when all are banned.
pub(super) fn warp(config: &GenerationConfig, scores: &[f32]) -> Vec<(u32, f64)> {
    let mut floor = f64::NEG_INFINITY;
    if (1..scores.len()).contains(&config.top_k) {
        let mut top = Largest::new(config.top_k);
        top.offer_row(scores, f64::from, |_| ());
        floor = top.sorted()[config.top_k - 1].0;
    }
    let max = f64::from(max(scores));
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

/// Whether there is neither NaN nor infinity.
pub(super) fn all_finite(scores: &[f32]) -> bool {
    // Without a way out in between, so that it becomes vector code.
    let exponent = f32::INFINITY.to_bits();
    !scores.iter().fold(false, |bad, z| bad | (z.to_bits() & exponent == exponent))
}

/// The first of the largest, as torch.argmax.
pub(super) fn argmax(scores: &[f32]) -> u32 {
    let max = max(scores);
    scores.iter().zip(0..).find(|&(&z, _)| z == max).map_or(0, |(_, token)| token)
}

/// −∞ of none; in lanes, which one maximum after the other would not be.
fn max(scores: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = scores.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(a, &z)| *a = larger(*a, z));
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The k largest of what it is offered. Of nearly all it looks only at the largest of many: it keeps at most 2k, and
/// halves them by selection whenever they are so many.
pub(super) struct Largest<T> {
    k: usize,
    best: Vec<(f64, T)>,
    /// What is less is not among them.
    floor: f64,
}

impl<T: Ord + Copy> Largest<T> {
    pub(super) fn new(k: usize) -> Largest<T> {
        Largest { k, best: Vec::with_capacity(2 * k), floor: f64::NEG_INFINITY }
    }

    fn order(a: &(f64, T), b: &(f64, T)) -> Ordering {
        b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
    }

    /// Offers a number of each token: `value`, which never falls, of its score.
    pub(super) fn offer_row(&mut self, scores: &[f32], value: impl Fn(f32) -> f64, label: impl Fn(u32) -> T) {
        const BLOCK: usize = 64;
        for (block, first) in scores.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            if value(max(block)) < self.floor {
                continue;
            }
            for (&score, token) in block.iter().zip(first..) {
                self.offer(value(score), label(token));
            }
        }
    }

    fn offer(&mut self, value: f64, label: T) {
        if value < self.floor {
            return;
        }
        self.best.push((value, label));
        if self.best.len() == 2 * self.k {
            self.best.select_nth_unstable_by(self.k - 1, Self::order);
            self.best.truncate(self.k);
            self.floor = self.best[self.k - 1].0;
        }
    }

    /// In descending order, equal ones by their labels; all when there were fewer.
    pub(super) fn sorted(mut self) -> Vec<(f64, T)> {
        self.best.sort_unstable_by(Self::order);
        self.best.truncate(self.k);
        self.best
    }
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
        process(&GenerationConfig { repetition_penalty: 2.0, ..config() }, &[1, 0, 1, 2, 0], 3, &mut z);
        assert_eq!(z, [1.0, -4.0, 0.0, 3.0]);
    }

    #[test]
    fn n_grams_are_blocked_by_their_beginning() {
        // Of a prompt and a text: what is banned, and what is where the prompt's n-grams may come again.
        for (n, prompt, text, banned, of_text) in [
            (1, &[0, 2][..], &[0][..], &[0, 2][..], &[0][..]),
            (2, &[1, 2], &[1, 3, 1], &[2, 3], &[3]),
            (2, &[1, 2, 1], &[3, 1], &[2, 3], &[]),
            (2, &[1], &[1], &[1], &[]),
            (2, &[], &[1, 1], &[1], &[1]),
            (2, &[1], &[], &[], &[]),
            (3, &[1, 2, 3, 0, 1], &[2], &[3], &[]),
            (3, &[0], &[1, 2, 3, 0, 1, 2], &[3], &[3]),
            (3, &[1], &[2], &[], &[]),
            (0, &[1], &[1, 1], &[], &[]),
        ] {
            for (repeat_prompt_ngrams, banned) in [(false, banned), (true, of_text)] {
                let mut z = [0.0; 4];
                let config = GenerationConfig { no_repeat_ngram_size: n, repeat_prompt_ngrams, ..config() };
                process(&config, &[prompt, text].concat(), prompt.len(), &mut z);
                let found: Vec<usize> = (0..4).filter(|&i| z[i] == -INF).collect();
                assert_eq!(found, banned, "{n} {prompt:?} {text:?} {repeat_prompt_ngrams}");
            }
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
        let scores: Vec<f32> = (0..500u32).map(|i| (i * 7919 % 101 % 23) as f32).collect();
        let mut sorted: Vec<(f64, u32)> = scores.iter().map(|&z| f64::from(z) - 3.0).zip(0..).collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        for k in [1, 2, 7, 100, 499, 500, 900] {
            let mut largest = Largest::new(k);
            largest.offer_row(&scores[..130], |z| f64::from(z) - 3.0, |token| token);
            largest.offer_row(&scores[130..], |z| f64::from(z) - 3.0, |token| token + 130);
            assert_eq!(largest.sorted(), sorted[..k.min(500)], "{k}");
        }
        assert_eq!(argmax(&[1.0, 3.0, -INF, 3.0]), 1);
        assert_eq!(argmax(&[-INF; 3]), 0);
    }

    #[test]
    fn one_number_that_is_not_finite_is_found() {
        for bad in [f32::NAN, -f32::NAN, INF, -INF] {
            let mut scores = [f32::MAX; 37];
            assert!(all_finite(&scores));
            scores[35] = bad;
            assert!(!all_finite(&scores), "{bad}");
        }
    }
}
