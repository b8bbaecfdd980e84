//! Host memory that is reused from step to step.
//!
//! A training step asks for the same sizes again and again. Handing freed blocks back out avoids the page faults of
//! fresh memory, which cost other stacks a large part of their step.

#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::BTreeMap,
    ptr::NonNull,
    sync::Mutex,
};

use crate::{Error, Result};

/// Blocks start on a cache line, which is also the widest vector.
const ALIGN: usize = 64;

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
    POOL.lock().unwrap_or_else(|e| e.into_inner()).release();
}

/// A block of host memory; initialised bytes, contents unspecified. Returns to the pool when dropped.
pub(crate) struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a block is plain memory with a single owner; access follows Rust's borrow of the owner.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// Takes a block of at least `bytes` bytes.
    pub(crate) fn take(bytes: usize) -> Result<Block> {
        POOL.lock().unwrap_or_else(|e| e.into_inner()).take(bytes)
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        POOL.lock().unwrap_or_else(|e| e.into_inner()).put(self.ptr, self.bytes);
    }
}

struct Pool {
    /// Idle blocks by size.
    idle: BTreeMap<usize, Vec<NonNull<u8>>>,
    stats: PoolStats,
}

// SAFETY: the pointers are owned blocks of plain memory, reached only under the mutex.
unsafe impl Send for Pool {}

static POOL: Mutex<Pool> =
    Mutex::new(Pool { idle: BTreeMap::new(), stats: PoolStats { reserved: 0, idle: 0, misses: 0 } });

impl Pool {
    /// The smallest idle block that fits and wastes less than half of itself, or a new one. A miss gives one idle
    /// block of the next smaller sizes back to the system: batches vary in length, and without this every new longest
    /// batch would leave the whole set of shorter blocks behind.
    fn take(&mut self, bytes: usize) -> Result<Block> {
        let bytes = size_class(bytes);
        if let Some((&size, _)) = self.idle.range(bytes..=bytes.saturating_mul(2)).next() {
            return Ok(Block { ptr: self.pop(size), bytes: size });
        }
        self.stats.misses += 1;
        if let Some((&size, _)) = self.idle.range(bytes / 2..bytes).next_back() {
            let ptr = self.pop(size);
            self.free(ptr, size);
        }
        let oom = Error::OutOfMemory { bytes, device: "cpu" };
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| Error::OutOfMemory { bytes, device: "cpu" })?;
        // SAFETY: the layout has a nonzero size, because `size_class` returns at least ALIGN.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(oom)?;
        self.stats.reserved += bytes;
        Ok(Block { ptr, bytes })
    }

    fn put(&mut self, ptr: NonNull<u8>, bytes: usize) {
        self.idle.entry(bytes).or_default().push(ptr);
        self.stats.idle += bytes;
    }

    /// Removes one idle block of exactly this size, which must exist.
    fn pop(&mut self, size: usize) -> NonNull<u8> {
        let blocks = self.idle.get_mut(&size).expect("the size was found in the map");
        let ptr = blocks.pop().expect("empty lists are removed");
        if blocks.is_empty() {
            self.idle.remove(&size);
        }
        self.stats.idle -= size;
        ptr
    }

    fn free(&mut self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this size and alignment, and nobody holds it any more.
        unsafe { dealloc(ptr.as_ptr(), Layout::from_size_align_unchecked(bytes, ALIGN)) };
        self.stats.reserved -= bytes;
    }

    fn release(&mut self) {
        for (size, blocks) in std::mem::take(&mut self.idle) {
            for ptr in blocks {
                self.stats.idle -= size;
                self.free(ptr, size);
            }
        }
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
    fn pool() -> Pool {
        Pool { idle: BTreeMap::new(), stats: PoolStats::default() }
    }

    fn give(pool: &mut Pool, b: Block) {
        pool.put(b.ptr, b.bytes);
        std::mem::forget(b);
    }

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
        let mut pool = pool();
        let a = pool.take(100_000).unwrap();
        let p = a.ptr();
        give(&mut pool, a);
        let b = pool.take(99_000).unwrap();
        assert_eq!((b.ptr(), pool.stats.misses), (p, 1), "a slightly smaller request takes the same block");
        give(&mut pool, b);
        let c = pool.take(130_000).unwrap();
        assert_eq!((pool.stats.misses, pool.stats.idle), (2, 0), "the shorter block went back to the system");
        give(&mut pool, c);
        let small = pool.take(1_000).unwrap();
        assert_eq!(pool.stats.misses, 3, "a large block is not spent on a small request");
        give(&mut pool, small);
        pool.release();
        assert_eq!((pool.stats.reserved, pool.stats.idle), (0, 0));
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        assert!(matches!(pool().take(usize::MAX / 2), Err(Error::OutOfMemory { .. })));
    }
}
