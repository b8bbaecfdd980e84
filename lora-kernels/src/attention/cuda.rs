#![allow(unsafe_code)]

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Attention, CachedRows, Sequences};
use crate::{
    Acc, Buffer, DType, Device, Dropout, Error, Mat, MatMut, Result,
    cuda::{Arch, Gpu, Module, map::typed, suffix},
};

macro_rules! source {
    ($name:literal) => {
        concat!(include_str!("../dropout/philox.cuh"), include_str!("tile.cuh"), include_str!($name))
    };
}

pub(crate) static FORWARD: Module = Module::new("attention", source!("attention.cu"), Arch::Any);
pub(crate) static BACKWARD: Module = Module::new("attention_backward", source!("backward.cu"), Arch::Any);
pub(crate) static CACHED: Module = Module::new("attention_cached", source!("cached.cu"), Arch::Any);

/// Threads of a block, as in `tile.cuh`.
const THREADS: usize = 128;
/// Tokens of a tile.
const TILE: usize = 64;
/// Most ranges of keys of one cached sequence.
const RANGES: usize = 16;

pub(super) fn forward(
    gpu: &Arc<Gpu>,
    cfg: &Attention,
    seqs: &Sequences,
    [q, k, v]: [Mat; 3],
    out: &MatMut,
    lse: &MatMut,
) -> Result<()> {
    let dtype = out.dtype();
    let kernel = format!("attention_{}_{}", padded(cfg.head_dim)?, suffix("attention", dtype)?);
    typed("attention", dtype, &[q, k, v]);
    typed("attention: lse", DType::F32, &[lse.as_mat()]);
    if seqs.tokens() == 0 || cfg.heads == 0 {
        return Ok(());
    }
    let tiles = seqs.on_device.tiles(gpu, seqs)?;
    let shared = shared(gpu, "attention", forward_shared(cfg.head_dim, dtype.size()))?;
    let mut l = gpu.launch(&FORWARD, &kernel)?;
    l.mat(all(&tiles)).raw(Shape::new(cfg));
    for m in [q, k, v, out.as_mat(), lse.as_mat()] {
        l.mat(m).i64(m.ld());
    }
    // SAFETY: the tiles are those of the sequences, whose tokens are the rows of all matrices; the columns of a head
    // lie in its matrix, which `attention` checked.
    unsafe { l.run([tiles.len() / TILE_WORDS, cfg.heads, 1], THREADS, shared) }
}

pub(super) fn backward(
    gpu: &Arc<Gpu>,
    cfg: &Attention,
    seqs: &Sequences,
    [q, k, v]: [Mat; 3],
    [out, lse, dout]: [Mat; 3],
    [dq, dk, dv]: [&Acc; 3],
) -> Result<()> {
    const NAME: &str = "attention_backward";
    let (dtype, wide) = (dout.dtype(), dq.to.dtype());
    let (columns, suffix) = (padded(cfg.head_dim)?, suffix(NAME, dtype)?);
    typed(NAME, dtype, &[q, k, v, out]);
    typed("attention_backward: lse", DType::F32, &[lse]);
    assert!(wide == dtype || wide == DType::F32, "{NAME}: gradients are f32 or as dout");
    typed("attention_backward: gradients", wide, &[dk.to.as_mat(), dv.to.as_mat()]);
    if seqs.tokens() == 0 || cfg.heads == 0 {
        return Ok(());
    }
    let tiles = seqs.on_device.tiles(gpu, seqs)?;
    let parts = tiles.len() / TILE_WORDS * if columns == 256 { 2 } else { 1 };
    let shared = shared(gpu, NAME, backward_shared(cfg.head_dim, dtype.size()))?;
    let mut delta = Buffer::empty(&Device::Cuda(gpu.clone()), DType::F32, seqs.tokens() * cfg.heads)?;
    let delta = MatMut::new(&mut delta, 0, seqs.tokens(), cfg.heads);

    let mut l = gpu.launch(&BACKWARD, &format!("attention_backward_q_{columns}_{suffix}"))?;
    l.mat(all(&tiles)).raw(Shape::new(cfg));
    for m in [q, k, v, out, lse, dout] {
        l.mat(m).i64(m.ld());
    }
    l.mat_mut(&delta).mat_mut(&dq.to).i64(dq.to.ld()).f32(dq.beta).i32((wide == DType::F32).into());
    // SAFETY: as in the forward pass; `delta` is [tokens, heads].
    unsafe { l.run([parts, cfg.heads, 1], THREADS, shared)? };

    let mut l = gpu.launch(&BACKWARD, &format!("attention_backward_kv_{columns}_{suffix}"))?;
    l.mat(all(&tiles)).raw(Shape::new(cfg));
    for m in [q, k, v, lse, dout] {
        l.mat(m).i64(m.ld());
    }
    l.mat_mut(&delta);
    for g in [dk, dv] {
        l.mat_mut(&g.to).i64(g.to.ld()).f32(g.beta);
    }
    l.i32((wide == DType::F32).into());
    // SAFETY: as above.
    unsafe { l.run([parts, cfg.kv_heads, 1], THREADS, shared) }
}

pub(super) fn cached(
    gpu: &Arc<Gpu>,
    cfg: &Attention,
    [q, k, v]: [Mat; 3],
    rows: &CachedRows,
    out: &MatMut,
) -> Result<()> {
    const NAME: &str = "attention_cached";
    let dtype = out.dtype();
    let (columns, suffix) = (padded(cfg.head_dim)?, suffix(NAME, dtype)?);
    typed(NAME, dtype, &[q, k, v]);
    let inside = rows.rows.iter().all(|list| list.iter().all(|&r| (r as usize) < k.rows()));
    assert!(inside, "{NAME}: a row lies outside the pool of {}", k.rows());
    let tokens = out.rows();
    if tokens == 0 || cfg.heads == 0 {
        return Ok(());
    }
    let lists = rows.on_device.as_ref().unwrap_or_else(|| panic!("{NAME}: rows of the host for a matrix on {gpu}"));
    assert_eq!(lists.group, cfg.heads / cfg.kv_heads, "{NAME}: rows for another number of heads");
    let plan = &lists.plan;
    let words = lists.words.as_ref().expect("there are tokens, so the lists were set");
    let tiles = Mat::new(words, 0, 1, plan.tiles * CACHED_WORDS);
    let list = Mat::new(words, plan.tiles * CACHED_WORDS, 1, words.len() - plan.tiles * CACHED_WORDS);
    let shared = shared(gpu, NAME, forward_shared(cfg.head_dim, dtype.size()))?;
    let parts = if plan.ranges == 1 { 0 } else { plan.ranges * tokens * cfg.heads };
    let device = Device::Cuda(gpu.clone());
    let part = Buffer::empty(&device, DType::F32, parts * cfg.head_dim)?;
    let sums = Buffer::empty(&device, DType::F32, parts * 2)?;
    let shape = Shape::new(&Attention { causal: true, dropout: None, ..*cfg });

    let mut l = gpu.launch(&CACHED, &format!("attention_cached_{columns}_{suffix}"))?;
    l.mat(tiles).mat(list).raw(shape);
    for m in [q, k, v, out.as_mat()] {
        l.mat(m).i64(m.ld());
    }
    l.mat(all(&part)).mat(all(&sums)).i32(tokens);
    // SAFETY: the lists name rows of the pool, and the tiles the rows of q and out, as `attention_cached` and the line
    // above checked; the parts have room for every range of every row.
    unsafe { l.run([plan.tiles, cfg.kv_heads, plan.ranges], THREADS, shared)? };
    if plan.ranges == 1 {
        return Ok(());
    }
    let mut l = gpu.launch(&CACHED, &format!("attention_join_{suffix}"))?;
    l.mat(tiles).raw(shape).mat(all(&part)).mat(all(&sums)).i32(tokens).mat_mut(out).i64(out.ld());
    // SAFETY: as above.
    unsafe { l.run([plan.tiles, cfg.kv_heads, 1], THREADS, 0) }
}

/// All elements of a buffer.
fn all(b: &Buffer) -> Mat<'_> {
    Mat::new(b, 0, 1, b.len())
}

/// The kernels' `Shape`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    seed: u64,
    step: u32,
    site: u32,
    row_offset: u32,
    threshold: u32,
    kept: f32,
    scale: f32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    causal: i32,
}

impl Shape {
    fn new(cfg: &Attention) -> Shape {
        let size = |n: usize| i32::try_from(n).expect("sizes of kernels fit an int");
        let none = Dropout { p: 0.0, seed: 0, step: 0, site: 0, row_offset: 0 };
        let Dropout { seed, step, site, row_offset, .. } = cfg.dropout.unwrap_or(none);
        let mask = cfg.dropout.unwrap_or(none).mask::<f32>();
        Shape {
            seed,
            step,
            site,
            row_offset,
            threshold: mask.threshold,
            kept: mask.scale,
            scale: cfg.scale as f32,
            heads: size(cfg.heads),
            kv_heads: size(cfg.kv_heads),
            head_dim: size(cfg.head_dim),
            causal: cfg.causal.into(),
        }
    }
}

/// The columns that a head has in shared memory: there are kernels for these.
fn padded(head_dim: usize) -> Result<usize> {
    match head_dim {
        0..=64 => Ok(64),
        65..=128 => Ok(128),
        129..=256 => Ok(256),
        _ => Err(Error::Cuda {
            what: format!("attention has kernels for heads of up to 256 columns, not {head_dim}; use the CPU"),
        }),
    }
}

/// Bytes of `rows` rows of a tile.
fn tile_bytes(rows: usize, columns: usize, size: usize) -> usize {
    rows * (columns * size + 16)
}

/// Shared memory of a forward block: 64 queries, and keys and values of two steps.
fn forward_shared(head_dim: usize, size: usize) -> usize {
    let columns = if head_dim <= 64 { 64 } else { head_dim.next_power_of_two() };
    let keys = if columns <= 128 { 128 } else { 64 } / size;
    tile_bytes(TILE + 4 * keys, columns, size)
}

/// Shared memory of a backward block: two tiles that stay, two of each of two steps, and a step's statistics.
fn backward_shared(head_dim: usize, size: usize) -> usize {
    let columns = if head_dim <= 64 { 64 } else { head_dim.next_power_of_two() };
    let (rows, step) = if columns <= 128 { (TILE, 32) } else { (TILE / 2, 16) };
    tile_bytes(2 * rows + 4 * step, columns, size) + 4 * step * size_of::<f32>()
}

/// The bytes, if a block of the device may have so many.
fn shared(gpu: &Gpu, kernel: &str, bytes: usize) -> Result<usize> {
    let most = gpu.info().shared_memory;
    if bytes <= most {
        return Ok(bytes);
    }
    let what = format!("{kernel} needs {bytes} bytes of shared memory, and {gpu} has {most}; use bf16 or the CPU");
    Err(Error::Cuda { what })
}

/// Words of the kernels' `Tile`.
const TILE_WORDS: usize = 4;

/// The kernels' list of `Tile`s: 64 tokens of one sequence each. Those latest in their sequences stand first: under a
/// causal mask their queries see the most keys, and the longest work should not start last.
fn tiles(seqs: &Sequences) -> Vec<u32> {
    let ranges = (0..seqs.len()).map(|s| seqs.range(s));
    let mut tiles: Vec<[u32; TILE_WORDS]> = ranges
        .flat_map(|r| (0..r.len()).step_by(TILE).map(move |first| [r.start, r.len(), first, 0].map(|v| v as u32)))
        .collect();
    tiles.sort_by_key(|t| std::cmp::Reverse(t[2]));
    tiles.concat()
}

/// The tiles of sequences on the device that used them last. No part of the sequences' value.
#[derive(Clone, Default)]
pub(super) struct OnDevice(Arc<Mutex<Option<Arc<Buffer>>>>);

impl OnDevice {
    fn tiles(&self, gpu: &Arc<Gpu>, seqs: &Sequences) -> Result<Arc<Buffer>> {
        let device = Device::Cuda(gpu.clone());
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tiles) = last.as_ref().filter(|b| *b.device() == device) {
            return Ok(tiles.clone());
        }
        let tiles = Arc::new(Buffer::from_slice(&device, &tiles(seqs))?);
        if !gpu.is_recording() {
            *last = Some(tiles.clone());
        }
        Ok(tiles)
    }
}

impl PartialEq for OnDevice {
    fn eq(&self, _: &OnDevice) -> bool {
        true
    }
}

impl Eq for OnDevice {}

impl fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDevice")
    }
}

/// Words of the kernels' `CachedTile`.
const CACHED_WORDS: usize = 8;

/// The lists of [`CachedRows`] on a device.
#[derive(Debug)]
pub(super) struct Lists {
    device: Device,
    group: usize,
    plan: Plan,
    /// The plan's words, with room for more.
    words: Option<Buffer>,
    /// How often the words have moved.
    moved: u64,
}

impl Lists {
    /// Empty lists; `None` on the host.
    pub(super) fn new(device: &Device, group: usize) -> Option<Lists> {
        let plan = Plan::new(&[], &[], group);
        (!device.is_cpu()).then(|| Lists { device: device.clone(), group, plan, words: None, moved: 0 })
    }

    pub(super) fn set(&mut self, rows: &[Vec<u32>], new: &[usize]) -> Result<()> {
        self.plan = Plan::new(rows, new, self.group);
        let needed = self.plan.words.len();
        let words = match self.words.take().filter(|words| needed <= words.len()) {
            Some(words) => self.words.insert(words),
            None => {
                self.moved += 1;
                // Room for as many again: sequences grow by a token each step.
                self.words.insert(Buffer::empty(&self.device, DType::U32, 2 * needed)?)
            }
        };
        words.write(0, &self.plan.words)
    }

    /// Changes with the place of the words and with the launch.
    pub(super) fn shape(&self) -> u64 {
        (self.moved << 40) | ((self.plan.tiles as u64) << 8) | self.plan.ranges as u64
    }
}

/// How the queries and the keys of one call of cached attention are split.
#[derive(Debug)]
struct Plan {
    /// The tiles, then the sequences' lists of rows.
    words: Vec<u32>,
    tiles: usize,
    /// The most ranges of keys that a tile has.
    ranges: usize,
}

impl Plan {
    fn new(rows: &[Vec<u32>], new: &[usize], group: usize) -> Plan {
        let (mut tiles, mut lists, mut token) = (Vec::new(), Vec::new(), 0);
        // One token at a time the launch stays the same while the sequences grow: recorded work is done again as it is.
        let mut ranges = if new.iter().all(|&n| n == 1) { RANGES } else { 1 };
        for (list, &new) in rows.iter().zip(new) {
            let (seen, chunk) = (list.len() - new, chunk(list.len(), new * group));
            for row in (0..new * group).step_by(TILE) {
                let keys = seen + ((row + TILE).min(new * group) - 1) / group + 1;
                ranges = ranges.max(keys.div_ceil(chunk));
                tiles.push([lists.len(), seen, new, token, row, chunk, 0, 0].map(|v| v as u32));
            }
            if new > 0 {
                lists.extend_from_slice(list);
            }
            token += new;
        }
        let count = tiles.len();
        let mut words = tiles.concat();
        words.append(&mut lists);
        Plan { words, tiles: count, ranges }
    }
}

/// Keys of one range of a sequence with so many keys and rows of queries times heads. One token at a time leaves most
/// of the device idle unless the keys are split; many tiles fill it without.
fn chunk(keys: usize, rows: usize) -> usize {
    let chunk = if rows <= TILE { keys.div_ceil(RANGES) } else { keys };
    chunk.next_multiple_of(TILE)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        attention, attention_backward, attention_cached,
        cuda::{Graph, testing::*},
        testing::{Padded, random},
    };

    const TYPES: [(DType, f64); 3] = [(F32, 1e-5), (Bf16, 2e-2), (F16, 4e-3)];
    const DROPOUT: Dropout = Dropout { p: 0.25, seed: 1 << 40 | 3, step: 17, site: 5, row_offset: 1000 };

    fn shape(heads: usize, kv_heads: usize, head_dim: usize, causal: bool) -> Attention {
        Attention { heads, kv_heads, head_dim, scale: 0.4, causal, dropout: None }
    }

    /// Attentions, lengths and gaps: every path of the loads, one and several steps, each size of the tiles.
    fn cases(thorough: bool) -> Vec<(Attention, &'static [usize], usize)> {
        let mut cases = vec![
            (Attention { dropout: Some(DROPOUT), ..shape(4, 2, 8, true) }, &[7, 1, 33][..], 0),
            (Attention { scale: -0.4, ..shape(1, 1, 16, false) }, &[0, 65, 3], 8),
            (Attention { dropout: Some(DROPOUT), ..shape(2, 1, 10, false) }, &[70], 3),
            (shape(2, 2, 64, true), &[131], 0),
        ];
        if thorough {
            cases.extend([
                (shape(1, 1, 8, true), &[1][..], 0),
                (shape(3, 1, 16, true), &[64, 65], 0),
                (Attention { dropout: Some(DROPOUT), ..shape(1, 1, 128, true) }, &[66, 2], 0),
                (shape(1, 1, 72, false), &[40], 8),
                (Attention { dropout: Some(DROPOUT), ..shape(1, 1, 136, true) }, &[50], 0),
                (shape(2, 1, 256, true), &[33, 70], 0),
            ]);
        }
        cases
    }

    /// q, k and v as columns of one matrix.
    fn widths(cfg: &Attention) -> [usize; 3] {
        [cfg.heads, cfg.kv_heads, cfg.kv_heads].map(|h| h * cfg.head_dim)
    }

    fn fused<'a>(cfg: &Attention, m: &'a Padded) -> [Mat<'a>; 3] {
        let [a, b, c] = widths(cfg);
        [m.mat().cols_in(0..a), m.mat().cols_in(a..a + b), m.mat().cols_in(a + b..a + b + c)]
    }

    fn run_forward(s: &Side, cfg: &Attention, seqs: &Sequences, qkv: &Padded, pad: usize) -> (Padded, Padded) {
        let t = seqs.tokens();
        let (mut out, mut lse) = (s.poison(t, cfg.heads * cfg.head_dim, pad), s.poison_acc(t, cfg.heads, pad));
        let [q, k, v] = fused(cfg, qkv);
        attention(cfg, seqs, q, k, v, out.mat_mut(), lse.mat_mut()).unwrap();
        (out, lse)
    }

    fn forward_parity(types: &[(DType, f64)], thorough: bool) {
        parity("attention", types, |s| {
            for (cfg, lengths, pad) in cases(thorough) {
                let seqs = Sequences::new(lengths);
                let qkv = s.random(1, seqs.tokens(), widths(&cfg).iter().sum(), pad, 1.0);
                let (out, lse) = run_forward(s, &cfg, &seqs, &qkv, pad);
                s.out(format!("out of {cfg:?} {lengths:?}"), out.get());
                s.out(format!("lse of {cfg:?} {lengths:?}"), lse.get());
            }
        });
    }

    fn backward_parity(types: &[(DType, f64)], thorough: bool) {
        parity("attention_backward", types, |s| {
            for (i, (cfg, lengths, pad)) in cases(thorough).into_iter().enumerate() {
                let (seqs, [wq, wk, wv]) = (Sequences::new(lengths), widths(&cfg));
                let (t, w) = (seqs.tokens(), wq + wk + wv);
                let (qkv, dout) = (s.random(1, t, w, pad, 1.0), s.random(2, t, wq, pad, 1.0));
                let (out, lse) = run_forward(s, &cfg, &seqs, &qkv, pad);
                let beta = if i % 2 == 0 { 0.5 } else { 0.0 };
                let mut grad = if i % 4 < 2 { s.target(3, t, w, pad, beta) } else { s.target_acc(3, t, w, pad, beta) };
                let (dq, dkv) = grad.mat_mut().split_cols(wq);
                let (dk, dv) = dkv.split_cols(wk);
                let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta });
                let [q, k, v] = fused(&cfg, &qkv);
                attention_backward(&cfg, &seqs, q, k, v, out.mat(), lse.mat(), dout.mat(), dq, dk, dv).unwrap();
                s.out(format!("gradients of {cfg:?} {lengths:?}"), grad.get());
            }
        });
    }

    /// Sequences of a shuffled pool, the second with the first rows of the first.
    fn cached_parity(types: &[(DType, f64)], thorough: bool) {
        parity("attention_cached", types, |s| {
            let mut cases = vec![
                (shape(4, 2, 8, true), vec![13, 14, 1], vec![1, 2, 1], 0),
                (shape(2, 2, 16, false), vec![140, 0, 66], vec![1, 0, 3], 8),
                (shape(6, 2, 10, true), vec![70, 40], vec![30, 4], 3),
            ];
            if thorough {
                cases.push((shape(2, 1, 64, true), vec![1100], vec![1], 0));
                cases.push((shape(1, 1, 128, true), vec![70], vec![66], 0));
                cases.push((shape(1, 1, 256, true), vec![80], vec![2], 0));
            }
            for (cfg, lengths, new, pad) in cases {
                let capacity = lengths.iter().sum::<usize>() + 5;
                let (wq, wk) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
                let mut free = (0..capacity as u32).map(|i| (i * 7 + 3) % capacity as u32).collect::<Vec<_>>();
                if capacity % 7 == 0 {
                    free = (0..capacity as u32).rev().collect();
                }
                let mut lists: Vec<Vec<u32>> = lengths.iter().map(|&n| free.drain(..n).collect()).collect();
                if let [first, second, ..] = &mut lists[..] {
                    let common = (first.len() - new[0]).min(second.len() - new[1]);
                    second[..common].copy_from_slice(&first[..common]);
                }
                let mut rows = CachedRows::new(s.device(), cfg.heads / cfg.kv_heads);
                rows.set(&lists, &new).unwrap();
                // Rows of nobody hold NaN.
                let pool = |seed| {
                    let mut data = random(seed, capacity * wk, 1.0);
                    free.iter().for_each(|&r| data[r as usize * wk..][..wk].fill(f64::NAN));
                    s.given(capacity, wk, pad, &data)
                };
                let (k, v) = (pool(2), pool(3));
                let queries = new.iter().sum();
                let (q, mut out) = (s.random(1, queries, wq, pad, 1.0), s.poison(queries, wq, pad));
                attention_cached(&cfg, q.mat(), k.mat(), v.mat(), &rows, out.mat_mut()).unwrap();
                s.out(format!("out of {cfg:?} {lengths:?} new {new:?}"), out.get());
            }
        });
    }

    #[test]
    fn forward_equals_the_reference() {
        forward_parity(&TYPES[..2], true);
        forward_parity(&TYPES[2..], false);
    }

    #[test]
    fn backward_equals_the_reference() {
        backward_parity(&TYPES[..2], true);
        backward_parity(&TYPES[2..], false);
    }

    #[test]
    fn cached_equals_the_reference() {
        cached_parity(&TYPES[..2], true);
        cached_parity(&TYPES[2..], false);
    }

    /// Twice the same, with the threads in another order in the emulation.
    #[test]
    fn runs_are_equal_to_the_bit() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let cfg = Attention { dropout: Some(DROPOUT), ..shape(4, 2, 8, true) };
            let (seqs, [wq, wk, wv]) = (Sequences::new(&[70, 9]), widths(&cfg));
            let (t, w) = (seqs.tokens(), wq + wk + wv);
            let matrix = |dtype, cols, seed| Padded::on(&device, dtype, t, cols, 0, &random(seed, t * cols, 1.0));
            let (qkv, dout) = (matrix(Bf16, w, 1), matrix(Bf16, wq, 2));
            let run = || {
                let (mut out, mut lse, mut grad) = (matrix(Bf16, wq, 3), matrix(F32, 4, 3), matrix(F32, w, 3));
                let [q, k, v] = fused(&cfg, &qkv);
                attention(&cfg, &seqs, q, k, v, out.mat_mut(), lse.mat_mut()).unwrap();
                let (dq, dkv) = grad.mat_mut().split_cols(wq);
                let (dk, dv) = dkv.split_cols(wk);
                let [dq, dk, dv] = [dq, dk, dv].map(|to| Acc { to, beta: 1.0 });
                attention_backward(&cfg, &seqs, q, k, v, out.mat(), lse.mat(), dout.mat(), dq, dk, dv).unwrap();
                [out, lse, grad].map(|m| m.get()).concat()
            };
            assert!(run() == run());
        }
    }

    #[test]
    fn what_is_only_recorded_is_not_kept() {
        for gpu in gpus() {
            let (device, seqs) = (Device::Cuda(gpu.clone()), Sequences::new(&[3, 90]));
            let (first, _graph) = Graph::record(&device, || seqs.on_device.tiles(&gpu, &seqs)).unwrap();
            let second = seqs.on_device.tiles(&gpu, &seqs).unwrap();
            assert!(!Arc::ptr_eq(&first, &second));
            assert_eq!(second.to_vec::<u32>(0..second.len()).unwrap(), tiles(&seqs));
        }
    }

    #[test]
    fn cached_sequences_do_not_depend_on_their_batch() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let cfg = shape(2, 1, 8, true);
            let matrix = |rows, cols, seed| Padded::on(&device, Bf16, rows, cols, 0, &random(seed, rows * cols, 1.0));
            let (q, k, v) = (matrix(3, 16, 1), matrix(400, 8, 2), matrix(400, 8, 3));
            let lists: [Vec<u32>; 3] = [(0..90).collect(), (10..400).rev().collect(), vec![5]];
            let run = |sequences: std::ops::Range<usize>| {
                let mut out = matrix(sequences.len(), 16, 4);
                let (q, lists) = (q.mat().rows_in(sequences.clone()), &lists[sequences]);
                let mut rows = CachedRows::new(&device, 2);
                rows.set(lists, &vec![1; lists.len()]).unwrap();
                attention_cached(&cfg, q, k.mat(), v.mat(), &rows, out.mat_mut()).unwrap();
                out.get()
            };
            assert_eq!([run(0..1), run(1..2), run(2..3)].concat(), run(0..3));
        }
    }

    #[test]
    fn tiles_cover_every_token_once_from_the_latest_on() {
        let tiles = tiles(&Sequences::new(&[3, 0, 130, 64]));
        let words: Vec<&[u32]> = tiles.chunks(TILE_WORDS).collect();
        let late = [[3, 130, 128, 0], [3, 130, 64, 0]];
        let early = [[0, 3, 0, 0], [3, 130, 0, 0], [133, 64, 0, 0]];
        assert_eq!(words, [&late[..], &early[..]].concat());
        assert!(super::tiles(&Sequences::new(&[0, 0])).is_empty());
    }

    #[test]
    fn sequences_are_equal_whatever_lies_on_a_device() {
        for gpu in gpus() {
            let (used, other) = (Sequences::new(&[70, 2]), Sequences::new(&[70, 2]));
            let first = used.on_device.tiles(&gpu, &used).unwrap();
            assert!(used == other && used != Sequences::new(&[72]));
            // A clone shares what was uploaded.
            let clone = used.clone();
            assert!(Arc::ptr_eq(&first, &clone.on_device.tiles(&gpu, &clone).unwrap()));
        }
    }

    #[test]
    fn blocks_fit_into_shared_memory() {
        // Heads of 64 columns: four forward blocks of 16-bit types on a multiprocessor of compute capability 9.0.
        assert_eq!(forward_shared(64, 2), (64 + 4 * 64) * 144);
        assert!(4 * forward_shared(64, 2) <= 227 << 10);
        assert_eq!(backward_shared(100, 2), (128 + 128) * 272 + 512);
        // All run on compute capability 8.0.
        for (head_dim, size) in [(1, 2), (64, 4), (65, 2), (128, 4), (129, 2), (256, 4)] {
            assert!(forward_shared(head_dim, size).max(backward_shared(head_dim, size)) <= 163 << 10);
        }
        assert_eq!([1, 64, 65, 128, 129, 256].map(|n| padded(n).unwrap()), [64, 64, 128, 128, 256, 256]);
        assert!(padded(257).unwrap_err().to_string().contains("257"));
    }

    #[test]
    fn keys_are_split_for_few_queries_only() {
        assert_eq!([1, 64, 65, 1024, 1025, 4096].map(|keys| chunk(keys, 1)), [64, 64, 64, 64, 128, 256]);
        assert!((1..5000usize).all(|keys| keys.div_ceil(chunk(keys, 8)) <= RANGES));
        assert_eq!(chunk(1000, 65), 1024);
        let lists: Vec<Vec<u32>> = vec![(0..200).collect(), vec![7], (300..370).collect()];
        let plan = Plan::new(&lists, &[1, 0, 40], 2);
        assert_eq!((plan.tiles, plan.ranges), (3, 4));
        // 40 queries of 2 heads are two tiles; the unused list is left out.
        assert_eq!(plan.words[..8], [0, 199, 1, 0, 0, 64, 0, 0]);
        assert_eq!(plan.words[8..24], [200, 30, 40, 1, 0, 128, 0, 0, 200, 30, 40, 1, 64, 128, 0, 0]);
        assert_eq!((plan.words.len(), plan.words[24 + 199], plan.words[24 + 200]), (24 + 270, 199, 300));
        // One token each: the launch does not depend on the lengths.
        assert_eq!([1, 70, 5000].map(|n| Plan::new(&[(0..n).collect()], &[1], 1).ranges), [RANGES; 3]);
    }

    /// Recorded once, done for every next token.
    #[test]
    fn recorded_attention_looks_at_the_newest_rows() {
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let cfg = shape(2, 1, 8, true);
            let matrix = |rows, cols, seed| Padded::on(&device, F32, rows, cols, 0, &random(seed, rows * cols, 1.0));
            let (q, k, v) = (matrix(2, 16, 1), matrix(300, 8, 2), matrix(300, 8, 3));
            let lists = |n: u32| [(0..n).collect(), (100..100 + n / 2).rev().collect::<Vec<u32>>()];
            let mut rows = CachedRows::new(&device, 2);
            rows.set(&lists(40), &[1; 2]).unwrap();
            let mut out = matrix(2, 16, 4);
            let attend = |rows: &CachedRows, out: &mut Padded| {
                attention_cached(&cfg, q.mat(), k.mat(), v.mat(), rows, out.mat_mut())
            };
            let ((), graph) = Graph::record(&device, || attend(&rows, &mut out)).unwrap();
            let shape = rows.shape();
            for n in [41, 64, 70] {
                rows.set(&lists(n), &[1; 2]).unwrap();
                assert_eq!(rows.shape(), shape, "{n} keys");
                graph.launch().unwrap();
                let mut plain = matrix(2, 16, 5);
                attend(&rows, &mut plain).unwrap();
                assert_eq!(out.get(), plain.get(), "{n} keys");
            }
            rows.set(&lists(190), &[1; 2]).unwrap();
            assert_ne!(rows.shape(), shape, "the lists have moved");
        }
    }

    #[test]
    #[should_panic(expected = "outside the pool")]
    fn rows_outside_the_pool_are_refused() {
        let Some(gpu) = gpus().pop() else { panic!("outside the pool: nothing to refuse without a device") };
        let mut b = Buffer::zeros(&Device::Cuda(gpu), DType::F32, 16).unwrap();
        let x = b.try_clone(0..16).unwrap();
        let (q, kv) = (Mat::new(&x, 0, 1, 8), Mat::new(&x, 0, 2, 8));
        let mut rows = CachedRows::new(b.device(), 1);
        rows.set(&[vec![0, 2]], &[1]).unwrap();
        let _ = attention_cached(&shape(1, 1, 8, true), q, kv, kv, &rows, MatMut::new(&mut b, 0, 1, 8));
    }

    const BOTH: &[(DType, f64)] = TYPES.split_at(2).0;

    fn forward_check() {
        forward_parity(BOTH, false);
    }

    fn backward_check() {
        backward_parity(BOTH, false);
    }

    fn cached_check() {
        cached_parity(BOTH, false);
    }

    pub(crate) const MUTATIONS: &[Mutation] = &[
        Mutation {
            name: "no barrier before the keys are read",
            module: "attention",
            from: "cp_async_wait<0>();\n      __syncthreads();",
            to: "cp_async_wait<0>();",
            check: forward_check,
        },
        Mutation {
            name: "a step's copies are not waited for",
            module: "attention",
            from: "cp_async_wait<0>();",
            to: "cp_async_wait<1>();",
            check: forward_check,
        },
        Mutation {
            name: "no barrier before the outputs take the tiles' memory",
            module: "attention",
            from: "outputs'.\n  __syncthreads();",
            to: "outputs'.\n",
            check: forward_check,
        },
        Mutation {
            name: "a query sees one key too many",
            module: "attention",
            from: "i % 2 >= limit[i / 2]",
            to: "i % 2 > limit[i / 2]",
            check: forward_check,
        },
        Mutation {
            name: "the last key is left out",
            module: "attention",
            from: "return at < end ?",
            to: "return at < end - 1 ?",
            check: forward_check,
        },
        Mutation {
            name: "the accumulator is not rescaled",
            module: "attention",
            from: "o[c][2 * r + e] *= shrink;",
            to: ";",
            check: forward_check,
        },
        Mutation {
            name: "quarters of a right fragment exchanged",
            module: "attention",
            from: "left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]}",
            to: "left[2] = {y[0], y[2]}, right[2] = {y[1], y[3]}",
            check: forward_check,
        },
        Mutation {
            name: "P packed in the wrong order",
            module: "attention",
            from: "pack(x[2], x[3], T{}), pack(y[0], y[1], T{})",
            to: "pack(y[0], y[1], T{}), pack(x[2], x[3], T{})",
            check: forward_check,
        },
        Mutation {
            name: "masks of two rows exchanged",
            module: "attention",
            from: "upper = odd ? other : own",
            to: "upper = odd ? own : other",
            check: forward_check,
        },
        Mutation {
            name: "every query head reads its own key head",
            module: "attention",
            from: "kv_head = head / (a.heads / a.kv_heads)",
            to: "kv_head = head % a.kv_heads",
            check: forward_check,
        },
        Mutation {
            name: "D is read from outputs that the next keys replace",
            module: "attention_backward",
            from: "room.\n      __syncthreads();",
            to: "room.\n",
            check: backward_check,
        },
        Mutation {
            name: "β is dropped where elements are stored in pairs",
            module: "attention_backward",
            from: "if (beta != 0.f) to =",
            to: "if (false) to =",
            check: backward_check,
        },
        Mutation {
            name: "the first head of a group counts for all",
            module: "attention_backward",
            from: "next_query = from, next_head++",
            to: "next_query = from",
            check: backward_check,
        },
        Mutation {
            name: "the diagonal is hidden",
            module: "attention_backward",
            from: "i % 2 < key + i / 2 * 8",
            to: "i % 2 <= key + i / 2 * 8",
            check: backward_check,
        },
        Mutation {
            name: "keys' masks come from the wrong counter",
            module: "attention_backward",
            from: "t / 2 * 2 + lane() / 16",
            to: "t / 2 + lane() / 16 * 2",
            check: backward_check,
        },
        Mutation {
            name: "dP is not dropped in dK",
            module: "attention_backward",
            from: "ds[n][i] * factor - d",
            to: "ds[n][i] - d",
            check: backward_check,
        },
        Mutation {
            name: "a cached query sees the next one",
            module: "attention_cached",
            from: "row + 8 * r) / group + 1)",
            to: "row + 8 * r) / group + 2)",
            check: cached_check,
        },
        Mutation {
            name: "ranges are joined without their weights",
            module: "attention_cached",
            from: "o += fast_exp2(part_sums[i * range + x].v[0] - max) *",
            to: "o +=",
            check: cached_check,
        },
        Mutation {
            name: "rows of the pool are taken in order",
            module: "attention_cached",
            from: "k + list[at] * ldk",
            to: "k + at * ldk",
            check: cached_check,
        },
    ];

    #[cfg(feature = "emulator")]
    #[test]
    fn planted_bugs_are_caught() {
        all_are_caught(MUTATIONS);
    }
}
