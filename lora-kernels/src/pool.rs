//! Host memory that is reused from step to step.
//!
//! A training step asks for the same sizes again and again. Handing freed blocks back out avoids the page faults of
//! fresh memory, which cost other stacks a large part of their step.

#![allow(unsafe_code)]

use std::{
    alloc::{Layout, LayoutError, alloc, dealloc},
    collections::BTreeMap,
    ptr::NonNull,
    sync::Mutex,
};

use crate::{Error, Result};

/// Blocks start on a cache line, which is also the widest vector.
const ALIGN: usize = 64;

/// Large blocks start on a huge page and ask for them: memory is then read at nearly twice the speed of small pages, whose
/// addresses a processor, above all a virtual one, has to look up so often.
const HUGE: usize = 2 << 20;

/// What the pool of host memory holds at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes taken from the system and not given back: in use and idle.
    pub reserved: usize,
    /// Bytes of `reserved` that wait for reuse.
    pub idle: usize,
    /// How often a block had to be taken from the system since the program began.
    pub misses: u64,
}

/// The state of the pool. In steady state `misses` no longer grows.
pub fn pool_stats() -> PoolStats {
    POOL.lock().unwrap_or_else(|e| e.into_inner()).stats
}

/// Gives all idle blocks back to the system, which the pool never does by itself.
///
/// For a program that lives on after its computing: between a training run and hours of waiting, or before another
/// process needs the memory. Within a loop of steps it would only bring the page faults back.
pub fn release_idle_memory() {
    POOL.lock().unwrap_or_else(|e| e.into_inner()).release(&Host);
}

/// Where a pool's blocks come from.
pub(crate) trait Source {
    /// How a block is addressed.
    type Ptr: Copy;
    /// A new block of at least `bytes` bytes.
    fn allocate(&self, bytes: usize) -> Result<Self::Ptr>;
    /// Gives a block back.
    ///
    /// # Safety
    /// `ptr` came from [`Source::allocate`] with this size, and nobody holds it any more.
    unsafe fn free(&self, ptr: Self::Ptr, bytes: usize);
    /// The error that no block of that size can be had.
    fn out_of_memory(&self, bytes: usize) -> Error;
}

/// The host's own memory.
struct Host;

fn layout(bytes: usize) -> std::result::Result<Layout, LayoutError> {
    Layout::from_size_align(bytes, if cfg!(target_os = "linux") && bytes >= HUGE { HUGE } else { ALIGN })
}

/// The address of a block of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostPtr(NonNull<u8>);

// SAFETY: the address of a block of plain memory with a single owner.
unsafe impl Send for HostPtr {}

impl Source for Host {
    type Ptr = HostPtr;

    fn allocate(&self, bytes: usize) -> Result<HostPtr> {
        let layout = layout(bytes).map_err(|_| self.out_of_memory(bytes))?;
        // SAFETY: the layout has a nonzero size, because `size_class` returns at least ALIGN.
        let ptr = NonNull::new(unsafe { alloc(layout) }).ok_or_else(|| self.out_of_memory(bytes))?;
        #[cfg(target_os = "linux")]
        if layout.align() == HUGE {
            // SAFETY: whole pages inside the fresh block. It is advice: where it is not taken, nothing changes.
            unsafe { libc::madvise(ptr.as_ptr().cast(), bytes / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the block has so many bytes and nobody else knows it.
        unsafe { ptr.write_bytes(0, bytes) };
        Ok(HostPtr(ptr))
    }

    unsafe fn free(&self, ptr: HostPtr, bytes: usize) {
        if let Ok(layout) = layout(bytes) {
            // SAFETY: `ptr` came from `allocate` with this size, so this layout, and nobody holds it any more.
            unsafe { dealloc(ptr.0.as_ptr(), layout) };
        }
    }

    fn out_of_memory(&self, bytes: usize) -> Error {
        Error::OutOfMemory { bytes, device: "cpu".into() }
    }
}

/// A block of host memory; initialised bytes, contents unspecified. Returns to the pool when dropped.
pub(crate) struct Block {
    ptr: HostPtr,
    bytes: usize,
}

// SAFETY: a block is plain memory with a single owner; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// Takes a block of at least `bytes` bytes.
    pub(crate) fn take(bytes: usize) -> Result<Block> {
        let (ptr, bytes) = POOL.lock().unwrap_or_else(|e| e.into_inner()).take(&Host, bytes)?;
        Ok(Block { ptr, bytes })
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr.0.as_ptr()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        POOL.lock().unwrap_or_else(|e| e.into_inner()).put(self.ptr, self.bytes);
    }
}

/// Idle blocks of one source, and what was taken from it.
pub(crate) struct Pool<P> {
    /// Idle blocks by size.
    idle: BTreeMap<usize, Vec<P>>,
    pub(crate) stats: PoolStats,
}

static POOL: Mutex<Pool<HostPtr>> = Mutex::new(Pool::new());

impl<P> Pool<P> {
    const fn new() -> Self {
        Pool { idle: BTreeMap::new(), stats: PoolStats { reserved: 0, idle: 0, misses: 0 } }
    }
}

impl<P> Default for Pool<P> {
    fn default() -> Self {
        Pool::new()
    }
}

impl<P: Copy> Pool<P> {
    /// A block and its size: the smallest idle one that fits and wastes less than half of itself, or a new one. A miss
    /// gives one idle block of the next smaller sizes back to the source: batches vary in length, and without this every
    /// new longest batch would leave the whole set of shorter blocks behind. When the source has no more, all idle blocks
    /// go back before it is asked again.
    pub(crate) fn take(&mut self, source: &(impl Source<Ptr = P> + ?Sized), bytes: usize) -> Result<(P, usize)> {
        let bytes = size_class(bytes);
        if let Some((&size, _)) = self.idle.range(bytes..=bytes.saturating_mul(2)).next() {
            return Ok((self.pop(size), size));
        }
        self.stats.misses += 1;
        if let Some((&size, _)) = self.idle.range(bytes / 2..bytes).next_back() {
            let ptr = self.pop(size);
            self.free(source, ptr, size);
        }
        let ptr = source.allocate(bytes).or_else(|e| match self.stats.idle {
            0 => Err(e),
            _ => {
                self.release(source);
                source.allocate(bytes)
            }
        })?;
        self.stats.reserved += bytes;
        Ok((ptr, bytes))
    }

    /// A block and its size, as [`Pool::take`]; nothing goes back to the source meanwhile.
    #[cfg(feature = "cuda")]
    pub(crate) fn take_or_add(&mut self, source: &(impl Source<Ptr = P> + ?Sized), bytes: usize) -> Result<(P, usize)> {
        let bytes = size_class(bytes);
        if let Some((&size, _)) = self.idle.range(bytes..=bytes.saturating_mul(2)).next() {
            return Ok((self.pop(size), size));
        }
        let ptr = source.allocate(bytes)?;
        self.stats.reserved += bytes;
        Ok((ptr, bytes))
    }

    /// Takes out all idle blocks.
    #[cfg(feature = "cuda")]
    pub(crate) fn drain(&mut self) -> Vec<(P, usize)> {
        let idle = std::mem::take(&mut self.idle);
        self.stats.idle = 0;
        idle.into_iter().flat_map(|(size, blocks)| blocks.into_iter().map(move |p| (p, size))).collect()
    }

    pub(crate) fn put(&mut self, ptr: P, bytes: usize) {
        self.idle.entry(bytes).or_default().push(ptr);
        self.stats.idle += bytes;
    }

    /// Removes one idle block of exactly this size, which must exist.
    fn pop(&mut self, size: usize) -> P {
        let blocks = self.idle.get_mut(&size).expect("the size was found in the map");
        let ptr = blocks.pop().expect("empty lists are removed");
        if blocks.is_empty() {
            self.idle.remove(&size);
        }
        self.stats.idle -= size;
        ptr
    }

    fn free(&mut self, source: &(impl Source<Ptr = P> + ?Sized), ptr: P, bytes: usize) {
        // SAFETY: the pool's blocks came from its source, and an idle one belongs to nobody else.
        unsafe { source.free(ptr, bytes) };
        self.stats.reserved -= bytes;
    }

    /// Gives all idle blocks back to the source.
    pub(crate) fn release(&mut self, source: &(impl Source<Ptr = P> + ?Sized)) {
        for (size, blocks) in std::mem::take(&mut self.idle) {
            for ptr in blocks {
                self.stats.idle -= size;
                self.free(source, ptr, size);
            }
        }
    }
}

/// The pool without memory, for planning: hands out and takes back sizes as the pools of host and devices do.
#[derive(Default)]
pub struct DryPool(Pool<()>);

/// Has as much memory as anybody asks for.
struct Endless;

impl Source for Endless {
    type Ptr = ();

    fn allocate(&self, _bytes: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn free(&self, (): (), _bytes: usize) {}

    fn out_of_memory(&self, bytes: usize) -> Error {
        Error::OutOfMemory { bytes, device: "none".into() }
    }
}

impl DryPool {
    /// The size of the block that a request of `bytes` bytes gets.
    pub fn take(&mut self, bytes: usize) -> usize {
        match self.0.take(&Endless, bytes) {
            Ok(((), size)) => size,
            Err(_) => unreachable!("what is endless never ends"),
        }
    }

    /// A block of a size that [`DryPool::take`] gave is free again.
    pub fn put(&mut self, size: usize) {
        self.0.put((), size);
    }

    /// What the pool would hold.
    pub fn stats(&self) -> PoolStats {
        self.0.stats
    }
}

/// Sizes are rounded up in steps of an eighth of an octave, so that nearly equal requests share blocks.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(1);
    let step = (1 << bytes.ilog2()) / 8;
    bytes.checked_next_multiple_of(step.max(ALIGN)).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool of its own, so that tests running beside this one do not disturb the counts.
    #[test]
    fn classes_cover_their_request_and_waste_little() {
        for bytes in [0, 1, 63, 64, 65, 1000, 4097, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let class = size_class(bytes);
            assert!(class >= bytes.max(1) && class.is_multiple_of(ALIGN), "{bytes} -> {class}");
            assert!(class <= bytes + (bytes / 8).max(ALIGN), "{bytes} -> {class} wastes too much");
        }
        assert_eq!(size_class(usize::MAX), usize::MAX);
    }

    #[test]
    fn blocks_are_reused_and_longer_batches_replace_shorter_ones() {
        let mut pool = Pool::new();
        let (a, size) = pool.take(&Host, 100_000).unwrap();
        pool.put(a, size);
        let (b, size) = pool.take(&Host, 99_000).unwrap();
        assert_eq!((b, pool.stats.misses), (a, 1), "a slightly smaller request takes the same block");
        pool.put(b, size);
        let (c, size) = pool.take(&Host, 130_000).unwrap();
        assert_eq!((pool.stats.misses, pool.stats.idle), (2, 0), "the shorter block went back to the system");
        pool.put(c, size);
        let (small, size) = pool.take(&Host, 1_000).unwrap();
        assert_eq!(pool.stats.misses, 3, "a large block is not spent on a small request");
        pool.put(small, size);
        pool.release(&Host);
        assert_eq!((pool.stats.reserved, pool.stats.idle), (0, 0));
    }

    #[test]
    fn a_dry_pool_counts_as_one_with_memory() {
        let (mut pool, mut dry) = (Pool::new(), DryPool::default());
        let mut held = Vec::new();
        for i in 0..200usize {
            let bytes = 1 + (i * 7919) % 30_000;
            let (ptr, size) = pool.take(&Host, bytes).unwrap();
            assert_eq!(dry.take(bytes), size);
            held.push((ptr, size));
            if i % 3 > 0 {
                let (ptr, size) = held.swap_remove(i * 31 % held.len());
                pool.put(ptr, size);
                dry.put(size);
            }
            assert_eq!(dry.stats(), pool.stats);
        }
        held.into_iter().for_each(|(ptr, size)| pool.put(ptr, size));
        pool.release(&Host);
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        assert!(matches!(Pool::new().take(&Host, usize::MAX / 2), Err(Error::OutOfMemory { .. })));
    }

    #[test]
    fn a_full_source_is_asked_again_when_idle_blocks_went_back() {
        /// Room for one block.
        struct One(std::cell::Cell<bool>);
        impl Source for One {
            type Ptr = u8;
            fn allocate(&self, bytes: usize) -> Result<u8> {
                if self.0.replace(true) { Err(self.out_of_memory(bytes)) } else { Ok(7) }
            }
            unsafe fn free(&self, _: u8, _: usize) {
                self.0.set(false);
            }
            fn out_of_memory(&self, bytes: usize) -> Error {
                Error::OutOfMemory { bytes, device: "one".into() }
            }
        }
        let (mut pool, one) = (Pool::new(), One(false.into()));
        let (a, size) = pool.take(&one, 1_000_000).unwrap();
        assert!(pool.take(&one, 64).is_err());
        pool.put(a, size);
        pool.take(&one, 64).unwrap();
        assert_eq!(pool.stats.reserved, 64);
    }
}
