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
pub(crate) mod tests;
