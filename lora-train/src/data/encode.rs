//! Examples to token sequences.

use std::ops::Range;

use lora_model::tokenizer::chat::{Conversation, Message};
use rayon::prelude::*;

use super::error::start_of;
use super::{Content, Corpus, Error, Example, Format, Result};
use crate::metrics::Metric;

/// What goes wrong inside a tokenizer.
pub type EncodeError = Box<dyn std::error::Error + Send + Sync>;

/// What data needs to know of a tokenizer and its model.
pub trait Encode: Sync {
    /// The tokens of `text`, without any special tokens added.
    ///
    /// # Errors
    /// Whatever the tokenizer reports.
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, EncodeError>;

    /// The tokens of a conversation, and which of them the assistant is to say: what the model's chat template makes of it.
    ///
    /// # Errors
    /// No template, which is the default; a template that refuses the conversation.
    fn encode_chat(&self, _messages: &[Message]) -> std::result::Result<Conversation, EncodeError> {
        Err("there is no chat template; train on prompts and completions".into())
    }

    /// The token that begins a text, in models that know one.
    fn begin_of_text(&self) -> Option<u32> {
        None
    }

    /// The token that ends a text, and that separates a prompt from its completion.
    fn end_of_text(&self) -> u32;

    /// How many tokens the *model* knows: the rows of its embedding.
    fn vocab_size(&self) -> usize;
}

/// One training sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// At least one token, or two where tokens are predicted.
    pub tokens: Vec<u32>,
    /// Index of the first token of the second segment; the number of tokens, where there is one segment.
    pub second_from: usize,
    /// What is learned from it.
    pub goal: Goal,
}

/// What is learned from a [`Sequence`].
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// To predict tokens: position `i` predicts `tokens[i + 1]` where `i + 1` is at least this number, which is at least 1
    /// and less than the number of tokens.
    After(usize),
    /// To predict the tokens of these runs: at least one, none empty, ascending and apart, from index 1 on.
    Within(Vec<Range<usize>>),
    /// This label for the whole sequence, counted from 0.
    Label(u32),
    /// This number for the whole sequence.
    Value(f32),
}

impl Sequence {
    /// A sequence whose tokens are predicted from `targets_from` on, an index of at least 1 and less than their number.
    pub fn after(tokens: Vec<u32>, targets_from: usize) -> Sequence {
        Sequence { second_from: tokens.len(), tokens, goal: Goal::After(targets_from) }
    }

    /// Rows that it takes in a [`Batch`](super::Batch).
    pub(super) fn rows(&self) -> usize {
        match self.goal {
            Goal::After(_) | Goal::Within(_) => self.tokens.len() - 1,
            Goal::Label(_) | Goal::Value(_) => self.tokens.len(),
        }
    }

    /// The runs of its tokens that are predicted.
    pub(super) fn predicted(&self) -> impl Iterator<Item = Range<usize>> {
        let (suffix, runs) = match &self.goal {
            Goal::After(from) => (Some(*from..self.tokens.len()), &[][..]),
            Goal::Within(runs) => (None, &runs[..]),
            Goal::Label(_) | Goal::Value(_) => (None, &[][..]),
        };
        suffix.into_iter().chain(runs.iter().cloned())
    }

    /// How many targets it has.
    fn targets(&self) -> usize {
        match self.goal {
            Goal::After(_) | Goal::Within(_) => self.predicted().map(|run| run.len()).sum(),
            Goal::Label(_) | Goal::Value(_) => 1,
        }
    }

    /// Leaves out what comes after `length` tokens.
    fn cut(&mut self, length: usize) {
        self.tokens.truncate(length);
        self.tokens.shrink_to_fit();
        self.second_from = self.second_from.min(length);
        if let Goal::Within(runs) = &mut self.goal {
            runs.iter_mut().for_each(|run| run.end = run.end.min(length));
            runs.retain(|run| !run.is_empty());
        }
    }
}

/// The sequences of one or more files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dataset {
    /// At least one sequence, in the order of the files; all goals are of one kind.
    pub sequences: Vec<Sequence>,
    /// How many examples were longer than the maximum length, and so lost their end.
    pub cut: usize,
    /// How many of those had no target left and were dropped.
    pub dropped: usize,
    /// What predictions are judged by besides the loss.
    pub metrics: &'static [Metric],
    /// The label that F₁ is of.
    pub positive: u32,
}

impl Dataset {
    /// Sequences of which nothing was cut.
    pub fn new(sequences: Vec<Sequence>) -> Dataset {
        Dataset { sequences, ..Dataset::default() }
    }

    /// How many tokens (or labels, or numbers) are predicted in one pass over the data.
    pub fn targets(&self) -> usize {
        self.sequences.iter().map(Sequence::targets).sum()
    }
}

/// Encodes files, one after the other, in parallel and in order.
///
/// - A pair (E2E, and JSONL with `prompt` and `completion`) becomes `BPE(prompt) ⧺ [end] ⧺ BPE(" " + completion) ⧺ [end]`,
///   both sides trimmed, with the loss on the completion and its end token only. This is the form of the LoRA paper's
///   E2E experiments.
/// - JSONL `text` becomes `BPE(text) ⧺ [end]`, with the loss on every token from the second on.
/// - A conversation becomes what the model's chat template writes ([`Encode::encode_chat`]), with nothing added, and with
///   the loss on the assistant's turns: all that it says up to the token that ends its turn.
/// - [`Format::Text`] files make one stream, `BPE(file) ⧺ [end]` for each, which is cut into sequences of `max_length`
///   tokens. Neighbours share one token, the last of one being the first of the next, so every token of the stream but
///   the first is predicted exactly once; nothing is lost, and nothing counts as cut. These sequences come after those
///   of files in other formats.
///
/// Each of them but conversations begins with the [begin of text](Encode::begin_of_text) where the model knows one. A model for which it is
/// the end of text as well gets one of them between two files.
///
/// Pairs, JSONL texts and conversations longer than `max_length` tokens lose their end; what then has no target left is dropped. Both
/// are counted in the result and named in one warning.
///
/// # Errors
/// A `max_length` under 2, no corpus, a tokenizer that fails or that gives tokens outside the vocabulary, conversations for
/// a model without a chat template or that its template refuses, and data of which nothing is left.
pub fn encode(corpora: &[Corpus], encoder: &dyn Encode, max_length: usize) -> Result<Dataset> {
    if max_length < 2 {
        return Err(Error::MaxLength { max_length });
    }
    let Some(first) = corpora.first() else { return Err(Error::NoData) };
    let (end, vocab_size) = (encoder.end_of_text(), encoder.vocab_size());
    if end as usize >= vocab_size {
        return Err(Error::EndOfText { token: end, vocab_size });
    }

    let (mut data, mut examples) = (Dataset::default(), 0);
    let (documents, others): (Vec<&Corpus>, Vec<&Corpus>) = corpora.iter().partition(|c| c.format == Format::Text);
    for corpus in others {
        examples += corpus.examples.len();
        for sequence in in_order(&corpus.examples, |example| sequence(corpus, example, encoder))? {
            data.push_cut(sequence, max_length);
        }
    }
    let documents: Vec<_> = documents.iter().flat_map(|c| c.examples.iter().map(move |e| (*c, e))).collect();
    examples += documents.len();
    let mut stream = Vec::new();
    for tokens in in_order(&documents, |(corpus, example)| document(corpus, example, encoder))? {
        let begin = encoder.begin_of_text().filter(|begin| stream.last() != Some(begin));
        stream.extend(begin);
        stream.extend(tokens);
        stream.push(end);
    }
    data.push_stream(&stream, max_length);

    if data.sequences.is_empty() {
        return Err(Error::NothingLeft { path: first.path.clone(), examples, max_length });
    }
    if data.cut > 0 {
        tracing::warn!(
            "{} of {examples} examples are longer than {max_length} tokens and were cut there{}",
            data.cut,
            match data.dropped {
                0 => String::new(),
                n =>
                    format!("; {n} of them were dropped, because what comes before the first target alone is that long"),
            }
        );
    }
    Ok(data)
}

/// The tokens that ask for a completion of `prompt`, as training put them: `BPE(trimmed prompt) ⧺ [end]`, after the begin
/// of text where there is one.
///
/// # Errors
/// A tokenizer that fails.
pub fn encode_prompt(prompt: &str, encoder: &dyn Encode) -> Result<Vec<u32>> {
    let tokens = encoder.encode(prompt.trim());
    let tokens = tokens.map_err(|source| Error::Prompt { start: start_of(prompt), source })?;
    let mut tokens = begun(encoder, tokens);
    tokens.push(encoder.end_of_text());
    Ok(tokens)
}

impl Dataset {
    fn push_cut(&mut self, mut sequence: Sequence, max_length: usize) {
        if sequence.tokens.len() > max_length {
            self.cut += 1;
            sequence.cut(max_length);
        }
        if sequence.targets() > 0 {
            self.sequences.push(sequence);
        } else {
            self.dropped += 1;
        }
    }

    fn push_stream(&mut self, stream: &[u32], max_length: usize) {
        for start in (0..stream.len().saturating_sub(1)).step_by(max_length - 1) {
            let end = stream.len().min(start + max_length);
            self.sequences.push(Sequence::after(stream[start..end].to_vec(), 1));
        }
    }
}

/// `f` of each item, on all cores and in order. The first fault in the order is the one reported.
pub(super) fn in_order<T: Sync, U: Send>(items: &[T], f: impl Fn(&T) -> Result<U> + Sync + Send) -> Result<Vec<U>> {
    let results: Vec<Result<U>> = items.par_iter().map(f).collect();
    results.into_iter().collect()
}

/// The sequence of an example, as long as it is.
fn sequence(corpus: &Corpus, example: &Example, encoder: &dyn Encode) -> Result<Sequence> {
    let end = encoder.end_of_text();
    let encode = |text: &str| tokens(corpus, example.line, text, encoder);
    Ok(match &example.content {
        Content::Pair { prompt, completion } => {
            let mut tokens = begun(encoder, encode(prompt.trim())?);
            tokens.push(end);
            let targets_from = tokens.len();
            tokens.extend(encode(&format!(" {}", completion.trim()))?);
            tokens.push(end);
            Sequence::after(tokens, targets_from)
        }
        Content::Labelled { .. } => return Err(Error::NeedsTask { path: corpus.path.clone() }),
        Content::Text(text) => {
            let mut tokens = begun(encoder, encode(text)?);
            tokens.push(end);
            Sequence::after(tokens, 1)
        }
        Content::Chat(messages) => {
            let (path, line) = (|| corpus.path.clone(), example.line);
            let encoded = encoder.encode_chat(messages);
            let Conversation { tokens, turns } =
                encoded.map_err(|source| Error::Template { path: path(), line, source })?;
            check(corpus, line, &tokens, encoder)?;
            // Nothing comes before the first token that could predict it.
            let turns = turns.into_iter().map(|turn| turn.start.max(1)..turn.end).filter(|turn| !turn.is_empty());
            Sequence { second_from: tokens.len(), tokens, goal: Goal::Within(turns.collect()) }
        }
    })
}

/// Tokens after the begin of text, where there is one.
fn begun(encoder: &dyn Encode, tokens: Vec<u32>) -> Vec<u32> {
    encoder.begin_of_text().into_iter().chain(tokens).collect()
}

fn tokens(corpus: &Corpus, line: usize, text: &str, encoder: &dyn Encode) -> Result<Vec<u32>> {
    let tokens = encoder.encode(text);
    let tokens = tokens.map_err(|source| Error::Tokenizer { path: corpus.path.clone(), line, source })?;
    check(corpus, line, &tokens, encoder)?;
    Ok(tokens)
}

/// Refuses tokens that the model does not know.
fn check(corpus: &Corpus, line: usize, tokens: &[u32], encoder: &dyn Encode) -> Result<()> {
    let vocab_size = encoder.vocab_size();
    match tokens.iter().find(|&&t| t as usize >= vocab_size) {
        Some(&token) => Err(Error::OutsideVocabulary { path: corpus.path.clone(), line, token, vocab_size }),
        None => Ok(()),
    }
}

/// The tokens of a whole file. A fault is narrowed down to the first line that shows it alone.
fn document(corpus: &Corpus, example: &Example, encoder: &dyn Encode) -> Result<Vec<u32>> {
    let Content::Text(text) = &example.content else { return Ok(sequence(corpus, example, encoder)?.tokens) };
    tokens(corpus, example.line, text, encoder).map_err(|error| {
        let mut lines = text.split('\n').enumerate();
        let first = lines.find_map(|(i, line)| tokens(corpus, example.line + i, line, encoder).err());
        first.unwrap_or(error)
    })
}
