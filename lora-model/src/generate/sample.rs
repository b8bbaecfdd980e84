use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Decoder, Generated, GenerationConfig, Request, scores};
use crate::Result;

/// A text under way.
struct Text {
    /// Which prompt it continues.
    index: usize,
    /// All tokens, with the prompt.
    tokens: Vec<u32>,
    start: usize,
    limit: usize,
    rng: ChaCha8Rng,
}

/// Greedy decoding, or sampling.
pub(super) fn run(
    mut decoder: Decoder,
    requests: &[Request],
    config: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32),
) -> Result<Vec<Generated>> {
    let text = |(index, r): (usize, &Request)| {
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(config.first_stream.wrapping_add(index as u64));
        Text { index, tokens: r.prompt.to_vec(), start: r.prompt.len(), limit: r.limit, rng }
    };
    let mut live: Vec<Text> = requests.iter().enumerate().map(text).collect();
    let mut done: Vec<Option<Generated>> = vec![None; live.len()];
    let mut logits = Vec::new();
    decoder.prompts(requests, &mut logits)?;
    loop {
        let (mut going_on, mut parents) = (Vec::with_capacity(live.len()), Vec::with_capacity(live.len()));
        let rows = logits.chunks_exact_mut(decoder.vocab_size());
        for (row, (mut text, logits)) in live.into_iter().zip(rows).enumerate() {
            let token = text.choose(config, logits);
            text.tokens.push(token);
            on_token(text.index, token);
            let finished = config.eos_token_id.contains(&token);
            if finished || text.tokens.len() == text.start + text.limit {
                let tokens = text.tokens.split_off(text.start);
                done[text.index] = Some(Generated { tokens, score: None, finished });
            } else {
                going_on.push(text);
                parents.push(row);
            }
        }
        live = going_on;
        if live.is_empty() {
            // Every text has left through `done`.
            return Ok(done.into_iter().flatten().collect());
        }
        let last: Vec<u32> = live.iter().map(|text| text.tokens[text.tokens.len() - 1]).collect();
        decoder.next(&parents, &last, &mut logits)?;
    }
}

impl Text {
    fn choose(&mut self, config: &GenerationConfig, logits: &mut [f32]) -> u32 {
        scores::process(config, &self.tokens, self.start, logits);
        if !config.do_sample {
            return scores::argmax(logits);
        }
        let kept = scores::warp(config, logits);
        let mut u: f64 = self.rng.random();
        for &(token, p) in &kept {
            u -= p;
            if u < 0.0 {
                return token;
            }
        }
        // Rounding left u at the very end; or every token is banned, and then greedy decoding's choice will do.
        kept.last().map_or_else(|| scores::argmax(logits), |&(token, _)| token)
    }
}
