use std::path::Path;

use super::{BertConfig, RawConfig};
use crate::Result;

/// What RoBERTa needs to know (Liu et al. 2019), under the names of its `config.json`: what BERT does, and where
/// positions begin.
///
/// Absent keys take the defaults of Transformers' `RobertaConfig`; the published models are [`RobertaConfig::base`] and
/// [`RobertaConfig::large`].
#[derive(Clone, Debug, PartialEq)]
pub struct RobertaConfig {
    /// The encoder.
    pub bert: BertConfig,
    /// The padding token. A sequence's first token has the position after this number, so that the rows of the table
    /// of positions up to it are never used.
    pub pad_token_id: usize,
}

impl Default for RobertaConfig {
    fn default() -> RobertaConfig {
        RobertaConfig { bert: BertConfig { vocab_size: 50265, ..BertConfig::default() }, pad_token_id: 1 }
    }
}

impl RobertaConfig {
    /// RoBERTa base, 124,055,040 parameters without a head.
    pub fn base() -> RobertaConfig {
        RobertaConfig::published(BertConfig::base())
    }

    /// RoBERTa large, 354,310,144 parameters without a head.
    pub fn large() -> RobertaConfig {
        RobertaConfig::published(BertConfig::large())
    }

    fn published(bert: BertConfig) -> RobertaConfig {
        let bert = BertConfig {
            vocab_size: 50265,
            max_position_embeddings: 514,
            type_vocab_size: 1,
            layer_norm_eps: 1e-5,
            ..bert
        };
        RobertaConfig { bert, pad_token_id: 1 }
    }

    /// Takes what RoBERTa needs out of a configuration, and checks it.
    ///
    /// # Errors
    /// Those of [`BertConfig::from_raw`]; a padding token that leaves no positions.
    pub fn from_raw(raw: &RawConfig) -> Result<RobertaConfig> {
        let d = RobertaConfig::default();
        let pad_token_id = raw.token("pad_token_id")?.map_or(d.pad_token_id, |id| id as usize);
        let config = RobertaConfig { bert: BertConfig::read(raw, d.bert)?, pad_token_id };
        match config.problem() {
            Some(problem) => Err(raw.error("pad_token_id", problem)),
            None => Ok(config),
        }
    }

    /// Checks a configuration that was made rather than read; `path` stands in the message.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for the first value that is impossible.
    pub fn validate(&self, path: &Path) -> Result<()> {
        self.bert.validate(path)?;
        match self.problem() {
            Some(problem) => Err(RawConfig::new(path, Default::default()).error("pad_token_id", problem)),
            None => Ok(()),
        }
    }

    /// The position of a sequence's first token.
    pub fn first_position(&self) -> usize {
        self.pad_token_id + 1
    }

    /// The longest sequence.
    pub fn max_positions(&self) -> usize {
        self.bert.max_position_embeddings - self.first_position()
    }

    fn problem(&self) -> Option<String> {
        let (pad, positions) = (self.pad_token_id, self.bert.max_position_embeddings);
        (pad.saturating_add(1) >= positions).then(|| {
            format!(
                "positions begin after the padding token {pad}, which leaves none of max_position_embeddings = \
                 {positions}"
            )
        })
    }
}
