use std::collections::BTreeSet;

use lora_core::{Result, Tape, Tensor, Var, ops};
use lora_kernels::{Acc, Attention, DType, Device, Sequences, attention_cached, axpby, gather};

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

/// Keys and values of all positions so far: per layer a pool of rows, and per sequence the list of its rows. Sequences
/// may share rows, so that a beam that forks copies a list and no tensor.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    /// The pool rows of each sequence, in the order of positions.
    sequences: Vec<Vec<u32>>,
    /// How many of each sequence's last rows the next forward pass computes.
    new: Vec<usize>,
    used: usize,
}

impl KvCache {
    /// An empty cache of `sequences` sequences for `layers` layers of `cols` columns of keys, with room for `rows` positions (it grows when they
    /// are used up).
    pub fn new(
        device: &Device,
        dtype: DType,
        (layers, cols): (usize, usize),
        sequences: usize,
        rows: usize,
    ) -> Result<KvCache> {
        let pool = || Tensor::empty(device, dtype, &[rows.max(1), cols]);
        let layers = (0..layers).map(|_| Ok((pool()?, pool()?))).collect::<Result<_>>()?;
        Ok(KvCache { layers, sequences: vec![Vec::new(); sequences], new: vec![0; sequences], used: 0 })
    }

    /// Positions of a sequence so far.
    pub fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Announces that the next forward pass adds `new[i]` positions to sequence i. Its rows come sequence by sequence.
    ///
    /// # Panics
    /// When there is not one number per sequence.
    pub fn extend(&mut self, new: &[usize]) -> Result<()> {
        assert_eq!(new.len(), self.sequences.len(), "one number per sequence");
        let more: usize = new.iter().sum();
        if self.used + more > self.layers.first().map_or(usize::MAX, |(k, _)| k.rows()) {
            self.make_room(more)?;
        }
        for (rows, &n) in self.sequences.iter_mut().zip(new) {
            rows.extend((self.used..self.used + n).map(|r| r as u32));
            self.used += n;
        }
        self.new = new.to_vec();
        Ok(())
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
        for row in self.sequences.iter_mut().flatten() {
            *row = live.binary_search(row).expect("live rows are those of the sequences") as u32;
        }
        self.used = live.len();
        for pool in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let ids = Tensor::from_slice(&pool.device(), &[live.len()], &live)?;
            let mut moved = Tensor::empty(&pool.device(), pool.dtype(), &[2 * (live.len() + more), pool.cols()])?;
            gather(pool.mat(), ids.mat(), Acc { to: moved.make_mut()?.rows_in(0..live.len()), beta: 0.0 })?;
            *pool = moved;
        }
        Ok(())
    }

    /// Stores the new keys and values of a layer and attends over all of them.
    fn attend(&mut self, layer: usize, cfg: Attention, qkv: &Tensor) -> Result<Tensor> {
        let (q_cols, kv_cols) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
        let n: usize = self.new.iter().sum();
        assert_eq!(qkv.rows(), n, "the forward pass has the rows that were announced");
        let part = |from: usize, cols: usize| qkv.mat().cols_in(from..from + cols);
        let rows = self.used - n..self.used;
        let (k, v) = &mut self.layers[layer];
        axpby(1.0, part(q_cols, kv_cols), 0.0, k.make_mut()?.rows_in(rows.clone()))?;
        axpby(1.0, part(q_cols + kv_cols, kv_cols), 0.0, v.make_mut()?.rows_in(rows))?;
        let mut y = Tensor::empty(&qkv.device(), qkv.dtype(), &[n, q_cols])?;
        let lists: Vec<&[u32]> = self.sequences.iter().map(Vec::as_slice).collect();
        attention_cached(&cfg, part(0, q_cols), k.mat(), v.mat(), &lists, &self.new, y.make_mut()?)?;
        Ok(y)
    }
}
