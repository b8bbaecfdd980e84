use std::collections::BTreeSet;

use lora_core::{Result, Shares, Tensor, peft::VirtualTokens};
use lora_kernels::{Acc, Attention, CachedRows, DType, Device, Mat, Sequences, attention_cached, gather, put_rows};

use crate::{
    Limits,
    batch::VirtualInputs,
    virtual_rows::{Place, VirtualRows},
};

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
    /// Which of several adapters each sequence has, once it has begun with them.
    of: Option<Vec<Option<usize>>>,
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
    /// Virtual rows, where a sequence begins with some.
    pub(crate) virtual_rows: Option<VirtualInputs>,
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
            of: None,
            used: 0,
            rows: CachedRows::new(device, shape.group),
            inputs: Inputs {
                tokens: none.clone(),
                positions: none.clone(),
                places: none.clone(),
                last: none,
                virtual_rows: None,
            },
            #[cfg(feature = "cuda")]
            recorded: Default::default(),
        })
    }

    /// Positions of a sequence so far, virtual tokens included.
    pub fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Announces that the next forward pass adds `new[i]` tokens to sequence i, and virtual ones to those that begin. The
    /// tokens come sequence by sequence. `of` has the adapter of each sequence where they are several; it is read once, and
    /// from then on they go where [`KvCache::reorder`] takes the sequences.
    ///
    /// # Panics
    /// When there is not one number, and one adapter, per sequence, or the tokens are not as many.
    pub(crate) fn extend(
        &mut self,
        limits: Limits,
        place: Place,
        of: Option<&[Option<usize>]>,
        tokens: &[u32],
        new: &[usize],
    ) -> Result<()> {
        assert_eq!(new.len(), self.sequences.len(), "one number per sequence");
        if self.of.is_none() {
            self.of = of.map(<[_]>::to_vec);
        }
        assert_eq!(new.iter().sum::<usize>(), tokens.len(), "as many tokens as announced");
        let begins: Vec<bool> = self.sequences.iter().map(Vec::is_empty).collect();
        // After the whole of the prompt.
        let virtual_rows = (place != Place::Nowhere && begins.contains(&true))
            .then(|| VirtualRows::new(new, new, |i| if begins[i] { place.tokens() } else { VirtualTokens::default() }));
        let rows_of = virtual_rows.as_ref().map_or(new, |v| &v.lengths);
        let more: usize = rows_of.iter().sum();
        if self.used + more > self.layers.first().map_or(usize::MAX, |(k, _)| k.rows()) {
            self.make_room(more)?;
        }
        let first = self.used as u32;
        let mut positions = Vec::with_capacity(more);
        for (rows, &n) in self.sequences.iter_mut().zip(rows_of) {
            positions.extend((rows.len()..rows.len() + n).map(|p| (p + limits.first_position) as u32));
            rows.extend((self.used..self.used + n).map(|r| r as u32));
            self.used += n;
        }
        self.new = rows_of.to_vec();
        self.rows.set(&self.sequences, &self.new)?;
        // The rows that layers compute: those of attention alone are no part of the stream.
        let mut stream = rows_of;
        if let (Place::Attention(_), Some(v)) = (place, &virtual_rows) {
            positions = v.own.iter().map(|&r| positions[r as usize]).collect();
            stream = new;
        }
        if place.tokens().uncounted {
            // All sequences have begun by now, each with its virtual rows.
            let own = |(rows, &n): (&Vec<u32>, &usize)| {
                let end = rows.len() - place.tokens().count() + limits.first_position;
                (end - n..end).map(|p| p as u32)
            };
            positions = self.sequences.iter().zip(new).flat_map(own).collect();
        }
        let ends = stream.iter().scan(0u32, |at, &n| {
            *at += n as u32;
            Some(*at)
        });
        let last: Vec<u32> = ends.filter_map(|end| end.checked_sub(1)).collect();
        let places: Vec<u32> = (first..self.used as u32).collect();
        let device = self.inputs.tokens.device();
        self.inputs.virtual_rows = match virtual_rows {
            None => None,
            Some(v) => {
                let ids = |v: &[u32]| Tensor::from_slice(&device, &[v.len()], v);
                let (sources, own) = (ids(&v.sources)?, ids(&v.own)?);
                Some(VirtualInputs { place, sources, own, sequences: Sequences::new(&v.lengths) })
            }
        };
        let Inputs { tokens: t, positions: p, places: r, last: l, .. } = &mut self.inputs;
        for (to, values) in [(t, tokens), (p, &positions), (r, &places), (l, &last)] {
            match to.len() == values.len() {
                true => to.write(values)?,
                false => *to = Tensor::from_slice(&to.device(), &[values.len()], values)?,
            }
        }
        Ok(())
    }

    /// Which rows of the next forward pass have which adapter, where they are several. One row of each sequence is looked at.
    pub(crate) fn shares(&self) -> Option<Shares> {
        let of = self.of.as_ref()?;
        Some(Shares::new(of, &self.new, &vec![1; of.len()]))
    }

    /// What recorded work depends on, as [`CachedRows::shape`]; with one new token for every sequence it stays the same
    /// from token to token. Not where sequences have different adapters: the rows of each change as sequences end.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows_shape(&self) -> Option<u64> {
        let same = self.new.iter().all(|&n| n == 1) && self.of.is_none();
        same.then(|| self.rows.shape())
    }

    /// Makes sequence i a continuation of what sequence `parents[i]` is now: beam search, or dropping finished ones.
    pub fn reorder(&mut self, parents: &[usize]) {
        self.sequences = parents.iter().map(|&p| self.sequences[p].clone()).collect();
        self.new = vec![0; parents.len()];
        self.of = self.of.take().map(|of| parents.iter().map(|&p| of[p]).collect());
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
    pub(crate) fn attend(&mut self, layer: usize, cfg: Attention, q: Mat, k: Mat, v: Mat) -> Result<Tensor> {
        let n: usize = self.new.iter().sum();
        assert_eq!(q.rows(), n, "the forward pass has the rows that were announced");
        let (keys, values) = &mut self.layers[layer];
        let places = self.inputs.places.mat();
        put_rows(k, places, keys.make_mut()?)?;
        put_rows(v, places, values.make_mut()?)?;
        let mut y = Tensor::empty(q.device(), q.dtype(), &[n, cfg.heads * cfg.head_dim])?;
        attention_cached(&cfg, q, keys.mat(), values.mat(), &self.rows, y.make_mut()?)?;
        Ok(y)
    }
}
