#![allow(unsafe_code)]

use std::sync::{Arc, atomic::Ordering};

use super::{Driver, Gpu};
use crate::{Error, Result, pool::Source};

/// A block of a device's memory, contents unspecified. Returns to the device's pool when dropped.
///
/// All work on the device is done in the order of one stream, so a block may be given out again while the last kernel
/// that uses it still waits its turn.
pub(crate) struct DeviceBlock {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
}

impl DeviceBlock {
    pub(crate) fn take(gpu: &Arc<Gpu>, bytes: usize) -> Result<DeviceBlock> {
        let _turn = gpu.turn();
        let (address, bytes) = match gpu.memory.take(gpu, bytes) {
            Some(block) => block?,
            None if gpu.driver().pooled() => gpu.pool().take(gpu.driver(), bytes)?,
            None => (gpu.driver().allocate(bytes)?, bytes),
        };
        Ok(DeviceBlock { gpu: gpu.clone(), address, bytes })
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    pub(crate) fn zero(&mut self, bytes: usize) -> Result<()> {
        assert!(bytes <= self.bytes);
        self.gpu.memory.note(self.address);
        let _turn = self.gpu.turn();
        // SAFETY: the block holds that many bytes and is uniquely borrowed.
        unsafe { self.gpu.driver().zero(self.address, bytes) }
    }

    pub(crate) fn read(&self, skip: usize, to: &mut [u8]) -> Result<()> {
        assert!(skip + to.len() <= self.bytes);
        self.gpu.transfers[0].fetch_add(1, Ordering::Relaxed);
        let _turn = self.gpu.turn();
        // SAFETY: the bytes lie in the block.
        unsafe { self.gpu.driver().read(self.address + skip as u64, to) }
    }

    pub(crate) fn write(&mut self, skip: usize, from: &[u8]) -> Result<()> {
        assert!(skip + from.len() <= self.bytes);
        self.gpu.memory.note(self.address);
        self.gpu.transfers[1].fetch_add(1, Ordering::Relaxed);
        let _turn = self.gpu.turn();
        // SAFETY: the bytes lie in the block, which is uniquely borrowed.
        unsafe { self.gpu.driver().write(self.address + skip as u64, from) }
    }

    /// Fills the first `bytes` bytes with those of `from` after `skip`.
    pub(crate) fn copy(&mut self, from: &DeviceBlock, skip: usize, bytes: usize) -> Result<()> {
        assert!(skip + bytes <= from.bytes && bytes <= self.bytes && self.gpu == from.gpu);
        self.gpu.memory.note(self.address);
        self.gpu.memory.note(from.address);
        let _turn = self.gpu.turn();
        // SAFETY: both ranges lie in their blocks; `self` is uniquely borrowed, so they are different blocks.
        unsafe { self.gpu.driver().copy(self.address, from.address + skip as u64, bytes) }
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        self.gpu.give_back(self.address, self.bytes);
    }
}

impl Source for dyn Driver + '_ {
    type Ptr = u64;

    fn allocate(&self, bytes: usize) -> Result<u64> {
        Driver::allocate(self, bytes)
    }

    unsafe fn free(&self, ptr: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { Driver::free(self, ptr, bytes) }
    }

    fn out_of_memory(&self, bytes: usize) -> Error {
        Error::OutOfMemory { bytes, device: self.name() }
    }
}
