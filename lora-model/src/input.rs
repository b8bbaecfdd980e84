use std::cell::RefCell;

use lora_core::{Result, Tape, Tensor, Var, ops, ops::Qkv, peft::Adapted};
use lora_kernels::{Attention, Dropout, Sequences};

use crate::{Batch, KvCache, batch::VirtualInputs, layers::Weight, virtual_rows::Place};

/// What one forward pass reads: the tokens, and what attention looks at.
pub struct Input<'a> {
    tokens: Tensor,
    positions: Tensor,
    segments: Option<Tensor>,
    virtual_rows: Option<VirtualInputs>,
    /// The rows that are looked at in the end, when not all are.
    wanted: Option<Tensor>,
    context: Context<'a>,
    /// Keys and values of virtual rows, which all layers read.
    prefix: Option<Var>,
}

enum Context<'a> {
    /// Whole sequences: training and evaluation.
    Whole(&'a Sequences),
    /// The newest positions of sequences whose earlier ones are cached: generation.
    Cached(&'a mut KvCache),
}

impl<'a> Input<'a> {
    /// Whole sequences.
    pub fn whole(batch: &'a Batch) -> Input<'a> {
        Input {
            tokens: batch.tokens.clone(),
            positions: batch.positions.clone(),
            segments: batch.segments.clone(),
            virtual_rows: batch.virtual_rows.clone(),
            wanted: None,
            context: Context::Whole(&batch.sequences),
            prefix: None,
        }
    }

    /// With these rows alone looked at in the end, in this order: ids of rows, `[wanted]`.
    pub fn only(self, rows: &Tensor) -> Input<'a> {
        Input { wanted: Some(rows.clone()), ..self }
    }

    /// The tokens that a cache was extended by, of which the last ones of each sequence are looked at.
    pub(crate) fn cached(cache: &'a mut KvCache) -> Input<'a> {
        let inputs = cache.inputs.clone();
        // A single new row of each sequence is its last.
        let all = inputs.last.len() == inputs.positions.len();
        Input {
            wanted: (!all).then_some(inputs.last),
            tokens: inputs.tokens,
            positions: inputs.positions,
            segments: None,
            virtual_rows: inputs.virtual_rows,
            context: Context::Cached(cache),
            prefix: None,
        }
    }

    /// The embeddings of the tokens, and of virtual ones among them: [rows, d]. A pass begins with them.
    pub fn embed(&mut self, t: &mut Tape, adapted: &Adapted, table: &Weight) -> Result<Var> {
        if self.in_attention() {
            self.prefix = adapted.keys_values(t)?;
        }
        let x = table.rows(t, adapted, &self.tokens)?;
        let Some(VirtualInputs { place: Place::Stream(_), sources, .. }) = &self.virtual_rows else { return Ok(x) };
        let Some(rows) = adapted.token_embeddings(t)? else { return Ok(x) };
        let x = ops::concat_rows(t, &x, &rows)?;
        ops::gather(t, &x, sources)
    }

    /// Of values of all rows those of the rows that are looked at in the end. After attention of its last layer nothing
    /// that a model computes goes from row to row, so there it asks for these rows of all that it goes on with, and
    /// computes no other.
    pub fn wanted<const N: usize>(&self, t: &mut Tape, x: [Var; N]) -> Result<[Var; N]> {
        let Some(rows) = &self.wanted else { return Ok(x) };
        t.go_on_with_target_rows();
        let mut wanted = x;
        for x in &mut wanted {
            *x = ops::gather(t, x, rows)?;
        }
        Ok(wanted)
    }

    /// The position of each row.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// The segment of each row, in models that tell them apart.
    pub fn segments(&self) -> Option<&Tensor> {
        self.segments.as_ref()
    }

    /// The whole sequences of the pass, for attention of another kind than [`Input::attend`].
    ///
    /// # Panics
    /// When the pass reads a cache, or virtual keys and values.
    pub fn sequences(&self) -> &Sequences {
        assert!(!self.in_attention(), "virtual keys and values in attention that has no place for them");
        match &self.context {
            Context::Whole(sequences) => sequences,
            Context::Cached(_) => panic!("whole sequences of a cache"),
        }
    }

    fn in_attention(&self) -> bool {
        self.virtual_rows.as_ref().is_some_and(|v| matches!(v.place, Place::Attention(_)))
    }

    /// A layer: the stream after it, which f makes of the stream h before it. With [checkpoints](Tape::with_checkpoints) it is
    /// not kept for the way back, but computed once more.
    pub(crate) fn layer<'m>(
        &mut self,
        t: &mut Tape<'m>,
        h: Var,
        f: impl Fn(&mut Tape<'m>, Var, &mut Input) -> Result<Var> + 'm,
    ) -> Result<Var>
    where
        'a: 'm,
    {
        let Context::Whole(sequences) = self.context else { return f(t, h, self) };
        if !t.checkpoints() {
            return f(t, h, self);
        }
        let input = RefCell::new(Input {
            tokens: self.tokens.clone(),
            positions: self.positions.clone(),
            segments: self.segments.clone(),
            virtual_rows: self.virtual_rows.clone(),
            wanted: self.wanted.clone(),
            context: Context::Whole(sequences),
            prefix: self.prefix.as_ref().map(Var::share),
        });
        t.checkpoint(h, move |t, h| f(t, h, &mut input.borrow_mut()))
    }

    /// Attention of one layer: [rows, heads·head_dim].
    pub fn attend(&mut self, t: &mut Tape, adapted: &Adapted, layer: usize, cfg: Attention, qkv: Qkv) -> Result<Var> {
        if !self.in_attention() {
            return match &mut self.context {
                Context::Whole(sequences) => ops::attention(t, cfg, sequences, qkv),
                Context::Cached(cache) => cached(t, cache, layer, cfg, qkv),
            };
        }
        // Attention has more rows than the stream, and its masks count them.
        let more = t.virtual_rows_before(adapted.attention_tokens().count());
        let dropout = cfg.dropout.map(|d| Dropout { row_offset: d.row_offset.wrapping_add(more), ..d });
        let cfg = Attention { dropout, ..cfg };
        let (prefix, rows) = (self.prefix.as_ref(), self.virtual_rows.as_ref());
        let (prefix, rows) = prefix.zip(rows).expect("virtual rows come from keys and values");
        let (q_cols, kv_cols) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
        let split;
        let (q, k, v) = match qkv {
            Qkv::Separate { q, k, v } => (q, k, v),
            Qkv::Fused(qkv) => {
                split = [
                    ops::columns(t, qkv, 0..q_cols)?,
                    ops::columns(t, qkv, q_cols..q_cols + kv_cols)?,
                    ops::columns(t, qkv, q_cols + kv_cols..q_cols + 2 * kv_cols)?,
                ];
                (&split[0], &split[1], &split[2])
            }
        };
        // The rows of the run: own ones and, between them, virtual ones.
        let between = |t: &mut Tape, own: &Var, part: usize| {
            let from = (2 * layer + part) * kv_cols;
            let virtual_rows = ops::columns(t, prefix, from..from + kv_cols)?;
            let all = ops::concat_rows(t, own, &virtual_rows)?;
            ops::gather(t, &all, &rows.sources)
        };
        let (k, v) = (between(t, k, 0)?, between(t, v, 1)?);
        // What a virtual row would ask for is never looked at: zeros stand in for it.
        let none = t.constant(&Tensor::zeros(&t.device(), q.value().dtype(), &[prefix.value().rows(), q_cols])?);
        let q = ops::concat_rows(t, q, &none)?;
        let q = ops::gather(t, &q, &rows.sources)?;
        let qkv = Qkv::Separate { q: &q, k: &k, v: &v };
        let y = match &mut self.context {
            Context::Whole(_) => ops::attention(t, cfg, &rows.sequences, qkv)?,
            Context::Cached(cache) => cached(t, cache, layer, cfg, qkv)?,
        };
        ops::gather(t, &y, &rows.own)
    }
}

fn cached(t: &mut Tape, cache: &mut KvCache, layer: usize, cfg: Attention, qkv: Qkv) -> Result<Var> {
    let [q, k, v] = qkv.mats(&cfg);
    let y = cache.attend(layer, cfg, q, k, v)?;
    Ok(t.constant(&y))
}
