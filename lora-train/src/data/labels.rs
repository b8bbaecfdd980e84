//! Labelled examples to token sequences.

use std::collections::BTreeSet;

use lora_model::tokenizer::Joined;

use super::{
    Answer, Content, Corpus, Dataset, EncodeError, Error, Example, Goal, Result, Sequence, TaskKind, TaskRow,
    encode::in_order, error::start_of,
};

/// What labelled data needs to know of a tokenizer and its model.
pub trait Join: Sync {
    /// The tokens of a text or a pair, between the tokens that the model wants around them, at most `max_length` in all.
    ///
    /// # Errors
    /// Whatever the tokenizer reports.
    fn join(&self, text: &str, second: Option<&str>, max_length: usize) -> std::result::Result<Joined, EncodeError>;

    /// How many tokens stand around a text, or a pair.
    fn around(&self, pair: bool) -> usize;

    /// How many tokens the *model* knows: the rows of its embedding.
    fn vocab_size(&self) -> usize;
}

/// The names of a classifier's labels, in the order of its outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels(Vec<String>);

impl Labels {
    /// These names, in this order.
    pub fn new(names: Vec<String>) -> Labels {
        Labels(names)
    }

    /// Those of a task: its own, or those of the training data, in the order of numbers where all are whole numbers, else
    /// in that of the alphabet. `None` for a task of numbers.
    ///
    /// # Errors
    /// [`Error::OneLabel`].
    pub fn of(task: &TaskRow, training: &Corpus) -> Result<Option<Labels>> {
        let names = match task.kind {
            TaskKind::Values | TaskKind::Completions => return Ok(None),
            TaskKind::Labels(names) if !names.is_empty() => names.iter().map(|n| n.to_string()).collect(),
            TaskKind::Labels(_) => of_corpus(training),
        };
        match <[String; 1]>::try_from(names) {
            Ok([label]) => Err(Error::OneLabel { path: training.path.clone(), label: start_of(&label) }),
            Err(names) => Ok(Some(Labels(names))),
        }
    }

    /// The names.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// The same labels in the order of `names`, where those are the same names but for the case of their letters.
    pub fn ordered_as(&self, names: &[String]) -> Option<Labels> {
        let ordered: Option<Vec<String>> = names
            .iter()
            .map(|name| self.0.iter().find(|own| own.to_lowercase() == name.to_lowercase()).cloned())
            .collect();
        let ordered = ordered.filter(|o| o.iter().collect::<BTreeSet<_>>().len() == self.0.len());
        ordered.filter(|o| o.len() == self.0.len()).map(Labels)
    }

    /// Refuses a file with labels that are none of these.
    ///
    /// # Errors
    /// [`Error::UnknownLabel`].
    pub fn check(&self, corpus: &Corpus) -> Result<()> {
        corpus.examples.iter().try_for_each(|e| match &e.content {
            Content::Labelled { answer: Answer::Label(name), .. } => self.expect(corpus, e.line, name).map(drop),
            _ => Ok(()),
        })
    }

    /// The number of a label on a line of a file.
    fn expect(&self, corpus: &Corpus, line: usize, name: &str) -> Result<u32> {
        let index = self.0.iter().position(|own| own == name);
        index.map(|i| i as u32).ok_or_else(|| Error::UnknownLabel {
            path: corpus.path.clone(),
            line,
            column: 0,
            found: start_of(name),
            known: self.0.clone(),
        })
    }
}

/// All labels of a file.
fn of_corpus(corpus: &Corpus) -> Vec<String> {
    let labels = corpus.examples.iter().filter_map(|e| match &e.content {
        Content::Labelled { answer: Answer::Label(name), .. } => Some(name.clone()),
        _ => None,
    });
    let mut names: Vec<String> = labels.collect::<BTreeSet<_>>().into_iter().collect();
    let examples = corpus.examples.len();
    if names.len() > 8 && 2 * names.len() > examples {
        tracing::warn!(
            "{}: {} different labels in {examples} examples; if the label stands first, give headings: label and text",
            corpus.path.display(),
            names.len()
        );
    }
    // By their numbers, "10" comes after "9".
    if let Some(mut numbered) =
        names.iter().map(|n| Some((n.parse::<i64>().ok()?, n.clone()))).collect::<Option<Vec<_>>>()
    {
        numbered.sort();
        names = numbered.into_iter().map(|(_, name)| name).collect();
    }
    names
}

/// Encodes the examples of a task, in parallel and in order. What is longer than `max_length` tokens is cut, of a pair the
/// longer text first; the tokens around the texts stay.
///
/// # Errors
/// A label that is none of `labels`, a `max_length` without room for text, a tokenizer that fails or that gives tokens
/// outside the vocabulary.
///
/// # Panics
/// For examples that are no task's, and for labels without `labels`.
pub fn encode_task(
    corpus: &Corpus,
    task: &TaskRow,
    labels: Option<&Labels>,
    join: &dyn Join,
    max_length: usize,
) -> Result<Dataset> {
    let pairs = corpus.examples.iter().any(|e| matches!(&e.content, Content::Labelled { second: Some(_), .. }));
    let least = join.around(pairs) + 1 + usize::from(pairs);
    if max_length < least {
        return Err(Error::NoRoom { max_length, least });
    }
    let encoded = in_order(&corpus.examples, |example| sequence(corpus, example, labels, join, max_length))?;
    let cut = encoded.iter().filter(|(_, cut)| *cut).count();
    if cut > 0 {
        let examples = corpus.examples.len();
        tracing::warn!("{cut} of {examples} examples are longer than {max_length} tokens and were cut to that");
    }
    let sequences = encoded.into_iter().map(|(sequence, _)| sequence).collect();
    // Whichever output of the head it is: a base may have its labels in another order.
    let positive = labels.and_then(|l| l.names().iter().position(|name| name == "1")).unwrap_or(1) as u32;
    Ok(Dataset { sequences, cut, dropped: 0, metrics: task.metrics, positive })
}

/// The sequence of an example, and whether something was cut.
fn sequence(
    corpus: &Corpus,
    example: &Example,
    labels: Option<&Labels>,
    join: &dyn Join,
    max_length: usize,
) -> Result<(Sequence, bool)> {
    let (path, line) = (|| corpus.path.clone(), example.line);
    let Content::Labelled { text, second, answer } = &example.content else {
        panic!("examples of a task, as read_task gives them");
    };
    let goal = match (answer, labels) {
        (Answer::Value(value), _) => Goal::Value(*value),
        (Answer::Label(name), Some(labels)) => Goal::Label(labels.expect(corpus, line, name)?),
        (Answer::Label(_), None) => panic!("a task of labels has some: Labels::of"),
    };
    let joined = join.join(text, second.as_deref(), max_length);
    let Joined { ids, second_from, cut } = joined.map_err(|source| Error::Tokenizer { path: path(), line, source })?;
    if ids.is_empty() {
        return Err(Error::NoTokens { path: path(), line });
    }
    let vocab_size = join.vocab_size();
    if let Some(&token) = ids.iter().find(|&&t| t as usize >= vocab_size) {
        return Err(Error::OutsideVocabulary { path: path(), line, token, vocab_size });
    }
    Ok((Sequence { tokens: ids, second_from, goal }, cut))
}
