use std::collections::BTreeSet;

use lora_core::{Result, Tape, Tensor, Var, ops};
use lora_kernels::{Acc, Attention, CachedRows, DType, Device, Sequences, attention_cached, gather, put_rows};

/// What attention looks at in a forward pass: the sequences of the batch alone, or a cache of earlier positions too.
pub enum Context<'a> {
    /// Whole sequences: training and evaluation.
    Whole(&'a Sequences),
    /// The newest positions of sequences whose earlier ones are cached: generation.
    Cached(&'a mut KvCache),
}

impl Context<'_> {
    /// Attention of one layer over its fused projection `qkv`, [rows, (heads + 2·kv_heads)·head_dim].
    pub(crate) fn attend(&mut self, t: &mut Tape, layer: usize, cfg: Attention, qkv: &Var) -> Result<Var> {
        match self {
            Context::Whole(sequences) => ops::attention(t, cfg, sequences, qkv),
            Context::Cached(cache) => {
                let y = cache.attend(layer, cfg, qkv.value())?;
                Ok(t.constant(&y))
            }
        }
    }
}

/// What the keys and values of a model look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Columns of the keys of one layer: heads of keys times their size.
    pub cols: usize,
    /// Query heads for each head of keys.
    pub group: usize,
}

/// Keys and values of all positions so far: per layer a pool of rows, and per sequence the list of its rows. Sequences
/// may share rows, so that a beam that forks copies a list and no tensor.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    /// The pool rows of each sequence, in the order of positions.
    sequences: Vec<Vec<u32>>,
    /// How many of each sequence's last rows the next forward pass computes.
    new: Vec<usize>,
    used: usize,
    /// The lists as attention reads them.
    rows: CachedRows,
    /// What the next forward pass reads besides.
    pub(crate) inputs: Inputs,
    #[cfg(feature = "cuda")]
    pub(crate) recorded: crate::recorded::Recorded,
}

/// The numbers that one forward pass reads, `[rows]` each but for `last`; in memory that keeps its place from one token to
/// the next.
#[derive(Clone)]
pub(crate) struct Inputs {
    /// Token ids.
    pub(crate) tokens: Tensor,
    /// Positions in their sequences.
    pub(crate) positions: Tensor,
    /// Rows of the pools for the new keys and values.
    places: Tensor,
    /// The last row of each sequence.
    pub(crate) last: Tensor,
}

impl KvCache {
    /// An empty cache of `sequences` sequences, with room for `rows` positions (it grows when they are used up).
    pub fn new(device: &Device, dtype: DType, shape: KvShape, sequences: usize, rows: usize) -> Result<KvCache> {
        let pool = || Tensor::empty(device, dtype, &[rows.max(1), shape.cols]);
        let layers = (0..shape.layers).map(|_| Ok((pool()?, pool()?))).collect::<Result<_>>()?;
        let none = Tensor::empty(device, DType::U32, &[0])?;
        Ok(KvCache {
            layers,
            sequences: vec![Vec::new(); sequences],
            new: vec![0; sequences],
            used: 0,
            rows: CachedRows::new(device, shape.group),
            inputs: Inputs { tokens: none.clone(), positions: none.clone(), places: none.clone(), last: none },
            #[cfg(feature = "cuda")]
            recorded: Default::default(),
        })
    }

    /// Positions of a sequence so far.
    pub fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Announces that the next forward pass adds `new[i]` tokens to sequence i. They come sequence by sequence.
    ///
    /// # Panics
    /// When there is not one number per sequence, or the tokens are not as many.
    pub(crate) fn extend(&mut self, tokens: &[u32], new: &[usize]) -> Result<()> {
        assert_eq!(new.len(), self.sequences.len(), "one number per sequence");
        let more: usize = new.iter().sum();
        assert_eq!(more, tokens.len(), "as many tokens as announced");
        if self.used + more > self.layers.first().map_or(usize::MAX, |(k, _)| k.rows()) {
            self.make_room(more)?;
        }
        let first = self.used as u32;
        let (mut positions, mut last) = (Vec::with_capacity(more), Vec::with_capacity(new.len()));
        for (rows, &n) in self.sequences.iter_mut().zip(new) {
            positions.extend((rows.len()..rows.len() + n).map(|p| p as u32));
            last.extend((positions.len() as u32).checked_sub(1));
            rows.extend((self.used..self.used + n).map(|r| r as u32));
            self.used += n;
        }
        self.new = new.to_vec();
        self.rows.set(&self.sequences, new)?;
        let places: Vec<u32> = (first..self.used as u32).collect();
        let Inputs { tokens: t, positions: p, places: r, last: l } = &mut self.inputs;
        for (to, values) in [(t, tokens), (p, &positions), (r, &places), (l, &last)] {
            match to.len() == values.len() {
                true => to.write(values)?,
                false => *to = Tensor::from_slice(&to.device(), &[values.len()], values)?,
            }
        }
        Ok(())
    }

    /// What recorded work depends on, as [`CachedRows::shape`]; with one new token for every sequence it stays the same
    /// from token to token.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows_shape(&self) -> Option<u64> {
        self.new.iter().all(|&n| n == 1).then(|| self.rows.shape())
    }

    /// Makes sequence i a continuation of what sequence `parents[i]` is now: beam search, or dropping finished ones.
    pub fn reorder(&mut self, parents: &[usize]) {
        self.sequences = parents.iter().map(|&p| self.sequences[p].clone()).collect();
        self.new = vec![0; parents.len()];
    }

    /// Moves the rows that a sequence still has into new pools, with room for at least as many again: rows of beams that
    /// were given up are left behind.
    fn make_room(&mut self, more: usize) -> Result<()> {
        let live: BTreeSet<u32> = self.sequences.iter().flatten().copied().collect();
        let live: Vec<u32> = live.into_iter().collect();
        #[cfg(feature = "cuda")]
        self.recorded.forget();
        // All new pools before anything changes: without memory the cache stays as it was.
        let moved = |pool: &Tensor| -> Result<Tensor> {
            let ids = Tensor::from_slice(&pool.device(), &[live.len()], &live)?;
            let mut moved = Tensor::empty(&pool.device(), pool.dtype(), &[2 * (live.len() + more), pool.cols()])?;
            gather(pool.mat(), ids.mat(), Acc { to: moved.make_mut()?.rows_in(0..live.len()), beta: 0.0 })?;
            Ok(moved)
        };
        self.layers = self.layers.iter().map(|(k, v)| Ok((moved(k)?, moved(v)?))).collect::<Result<_>>()?;
        for row in self.sequences.iter_mut().flatten() {
            *row = live.binary_search(row).expect("live rows are those of the sequences") as u32;
        }
        self.used = live.len();
        Ok(())
    }

    /// Stores the new keys and values of a layer and attends over all of them.
    fn attend(&mut self, layer: usize, cfg: Attention, qkv: &Tensor) -> Result<Tensor> {
        let (q_cols, kv_cols) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
        let n: usize = self.new.iter().sum();
        assert_eq!(qkv.rows(), n, "the forward pass has the rows that were announced");
        let part = |from: usize, cols: usize| qkv.mat().cols_in(from..from + cols);
        let (k, v) = &mut self.layers[layer];
        let places = self.inputs.places.mat();
        put_rows(part(q_cols, kv_cols), places, k.make_mut()?)?;
        put_rows(part(q_cols + kv_cols, kv_cols), places, v.make_mut()?)?;
        let mut y = Tensor::empty(&qkv.device(), qkv.dtype(), &[n, q_cols])?;
        attention_cached(&cfg, part(0, q_cols), k.mat(), v.mat(), &self.rows, y.make_mut()?)?;
        Ok(y)
    }
}
