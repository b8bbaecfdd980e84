use crate::{Error, Result};

/// How to generate. Names, meanings and defaults are those of Transformers' `GenerationConfig`,
/// where it has them.
///
/// ```
/// # use lora_model::generate::GenerationConfig;
/// let config = GenerationConfig { do_sample: true, top_p: 0.9, seed: 7, ..Default::default() };
/// assert_eq!(config.num_beams, 1);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The most tokens after a prompt. Default 20.
    pub max_new_tokens: usize,
    /// Draw the next token rather than take the likeliest. Default false.
    pub do_sample: bool,
    /// What the logits are divided by before drawing. Default 1.
    pub temperature: f64,
    /// Draw from the k likeliest tokens only (all that are as likely as the k-th stay too); 0 for all. Default 50.
    pub top_k: usize,
    /// Draw from the likeliest tokens only, as few as are needed to make up this probability. Default 1: from all.
    pub top_p: f64,
    /// What logits of tokens that the text has already (with its prompt) are divided by if positive, multiplied by if
    /// negative; with beams their log-probabilities. Default 1: no penalty.
    pub repetition_penalty: f64,
    /// No run of so many tokens occurs twice in a text with its prompt; 0 to allow it. Default 0.
    pub no_repeat_ngram_size: usize,
    /// Of `no_repeat_ngram_size`: runs that are in the prompt may come once more, and only the text's own count, as in the
    /// code of the LoRA paper, whose texts say the names that their prompts give. Default false: the prompt's count too.
    /// (Transformers has no such option.)
    pub repeat_prompt_ngrams: bool,
    /// Texts that are carried on at the same time; the best is returned. Default 1: no beam search.
    pub num_beams: usize,
    /// Beams compare by the sum of log-probabilities over length^`length_penalty`. Default 1.
    pub length_penalty: f64,
    /// Stop as soon as there are `num_beams` finished texts. Default false: once no beam promises to overtake them.
    pub early_stopping: bool,
    /// Tokens that end a text. Default none: every text gets as long as allowed.
    pub eos_token_id: Vec<u32>,
    /// Seed of the random streams. Default 0.
    pub seed: u64,
    /// The random stream of the first prompt: prompt i draws from stream `first_stream` + i of the seed. Who splits many
    /// prompts into several calls gives each call the number of prompts before it, and gets the texts of a single call.
    /// Default 0. (Transformers has no such option.)
    pub first_stream: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        GenerationConfig {
            max_new_tokens: 20,
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            repeat_prompt_ngrams: false,
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: false,
            eos_token_id: Vec::new(),
            seed: 0,
            first_stream: 0,
        }
    }
}

impl GenerationConfig {
    /// Checks what can be checked without a prompt, whether the option is in use or not.
    ///
    /// # Errors
    /// [`Error::Option`] with the option, its value and what is allowed.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let (positive, beams) = (|x: f64| x.is_finite() && x > 0.0, self.num_beams);
        let at_most = format!("the number of beams is from 1 to the {vocab_size} tokens of the vocabulary");
        let table: [(bool, &'static str, &dyn ToString, &str); 7] = [
            (self.max_new_tokens > 0, "max_new_tokens", &self.max_new_tokens, "generate at least one token"),
            (positive(self.temperature), "temperature", &self.temperature, TEMPERATURE),
            (self.top_p > 0.0 && self.top_p <= 1.0, "top_p", &self.top_p, "a probability over 0, and 1 for no limit"),
            (positive(self.repetition_penalty), "repetition_penalty", &self.repetition_penalty, PENALTY),
            (self.length_penalty.is_finite(), "length_penalty", &self.length_penalty, "a finite number, such as 1"),
            ((1..=vocab_size).contains(&beams), "num_beams", &beams, &at_most),
            (beams == 1 || !self.do_sample, "do_sample", &self.do_sample, BOTH),
        ];
        match table.into_iter().find(|(ok, ..)| !ok) {
            Some((_, option, value, why)) => Err(Error::Option { option, value: value.to_string(), why: why.into() }),
            None => Ok(()),
        }
    }
}

const TEMPERATURE: &str = "a finite number over 0; to always take the likeliest token, do not sample";
const PENALTY: &str = "a finite number over 0, and 1 for no penalty";
const BOTH: &str = "beam search does not draw tokens; turn off sampling, or search with 1 beam";
