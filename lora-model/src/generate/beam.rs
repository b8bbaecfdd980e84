use lora_kernels::log_softmax;

use super::{Decoder, Generated, GenerationConfig, Request, scores};
use crate::Result;

/// Beam search as in Transformers. Each step extends every beam by every token and ranks what comes out by the sum of
/// log-probabilities (after processors); enough candidates are kept that `num_beams` of them do not end here. Those go on,
/// and those of the first `num_beams` that end are finished texts, scored with the length penalty.
///
/// Log-probabilities are f32, their sums f64.
pub(super) fn run(
    mut decoder: Decoder,
    requests: &[Request],
    config: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32),
) -> Result<Vec<Generated>> {
    let mut live: Vec<Search> = requests.iter().enumerate().map(Search::new).collect();
    let mut done: Vec<Option<Generated>> = vec![None; live.len()];
    let mut logits = Vec::new();
    decoder.prompts(requests, &mut logits)?;
    loop {
        log_softmax(&mut logits, decoder.vocab_size());
        let (mut rows, mut first) = (logits.chunks_exact_mut(decoder.vocab_size()), 0);
        let (mut going_on, mut parents) = (Vec::with_capacity(live.len()), Vec::new());
        for mut search in live {
            let beams = search.running.len();
            let log_p: Vec<&mut [f32]> = rows.by_ref().take(beams).collect();
            let next = search.advance(config, log_p);
            if search.over(config) {
                let best = search.finished.swap_remove(0);
                best.tokens.iter().for_each(|&token| on_token(search.index, token));
                done[search.index] = Some(best);
            } else {
                parents.extend(next.into_iter().map(|beam| first + beam));
                going_on.push(search);
            }
            first += beams;
        }
        live = going_on;
        if live.is_empty() {
            // Every search has left through `done`.
            return Ok(done.into_iter().flatten().collect());
        }
        let beams = live.iter().flat_map(|search| &search.running);
        let last: Vec<u32> = beams.map(|beam| beam.tokens[beam.tokens.len() - 1]).collect();
        decoder.next(&parents, &last, &mut logits)?;
    }
}

/// The search after one prompt.
struct Search {
    /// Which prompt it continues.
    index: usize,
    start: usize,
    limit: usize,
    /// New tokens so far.
    length: usize,
    /// Best first. One at the beginning, so that the prompt is read once.
    running: Vec<Beam>,
    /// Best first, `num_beams` at most.
    finished: Vec<Generated>,
}

struct Beam {
    /// All tokens, with the prompt.
    tokens: Vec<u32>,
    /// Sum of the log-probabilities.
    sum: f64,
}

impl Search {
    fn new((index, request): (usize, &Request)) -> Search {
        let Request { prompt, limit } = *request;
        let running = vec![Beam { tokens: prompt.to_vec(), sum: 0.0 }];
        Search { index, start: prompt.len(), limit, length: 0, running, finished: Vec::new() }
    }

    /// One step, given the log-probabilities after each running beam. Returns which beam each of the new ones continues.
    fn advance(&mut self, config: &GenerationConfig, mut log_p: Vec<&mut [f32]>) -> Vec<usize> {
        for (beam, log_p) in self.running.iter().zip(&mut log_p) {
            scores::process(config, &beam.tokens, self.start, log_p);
        }
        // Even if every beam has all end tokens among its best, `num_beams` candidates go on.
        let enough = config.num_beams * (1 + config.eos_token_id.len()).max(2);
        let mut candidates = scores::Largest::new(enough);
        for (b, (beam, log_p)) in self.running.iter().zip(&log_p).enumerate() {
            candidates.offer_row(log_p, |log_p| beam.sum + f64::from(log_p), |token| (b, token));
        }
        let candidates = candidates.sorted();

        self.length += 1;
        let (mut running, mut parents) = (Vec::new(), Vec::new());
        for (rank, &(sum, (parent, token))) in candidates.iter().enumerate() {
            let finished = config.eos_token_id.contains(&token);
            let ends = finished || self.length == self.limit;
            if !(if ends { rank < config.num_beams } else { running.len() < config.num_beams }) {
                continue;
            }
            let mut tokens = self.running[parent].tokens.clone();
            tokens.push(token);
            if ends {
                let (tokens, score) = (tokens.split_off(self.start), Some(self.score(config, sum)));
                self.finished.push(Generated { tokens, score, finished });
            } else {
                running.push(Beam { tokens, sum });
                parents.push(parent);
            }
        }
        self.finished.sort_by(|a, b| b.score.unwrap_or_default().total_cmp(&a.score.unwrap_or_default()));
        self.finished.truncate(config.num_beams);
        self.running = running;
        parents
    }

    /// The score of a text as long as the beams are now.
    fn score(&self, config: &GenerationConfig, sum: f64) -> f64 {
        sum / (self.length as f64).powf(config.length_penalty)
    }

    /// Whether nothing can go on, or nothing that goes on would, at its present length, overtake a finished text.
    fn over(&self, config: &GenerationConfig) -> bool {
        let Some(best) = self.running.first() else { return true };
        let worst = self.finished.get(config.num_beams - 1).and_then(|text| text.score);
        worst.is_some_and(|worst| config.early_stopping || self.score(config, best.sum) <= worst)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lora_core::peft::Adapted;
    use lora_kernels::Device;

    use super::*;
    use crate::{generate::sample, load};

    #[test]
    fn one_beam_is_greedy_decoding() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpt2/model");
        let model = load(&dir, &Device::Cpu).unwrap();
        let adapted = Adapted::none(&Device::Cpu).unwrap();
        let config = GenerationConfig { no_repeat_ngram_size: 2, ..Default::default() };
        let requests =
            [&[7, 61, 22, 90][..], &[3], &[99, 0, 41]].map(|prompt| Request { prompt, limit: 20 - prompt.len() });
        let decoder = || Decoder::new(&*model, &adapted, &requests, 1).unwrap();
        let tokens = |texts: Vec<Generated>| texts.into_iter().map(|t| t.tokens).collect::<Vec<_>>();
        let greedy = tokens(sample::run(decoder(), &requests, &config, &mut |_, _| ()).unwrap());
        let beam = tokens(run(decoder(), &requests, &config, &mut |_, _| ()).unwrap());
        assert_eq!(beam, greedy);
    }

    /// Candidates of one step, by hand: two beams, token 0 ends.
    #[test]
    fn only_the_first_candidates_may_finish() {
        let config =
            GenerationConfig { num_beams: 2, eos_token_id: vec![0], length_penalty: 0.0, ..Default::default() };
        let mut search = Search::new((0, &Request { prompt: &[3], limit: 9 }));
        let step = |search: &mut Search, rows: &[[f64; 4]]| {
            let mut rows: Vec<Vec<f32>> = rows.iter().map(|p| p.map(|p| p.ln() as f32).to_vec()).collect();
            let parents = search.advance(&config, rows.iter_mut().map(Vec::as_mut_slice).collect());
            (parents, search.running.iter().map(|b| b.tokens[b.tokens.len() - 1]).collect::<Vec<_>>())
        };
        // The end is third: it does not finish.
        assert_eq!(step(&mut search, &[[0.2, 0.4, 0.3, 0.1]]), (vec![0, 0], vec![1, 2]));
        assert!(search.finished.is_empty() && !search.over(&config));
        // 0.4·0.7 ends as the first; of the second beam's 0.3·{0.3, 0.4} and the first's 0.4·0.2 the best two go on.
        assert_eq!(step(&mut search, &[[0.7, 0.2, 0.06, 0.04], [0.2, 0.1, 0.3, 0.4]]), (vec![1, 1], vec![3, 2]));
        assert_eq!(search.finished.len(), 1);
        assert_eq!(search.finished[0].tokens, [1, 0]);
        assert!((search.finished[0].score.unwrap() - 0.28f64.ln()).abs() < 1e-6);
        assert!(!search.over(&config), "one finished text is not num_beams");
        // 0.12·0.9 ends as the first. The best to go on, 0.09·0.5, is worse than the worst finished.
        assert_eq!(step(&mut search, &[[0.9, 0.05, 0.03, 0.02], [0.1, 0.1, 0.3, 0.5]]), (vec![1, 1], vec![3, 2]));
        assert_eq!(search.finished[1].tokens, [2, 3, 0]);
        assert!(search.over(&config));
    }
}
