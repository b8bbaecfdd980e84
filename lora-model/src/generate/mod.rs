//! Text from a model, one token after the other, with a cache of keys and values: greedy, sampled, or by beam search.
//! Options carry the names and the meaning that they have in Transformers.

mod beam;
mod config;
mod end;
mod sample;
mod scores;

use lora_core::peft::Adapted;

use crate::{Error, KvCache, Model, Result, Task};

pub use config::GenerationConfig;
pub use end::{end_tokens, unasked};
pub use scores::distribution;

/// What was generated after one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The new tokens alone, with the end token if there was one.
    pub tokens: Vec<u32>,
    /// Of beam search: the sum of the tokens' log-probabilities over (number of tokens)^`length_penalty`.
    pub score: Option<f64>,
    /// Whether it ends with an end token; otherwise it was as long as allowed.
    pub finished: bool,
}

/// Continues every prompt. Prompts run in one batch, whatever their lengths, without padding; a finished one leaves it.
/// Each has a random stream of its own (by `config.seed`, `config.first_stream` and its index), so that its text does not
/// depend on the others.
///
/// `on_token` gets each new token and the index of its prompt as soon as it is certain: with beams, at the prompt's end.
///
/// # Errors
/// As of [`check`], and [`Error::NotFinite`] when the model puts out NaN or infinity. A prompt that leaves fewer positions
/// than `max_new_tokens` gets only so many, with a warning.
pub fn generate(
    model: &dyn Model,
    adapted: &Adapted,
    prompts: &[Vec<u32>],
    config: &GenerationConfig,
    on_token: Option<&mut dyn FnMut(usize, u32)>,
) -> Result<Vec<Generated>> {
    let requests = requests(model, adapted, prompts, config)?;
    warn_of_cut(&requests, config, &place(model, adapted));
    let mut ignore = |_, _| ();
    let on_token = on_token.unwrap_or(&mut ignore);
    match (requests.len(), config.num_beams) {
        (0, _) => Ok(Vec::new()),
        (_, 1) => sample::run(Decoder::new(model, adapted, &requests, 1)?, &requests, config, on_token),
        (_, beams) => beam::run(Decoder::new(model, adapted, &requests, beams)?, &requests, config, on_token),
    }
}

/// Finds out, before anything is computed, whether [`generate`] would refuse its configuration or one of its prompts.
///
/// # Errors
/// [`Error::Task`] for a model that does not continue texts; [`Error::Option`] for a configuration that makes no sense;
/// [`Error::Prompt`], with its index, for a prompt without tokens, one that leaves no position free, and one with an id
/// outside the vocabulary.
pub fn check(model: &dyn Model, adapted: &Adapted, prompts: &[Vec<u32>], config: &GenerationConfig) -> Result<()> {
    requests(model, adapted, prompts, config).map(drop)
}

/// A prompt that was checked, and how many tokens may follow it.
#[derive(Clone, Copy)]
struct Request<'a> {
    prompt: &'a [u32],
    limit: usize,
}

fn requests<'a>(
    model: &dyn Model,
    adapted: &Adapted,
    prompts: &'a [Vec<u32>],
    config: &GenerationConfig,
) -> Result<Vec<Request<'a>>> {
    if model.task() != Task::CausalLm {
        return Err(Error::Task { task: model.task().name(), what: "continue text" });
    }
    config.check(model.limits().vocab_size)?;
    let positions = model.free_positions(adapted);
    let request = |(index, prompt): (usize, &'a Vec<u32>)| {
        let refuse = |problem: String| Err(Error::Prompt { index, problem });
        if prompt.is_empty() {
            return refuse("it has no tokens; begin with at least one, such as the end-of-text token".into());
        }
        if let Err(e) = model.limits().check_tokens(prompt) {
            return refuse(e.to_string());
        }
        let free = positions.saturating_sub(prompt.len());
        if free == 0 {
            let n = prompt.len();
            return refuse(format!("its {n} tokens leave none of {} free; shorten it", place(model, adapted)));
        }
        Ok(Request { prompt, limit: config.max_new_tokens.min(free) })
    };
    prompts.iter().enumerate().map(request).collect()
}

/// The positions that a text can take, in words.
fn place(model: &dyn Model, adapted: &Adapted) -> String {
    let (all, free) = (model.limits().max_positions, model.free_positions(adapted));
    match all - free {
        0 => format!("the model's {all} positions"),
        n => format!("the {free} of the model's {all} positions that the adapter's {n} virtual tokens leave"),
    }
}

fn warn_of_cut(requests: &[Request], config: &GenerationConfig, place: &str) {
    let wanted = config.max_new_tokens;
    let cut = requests.iter().filter(|r| r.limit < wanted).count();
    if cut > 0 {
        tracing::warn!(
            "{cut} of {} prompts leave fewer than max_new_tokens = {wanted} of {place} free and get as many tokens as fit",
            requests.len()
        );
    }
}

/// The model with a cache of what it has read.
struct Decoder<'a> {
    model: &'a dyn Model,
    adapted: &'a Adapted,
    cache: KvCache,
}

impl<'a> Decoder<'a> {
    /// With room for the prompts and the first stretch of `width` texts after each.
    fn new(model: &'a dyn Model, adapted: &'a Adapted, requests: &[Request], width: usize) -> Result<Decoder<'a>> {
        const STRETCH: usize = 64;
        let virtual_rows = model.limits().max_positions - model.free_positions(adapted);
        let rows = requests.iter().map(|r| virtual_rows + r.prompt.len() + width * r.limit.min(STRETCH)).sum();
        Ok(Decoder { model, adapted, cache: model.cache(requests.len(), rows)? })
    }

    /// Reads the prompts: the logits after each, [prompts, vocabulary].
    fn prompts(&mut self, requests: &[Request], logits: &mut Vec<f32>) -> Result<()> {
        let tokens: Vec<u32> = requests.iter().flat_map(|r| r.prompt).copied().collect();
        let new: Vec<usize> = requests.iter().map(|r| r.prompt.len()).collect();
        self.step(&tokens, &new, logits)
    }

    /// Goes on from the sequences `parents` with a token each: the logits after it, [tokens, vocabulary].
    fn next(&mut self, parents: &[usize], tokens: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        self.cache.reorder(parents);
        self.step(tokens, &vec![1; tokens.len()], logits)
    }

    fn step(&mut self, tokens: &[u32], new: &[usize], logits: &mut Vec<f32>) -> Result<()> {
        let Decoder { model, adapted, cache } = self;
        model.device().run(|| Ok::<_, Error>(model.step(adapted, cache, tokens, new)?.read(logits)?))?;
        match scores::all_finite(logits) {
            true => Ok(()),
            false => Err(Error::NotFinite),
        }
    }

    fn vocab_size(&self) -> usize {
        self.model.limits().vocab_size
    }
}
