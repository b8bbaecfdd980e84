//! Counting what a program asks the system's allocator for, to show that a loop asks for nothing.

#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

static CALLS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
static FREED: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted. A program that wants the counts of [`heap_stats`] makes it its own:
///
/// ```
/// use lora_kernels::{CountingHeap, heap_stats};
///
/// #[global_allocator]
/// static HEAP: CountingHeap = CountingHeap;
///
/// let before = heap_stats().calls;
/// let x = std::hint::black_box(vec![0u8; 100]);
/// let with_x = heap_stats();
/// assert_eq!(with_x.calls, before + 1);
/// drop(x);
/// assert_eq!(heap_stats().live, with_x.live - 100);
/// ```
pub struct CountingHeap;

/// What was asked of the allocator since the program began, by all threads, blocks of the pool included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStats {
    /// Allocations, and reallocations to another size.
    pub calls: u64,
    /// Bytes that they asked for.
    pub bytes: u64,
    /// Bytes that are in use now.
    pub live: u64,
}

/// The counts so far; zeros where [`CountingHeap`] is not the allocator.
pub fn heap_stats() -> HeapStats {
    // What is freed was counted before.
    let freed = FREED.load(Relaxed);
    let bytes = BYTES.load(Relaxed);
    HeapStats { calls: CALLS.load(Relaxed), bytes, live: bytes - freed }
}

fn count(bytes: usize) {
    CALLS.fetch_add(1, Relaxed);
    BYTES.fetch_add(bytes as u64, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those of the callee.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        FREED.fetch_add(layout.size() as u64, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        FREED.fetch_add(layout.size() as u64, Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}
