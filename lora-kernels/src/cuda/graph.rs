//! Recorded work that is started again with one call.

#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{Captured, Gpu};
use crate::{Device, Error, Result, pool::Pool};

/// Work of a device that was recorded once, and is started again as a whole: many small kernels for the price of one call.
///
/// Every launch is repeated with the addresses and numbers that it had: what changes from one time to the next has to lie
/// in memory of the device, written before ([`crate::Buffer::write`]). Memory that the work uses stays with the graph,
/// whatever becomes of its owners.
pub struct Graph {
    gpu: Arc<Gpu>,
    id: usize,
    captured: Captured,
}

impl Graph {
    /// Records what `work` asks of the device, without doing any of it. `work` must not read anything back.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Cuda`] when the device is the CPU, or cannot record the work.
    pub fn record<T, E: From<Error>>(
        device: &Device,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Graph), E> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::Cuda { what: "the CPU records no graphs".into() }.into());
        };
        gpu.memory.begin()?;
        let captured = gpu.driver().begin_capture().map_err(E::from).and_then(|()| {
            let result = work();
            // Ended in any case: a stream that goes on recording does nothing any more.
            let captured = gpu.driver().end_capture();
            Ok((result?, captured?))
        });
        let id = gpu.memory.end(gpu, captured.is_ok());
        let (result, captured) = captured?;
        Ok((result, Graph { gpu: gpu.clone(), id, captured }))
    }

    /// Does the recorded work once more, after all that was asked of the device before.
    ///
    /// # Errors
    /// What starting it can cause.
    pub fn launch(&self) -> Result<()> {
        self.gpu.driver().replay(&self.captured)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.memory.forget(&self.gpu, self.id);
    }
}

/// Who holds the memory of a device's graphs.
///
/// While a graph is recorded, new blocks come from a pool of its own, so that nobody else is given memory that the graph
/// will write again. A block that its recorded launches use, and whose owner gives it up, is kept until the graph is gone.
#[derive(Default)]
pub(super) struct Memory {
    /// The graph that is being recorded, and all that exist.
    state: Mutex<State>,
    /// How many graphs there are, the one being recorded included: with none, nobody looks further.
    count: AtomicUsize,
}

#[derive(Default)]
struct State {
    recording: Option<Held>,
    graphs: BTreeMap<usize, Held>,
    next: usize,
}

/// What belongs to one graph.
#[derive(Default)]
struct Held {
    /// Blocks that were taken while it was recorded and are free again.
    pool: Pool<u64>,
    /// Addresses of all blocks that were taken while it was recorded.
    own: BTreeSet<u64>,
    /// Addresses that its launches use, inside of blocks.
    used: BTreeSet<u64>,
    /// Blocks it uses that their owners have given up.
    given_up: Vec<(u64, usize)>,
}

impl Held {
    fn uses(&self, address: u64, bytes: usize) -> bool {
        self.used.range(address..address + bytes.max(1) as u64).next().is_some()
    }
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Whether a graph is being recorded.
    pub(super) fn is_recording(&self) -> bool {
        !self.idle() && self.state().recording.is_some()
    }

    fn begin(&self) -> Result<()> {
        let mut state = self.state();
        if state.recording.is_some() {
            return Err(Error::Cuda { what: "a graph is recorded already".into() });
        }
        state.recording = Some(Held::default());
        self.count.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn end(&self, gpu: &Gpu, keep: bool) -> usize {
        let mut state = self.state();
        let held = state.recording.take().unwrap_or_default();
        let id = state.next;
        state.next += 1;
        if keep {
            state.graphs.insert(id, held);
            return id;
        }
        drop(state);
        self.release(gpu, held);
        id
    }

    fn forget(&self, gpu: &Gpu, id: usize) {
        let held = self.state().graphs.remove(&id);
        if let Some(held) = held {
            self.release(gpu, held);
        }
    }

    /// Gives the blocks of a graph that is gone to whoever needs them next.
    fn release(&self, gpu: &Gpu, mut held: Held) {
        self.count.fetch_sub(1, Ordering::AcqRel);
        let own = held.pool.drain();
        for (address, bytes) in own.into_iter().chain(held.given_up) {
            gpu.give_back(address, bytes);
        }
    }

    /// A launch uses this address.
    pub(super) fn note(&self, address: u64) {
        if !self.idle()
            && let Some(recording) = &mut self.state().recording
        {
            recording.used.insert(address);
        }
    }

    /// A block for work that is being recorded; `None` when nothing is.
    pub(super) fn take(&self, gpu: &Gpu, bytes: usize) -> Option<Result<(u64, usize)>> {
        if self.idle() {
            return None;
        }
        let mut state = self.state();
        let recording = state.recording.as_mut()?;
        let block = match gpu.driver().pooled() {
            true => recording.pool.take_or_add(gpu.driver(), bytes),
            false => gpu.driver().allocate(bytes).map(|address| (address, bytes)),
        };
        recording.own.extend(block.as_ref().map(|(address, _)| *address));
        Some(block)
    }

    /// Whether a graph keeps the block that its owner gives up.
    pub(super) fn keep(&self, address: u64, bytes: usize, pooled: bool) -> bool {
        if self.idle() {
            return false;
        }
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            // A block from before that nothing recorded uses is kept as well: giving it back now could be work.
            match pooled {
                // Work is done in order: the next recorded launch may have it.
                true if recording.own.contains(&address) => recording.pool.put(address, bytes),
                _ => recording.given_up.push((address, bytes)),
            }
            return true;
        }
        let holds = |held: &Held| held.own.contains(&address) || held.uses(address, bytes);
        match state.graphs.values_mut().find(|held| holds(held)) {
            Some(held) => held.given_up.push((address, bytes)),
            None => return false,
        }
        true
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::{Buffer, DType, Mat, MatMut, axpby, cuda::testing::missing};

    fn devices() -> Vec<Device> {
        let emulated = [Gpu::emulated(0), Gpu::emulated_pooled(), Gpu::open(0)];
        let devices: Vec<Device> = emulated.into_iter().flatten().map(Device::Cuda).collect();
        if devices.is_empty() {
            missing("no emulation");
        }
        devices
    }

    /// y = 2·x by way of a buffer that lives no longer than the recording.
    fn doubled(device: &Device, x: &Buffer, y: &mut Buffer) -> Result<()> {
        let n = x.len();
        let mut middle = Buffer::empty(device, DType::F32, n)?;
        axpby(1.0, Mat::new(x, 0, 1, n), 0.0, MatMut::new(&mut middle, 0, 1, n))?;
        axpby(2.0, Mat::new(&middle, 0, 1, n), 0.0, MatMut::new(y, 0, 1, n))
    }

    #[test]
    fn recorded_work_is_done_again_on_what_is_there_then() {
        for device in devices() {
            let mut x = Buffer::from_slice(&device, &[1.0f32, 2.0, 3.0]).unwrap();
            let mut y = Buffer::from_slice(&device, &[0.0f32; 3]).unwrap();
            let ((), graph) = Graph::record(&device, || doubled(&device, &x, &mut y)).unwrap();
            assert_eq!(y.to_vec::<f32>(0..3).unwrap(), [0.0; 3], "recording does nothing");
            for round in 1..4u8 {
                let r = f32::from(round);
                x.write(0, &[r, 2.0 * r, 3.0 * r]).unwrap();
                // Others take and fill memory meanwhile: none of it may be the graph's.
                let other = Buffer::from_slice(&device, &[7.0f32; 3]).unwrap();
                graph.launch().unwrap();
                assert_eq!(y.to_vec::<f32>(0..3).unwrap(), [2.0 * r, 4.0 * r, 6.0 * r], "{device}");
                assert_eq!(other.to_vec::<f32>(0..3).unwrap(), [7.0; 3], "{device}");
            }
        }
    }

    #[test]
    fn what_a_graph_uses_outlives_its_owners_and_goes_with_the_graph() {
        for device in devices() {
            let Device::Cuda(gpu) = &device else { unreachable!("only GPUs were asked for") };
            let x = Buffer::from_slice(&device, &[5.0f32; 64]).unwrap();
            let mut y = Buffer::from_slice(&device, &[0.0f32; 64]).unwrap();
            let ((), graph) = Graph::record(&device, || doubled(&device, &x, &mut y)).unwrap();
            drop(x);
            let other = Buffer::from_slice(&device, &[1.0f32; 64]).unwrap();
            graph.launch().unwrap();
            assert_eq!(y.to_vec::<f32>(0..64).unwrap(), [10.0; 64], "{device}");
            assert_eq!(other.to_vec::<f32>(0..64).unwrap(), [1.0; 64], "{device}");
            let idle = gpu.pool_stats().idle;
            drop(graph);
            if gpu.driver().pooled() {
                assert!(gpu.pool_stats().idle >= idle + 2 * 256, "two blocks came back to the pool of {device}");
            }
            gpu.synchronize().unwrap();
        }
    }

    #[test]
    fn reading_back_while_recording_is_an_error_and_leaves_the_device_usable() {
        for device in devices() {
            let x = Buffer::from_slice(&device, &[1.0f32]).unwrap();
            let failed = Graph::record(&device, || x.to_vec::<f32>(0..1));
            assert!(matches!(failed, Err(Error::Cuda { .. })), "{device}");
            assert_eq!(x.to_vec::<f32>(0..1).unwrap(), [1.0], "{device}");
        }
        assert!(Graph::record(&Device::Cpu, || Ok::<_, Error>(())).is_err());
    }
}
