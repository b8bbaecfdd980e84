use lora_core::{
    Shares, Tensor,
    peft::{Adapted, VirtualTokens},
};
use lora_kernels::{Device, Sequences};

use crate::{
    Error, Result, Task,
    virtual_rows::{Place, VirtualRows},
};

/// What a model's tables can look up: checked once per batch, so that no kernel meets an id that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_positions: usize,
    /// The position of a sequence's first token: 0, or what RoBERTa begins with.
    pub first_position: usize,
    /// Kinds of segments; 0 where a model does not tell them apart.
    pub segments: usize,
}

/// Sequences to compute on, and what they should give.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// All tokens, one sequence after the other.
    pub tokens: &'a [u32],
    /// The number of tokens of each sequence.
    pub lengths: &'a [usize],
    /// The segment of each token (BERT's `token_type_ids`); 0 for all when absent.
    pub segments: Option<&'a [u32]>,
    /// What is to be predicted.
    pub targets: Targets<'a>,
}

/// What is to be predicted.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// Nothing: a forward pass.
    None,
    /// That token `rows[i]` (counted over all sequences, ascending) predicts `ids[i]`: as the token after it in a causal
    /// model, in its own place in a masked one.
    Tokens {
        /// Rows that predict.
        rows: &'a [u32],
        /// What they predict.
        ids: &'a [u32],
    },
    /// The label of each sequence.
    Labels(&'a [u32]),
    /// The number of each sequence.
    Values(&'a [f32]),
}

impl<'a> Texts<'a> {
    /// For a forward pass without a loss.
    pub fn new(tokens: &'a [u32], lengths: &'a [usize]) -> Texts<'a> {
        Texts { tokens, lengths, segments: None, targets: Targets::None }
    }

    /// With the segment of each token.
    pub fn segments(self, segments: &'a [u32]) -> Texts<'a> {
        Texts { segments: Some(segments), ..self }
    }

    /// With something to predict.
    pub fn targets(self, targets: Targets<'a>) -> Texts<'a> {
        Texts { targets, ..self }
    }
}

/// Sequences as one flat run of tokens, without padding, on the model's device: what a forward pass reads.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub tokens: Tensor,
    /// The position of each row in its sequence, `[rows]`; rows are the tokens and, with some methods, virtual ones.
    pub positions: Tensor,
    /// The segment of each row, in models that tell them apart.
    pub segments: Option<Tensor>,
    /// Where sequences of rows begin and end.
    pub sequences: Sequences,
    /// Virtual rows among the tokens, or among keys and values.
    pub(crate) virtual_rows: Option<VirtualInputs>,
    /// Which rows have which adapter, where the method is several.
    pub(crate) shares: Option<Shares>,
    /// The rows that predict something, `[targets]`.
    pub target_rows: Tensor,
    /// What they should predict, `[targets]`: ids or labels of u32, or numbers.
    pub targets: Tensor,
}

/// [`VirtualRows`] on the device.
#[derive(Clone, Debug)]
pub(crate) struct VirtualInputs {
    pub(crate) place: Place,
    pub(crate) sources: Tensor,
    pub(crate) own: Tensor,
    /// The run's sequences.
    pub(crate) sequences: Sequences,
}

/// A batch on the host.
struct Host<'a> {
    tokens: &'a [u32],
    positions: Vec<u32>,
    segments: Option<Vec<u32>>,
    lengths: Vec<usize>,
    place: Place,
    rows: VirtualRows,
    target_rows: Vec<u32>,
    targets: Values<'a>,
}

enum Values<'a> {
    Ids(&'a [u32]),
    Numbers(&'a [f32]),
}

impl Batch {
    /// `texts` for a model with these limits and this task, under a method.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::TooLong`] for a sequence longer than the positions,
    /// [`Error::NoTokens`] for one without any, [`Error::Label`] and [`Error::Segment`] for numbers that the model does not have.
    ///
    /// # Panics
    /// When the lengths do not add up to the tokens, a target's row is not among them, there is not one label or number
    /// per sequence, the targets are not of the task's kind, or `adapted` is several adapters for another number of sequences.
    pub fn new(device: &Device, limits: Limits, task: Task, adapted: &Adapted, texts: &Texts) -> Result<Batch> {
        let host = Host::new(limits, task, Place::of(adapted), texts)?;
        let ids = |v: &[u32]| Tensor::from_slice(device, &[v.len()], v);
        let virtual_rows = match host.place {
            Place::Nowhere => None,
            place => Some(VirtualInputs {
                place,
                sources: ids(&host.rows.sources)?,
                own: ids(&host.rows.own)?,
                sequences: Sequences::new(&host.rows.lengths),
            }),
        };
        let shares = adapted.of_sequences().map(|of| Shares::new(of, &host.lengths, &targets_of(&host)));
        Ok(Batch {
            shares,
            tokens: ids(host.tokens)?,
            positions: ids(&host.positions)?,
            segments: host.segments.as_deref().map(ids).transpose()?,
            sequences: Sequences::new(&host.lengths),
            virtual_rows,
            target_rows: ids(&host.target_rows)?,
            targets: match host.targets {
                Values::Ids(v) => ids(v)?,
                Values::Numbers(v) => Tensor::from_slice(device, &[v.len()], v)?,
            },
        })
    }

    /// Other texts of the same lengths and number of targets, in the same memory: recorded work reads them there.
    ///
    /// # Errors
    /// As [`Batch::new`]; the batch is then as it was.
    ///
    /// # Panics
    /// As [`Batch::new`], and when there are more or fewer tokens or targets.
    pub fn rewrite(&mut self, limits: Limits, task: Task, adapted: &Adapted, texts: &Texts) -> Result<()> {
        assert!(self.shares.is_none(), "rows of a batch with several adapters are not written anew");
        let host = Host::new(limits, task, Place::of(adapted), texts)?;
        self.tokens.write(host.tokens)?;
        self.positions.write(&host.positions)?;
        if let (Some(to), Some(segments)) = (&mut self.segments, &host.segments) {
            to.write(segments)?;
        }
        if let Some(rows) = &mut self.virtual_rows {
            rows.sources.write(&host.rows.sources)?;
            rows.own.write(&host.rows.own)?;
        }
        self.target_rows.write(&host.target_rows)?;
        match host.targets {
            Values::Ids(v) => Ok(self.targets.write(v)?),
            Values::Numbers(v) => Ok(self.targets.write(v)?),
        }
    }

    /// Number of targets.
    pub fn target_count(&self) -> usize {
        self.targets.len()
    }
}

/// How many target rows lie in each sequence.
fn targets_of(host: &Host) -> Vec<usize> {
    let ends = host.lengths.iter().scan(0, |end, n| {
        *end += n;
        Some(*end)
    });
    let before = ends.map(|end| host.target_rows.partition_point(|&r| (r as usize) < end));
    before.scan(0, |last, n| Some(n - std::mem::replace(last, n))).collect()
}

impl<'a> Host<'a> {
    fn new(limits: Limits, task: Task, place: Place, texts: &Texts<'a>) -> Result<Host<'a>> {
        let Texts { tokens, lengths, segments, targets } = *texts;
        assert_eq!(lengths.iter().sum::<usize>(), tokens.len(), "the lengths add up to the tokens");
        assert!(segments.is_none_or(|s| s.len() == tokens.len()), "one segment per token");
        if let Some(index) = lengths.iter().position(|&n| n == 0) {
            return Err(Error::NoTokens { index });
        }
        limits.check_tokens(tokens)?;
        limits.check_segments(segments.unwrap_or_default())?;
        let starts: Vec<usize> = lengths.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
        // The infix comes before the first token that is to be predicted.
        let splits: Vec<usize> = match (task, targets) {
            (Task::CausalLm, Targets::Tokens { rows, .. }) => (starts.iter().zip(lengths))
                .map(|(&start, &n)| {
                    let first = rows[rows.partition_point(|&r| (r as usize) < start)..].first();
                    first.map_or(n, |&r| (r as usize + 1 - start).min(n))
                })
                .collect(),
            _ => lengths.to_vec(),
        };
        let rows = match place {
            Place::Nowhere => VirtualRows::default(),
            place => VirtualRows::new(lengths, &splits, |_| place.tokens()),
        };
        let whole = if place == Place::Nowhere { lengths } else { &rows.lengths };
        let counted = if place.tokens().uncounted { lengths } else { whole };
        counted.iter().try_for_each(|&n| limits.check_length(n))?;
        let stream = matches!(place, Place::Stream(_));
        let in_run = || counted.iter().flat_map(|&n| 0..n as u32);
        let first = limits.first_position as u32;
        let positions = match place {
            Place::Attention(VirtualTokens { uncounted: false, .. }) => {
                let all: Vec<u32> = in_run().collect();
                rows.own.iter().map(|&r| all[r as usize] + first).collect()
            }
            _ => in_run().map(|p| p + first).collect(),
        };
        let segments = (limits.segments > 0).then(|| {
            let own = |i: usize| segments.map_or(0, |s| s[i]);
            match stream {
                true => rows
                    .sources
                    .iter()
                    .map(|&r| if (r as usize) < tokens.len() { own(r as usize) } else { 0 })
                    .collect(),
                false => (0..tokens.len()).map(own).collect(),
            }
        });
        let row = |r: usize| if stream { rows.own[r] } else { r as u32 };
        let (target_rows, values) = match (task, targets) {
            (_, Targets::None) => (Vec::new(), Values::Ids(&[])),
            (Task::CausalLm | Task::MaskedLm, Targets::Tokens { rows: at, ids }) => {
                assert_eq!(at.len(), ids.len(), "one token per target row");
                assert!(at.is_sorted(), "target rows ascend");
                assert!(at.last().is_none_or(|&r| (r as usize) < tokens.len()), "target rows are rows of the batch");
                limits.check_tokens(ids)?;
                // In a causal model the row before the predicted token: of the infix, where that comes in between.
                let ends: Vec<u32> = whole
                    .iter()
                    .scan(0, |at, &n| {
                        *at += n as u32;
                        Some(*at)
                    })
                    .collect();
                let before_next = |r: usize| {
                    let i = starts.partition_point(|&s| s <= r) - 1;
                    if r + 1 < starts[i] + lengths[i] { row(r + 1) - 1 } else { ends[i] - 1 }
                };
                let map = |&r: &u32| match task {
                    Task::CausalLm if stream => before_next(r as usize),
                    _ => row(r as usize),
                };
                (at.iter().map(map).collect(), Values::Ids(ids))
            }
            (Task::Classification { labels }, Targets::Labels(of)) => {
                assert_eq!(of.len(), lengths.len(), "one label per sequence");
                if let Some(&label) = of.iter().find(|&&l| l as usize >= labels) {
                    return Err(Error::Label { label, labels });
                }
                (Vec::new(), Values::Ids(of))
            }
            (Task::Regression, Targets::Values(of)) => {
                assert_eq!(of.len(), lengths.len(), "one number per sequence");
                (Vec::new(), Values::Numbers(of))
            }
            (task, targets) => panic!("{targets:?} are no targets of {task:?}"),
        };
        // A sequence is judged by its first token, or by the first row that it has with its prefix.
        let VirtualTokens { prefix, classify, .. } = place.tokens();
        let before = if stream && classify { prefix as u32 } else { 0 };
        let target_rows = match task {
            Task::Classification { .. } | Task::Regression => starts.iter().map(|&r| row(r) - before).collect(),
            _ => target_rows,
        };
        let lengths = if stream { rows.lengths.clone() } else { lengths.to_vec() };
        Ok(Host { tokens, positions, segments, lengths, place, rows, target_rows, targets: values })
    }
}

impl Limits {
    /// # Errors
    /// [`Error::Token`] for the first id outside the vocabulary.
    pub fn check_tokens(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&token) => Err(Error::Token { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`Error::TooLong`] for a sequence that is longer than the positions.
    pub fn check_length(&self, length: usize) -> Result<()> {
        if length > self.max_positions {
            return Err(Error::TooLong { length, max_positions: self.max_positions });
        }
        Ok(())
    }

    fn check_segments(&self, segments: &[u32]) -> Result<()> {
        // A model without segments ignores the only one that there is then.
        let most = self.segments.max(1);
        match segments.iter().find(|&&s| s as usize >= most) {
            Some(&segment) => Err(Error::Segment { segment, segments: most }),
            None => Ok(()),
        }
    }
}
