//! Recorded work that is started again with one call.

#![allow(unsafe_code)]

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
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
    captured: Option<Captured>,
}

impl Graph {
    /// Records what `work` asks of the device, without doing any of it. `work` must not read anything back, and what it
    /// computes once and keeps (a cast of parameters) has to be there already. Other threads' work waits meanwhile.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Cuda`] when the device is the CPU, this thread records already, or the device cannot record
    /// the work.
    pub fn record<T, E: From<Error>>(
        device: &Device,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Graph), E> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::Cuda { what: "the CPU records no graphs".into() }.into());
        };
        let recording = Recording::begin(gpu)?;
        let result = work();
        // Ended in any case: a stream that goes on recording does nothing any more.
        let graph = recording.end().map(|(captured, id)| Graph { gpu: gpu.clone(), id, captured: Some(captured) });
        // What went wrong in the work explains more than what it did to the recording.
        Ok((result?, graph?))
    }

    /// Does the recorded work once more, after all that was asked of the device before.
    ///
    /// # Errors
    /// What starting it can cause.
    pub fn launch(&self) -> Result<()> {
        let _turn = self.gpu.turn();
        match &self.captured {
            Some(captured) => self.gpu.driver().replay(captured),
            None => Ok(()),
        }
    }
}

thread_local! {
    /// The device that this thread records on.
    static RECORDING: Cell<*const Gpu> = const { Cell::new(ptr::null()) };
    /// The device of which this thread has the turn.
    static HAVING: Cell<*const Gpu> = const { Cell::new(ptr::null()) };
}

/// While it lives, no other thread begins to record on the device.
pub(crate) struct Turn<'g> {
    _shared: RwLockReadGuard<'g, ()>,
    before: *const Gpu,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        HAVING.set(self.before);
    }
}

/// A recording under way; ended when dropped, also by a panic.
struct Recording<'g> {
    gpu: &'g Gpu,
    /// All others wait.
    _alone: RwLockWriteGuard<'g, ()>,
    capturing: bool,
}

impl<'g> Recording<'g> {
    fn begin(gpu: &'g Gpu) -> Result<Recording<'g>> {
        if gpu.is_recording() || ptr::eq(HAVING.get(), gpu) {
            return Err(Error::Cuda { what: "a graph cannot be recorded within recorded or measured work".into() });
        }
        let _alone = gpu.memory.turns.write().unwrap_or_else(PoisonError::into_inner);
        RECORDING.set(gpu);
        gpu.memory.begin();
        let mut recording = Recording { gpu, _alone, capturing: false };
        gpu.driver().begin_capture()?;
        recording.capturing = true;
        Ok(recording)
    }

    /// The recorded work, and the number under which its memory is kept.
    fn end(mut self) -> Result<(Captured, usize)> {
        self.capturing = false;
        let captured = self.gpu.driver().end_capture()?;
        Ok((captured, self.gpu.memory.keep_recorded()))
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if self.capturing {
            // Given up half way: what was recorded is nobody's.
            let _ = self.gpu.driver().end_capture();
        }
        RECORDING.set(ptr::null());
        self.gpu.memory.discard_recorded(self.gpu);
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Waits until it has run, which nobody may while another thread records.
        let turn = self.gpu.turn();
        drop(self.captured.take());
        drop(turn);
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
    /// Held for reading by whoever asks something of the device, and for writing by the thread that records.
    turns: RwLock<()>,
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

    /// Waits until no other thread records on the device, and keeps others from beginning to. Nothing to wait for when
    /// this thread records or has the turn.
    pub(super) fn turn(&self, gpu: &Gpu) -> Option<Turn<'_>> {
        if self.is_recording(gpu) || ptr::eq(HAVING.get(), gpu) {
            return None;
        }
        let _shared = self.turns.read().unwrap_or_else(PoisonError::into_inner);
        Some(Turn { _shared, before: HAVING.replace(gpu) })
    }

    /// Whether this thread records on the device.
    pub(super) fn is_recording(&self, gpu: &Gpu) -> bool {
        ptr::eq(RECORDING.get(), gpu)
    }

    fn begin(&self) {
        self.state().recording = Some(Held::default());
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    fn keep_recorded(&self) -> usize {
        let mut state = self.state();
        let held = state.recording.take().unwrap_or_default();
        let id = state.next;
        state.next += 1;
        state.graphs.insert(id, held);
        id
    }

    fn discard_recorded(&self, gpu: &Gpu) {
        let held = self.state().recording.take();
        if let Some(held) = held {
            self.release(gpu, held);
        }
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

    /// Every kind of launch keeps what it uses: those that lay their arguments out themselves too.
    #[test]
    fn products_keep_their_matrices() {
        for device in devices() {
            let m = |v: f32| Buffer::from_slice(&device, &[v; 16 * 16]).unwrap();
            let (x, w, a, b) = (m(1.0), m(2.0), m(0.5), m(0.25));
            let (mut h, mut g, mut unread, mut y) = (m(0.0), m(0.0), m(0.0), m(0.0));
            let of = |b: &Buffer| -> Vec<f32> { b.to_vec(0..256).unwrap() };
            let ((), graph) = Graph::record(&device, || {
                crate::lora_down(1.0, mat(&x), &[mat(&a)], MatMut::new(&mut h, 0, 16, 16))?;
                let parts = [crate::LoraPart { cols: 0..16, b: mat(&b) }];
                crate::lora_forward(mat(&x), mat(&w), None, mat(&h), &parts, MatMut::new(&mut y, 0, 16, 16))?;
                let db = crate::Acc { to: MatMut::new(&mut unread, 0, 16, 16), beta: 0.0 };
                let g = MatMut::new(&mut g, 0, 16, 16);
                crate::lora_backward_up(1.0, mat(&x), Some(mat(&h)), &parts, Some(g), vec![Some(db)])?;
                crate::gemm(1.0, mat(&x), mat(&w), 1.0, MatMut::new(&mut y, 0, 16, 16))
            })
            .unwrap();
            drop((x, w, a, b, h, g, unread));
            // Whoever takes memory now must not be given theirs.
            let others: Vec<Buffer> = (0..8).map(|_| m(7.0)).collect();
            graph.launch().unwrap();
            // x·W twice, 32 each, and h·Bᵀ = 16 · (16·0.5) · 0.25.
            assert_eq!(of(&y), [64.0 + 32.0; 256], "{device}");
            assert!(others.iter().all(|o| of(o) == [7.0; 256]), "{device}");
        }
    }

    fn mat(b: &Buffer) -> Mat<'_> {
        Mat::new(b, 0, 16, 16)
    }

    #[test]
    fn other_threads_wait_while_one_records() {
        for device in devices() {
            let x = Buffer::from_slice(&device, &[3.0f32; 8]).unwrap();
            let mut y = Buffer::from_slice(&device, &[0.0f32; 8]).unwrap();
            let (ready, recording) = std::sync::mpsc::channel();
            std::thread::scope(|s| {
                let (x, device) = (&x, &device);
                let other = s.spawn(move || {
                    recording.recv().unwrap();
                    let mut z = Buffer::from_slice(device, &[0.0f32; 8]).unwrap();
                    axpby(1.0, Mat::new(x, 0, 1, 8), 0.0, MatMut::new(&mut z, 0, 1, 8)).unwrap();
                    z.to_vec::<f32>(0..8).unwrap()
                });
                let ((), graph) = Graph::record(device, || {
                    ready.send(()).unwrap();
                    // Long enough for the other to get in, if it could.
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    doubled(device, x, &mut y)
                })
                .unwrap();
                assert_eq!(other.join().unwrap(), [3.0; 8], "{device}");
                graph.launch().unwrap();
            });
            assert_eq!(y.to_vec::<f32>(0..8).unwrap(), [6.0; 8], "{device}");
        }
    }

    #[test]
    fn a_panic_ends_the_recording() {
        for device in devices() {
            let recorded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _: Result<_> = Graph::record(&device, || -> Result<()> { panic!("half way") });
            }));
            assert!(recorded.is_err());
            let x = Buffer::from_slice(&device, &[1.0f32]).unwrap();
            assert_eq!(x.to_vec::<f32>(0..1).unwrap(), [1.0], "{device}");
        }
    }

    #[test]
    fn recordings_do_not_nest() {
        for device in devices() {
            let Device::Cuda(gpu) = &device else { unreachable!("only GPUs were asked for") };
            let inner = || Graph::record(&device, || Ok::<_, Error>(())).map(drop);
            assert!(Graph::record(&device, inner).is_err_and(|e| e.to_string().contains("within")), "{device}");
            assert!(gpu.time(inner).is_err_and(|e| e.to_string().contains("within")), "{device}");
            assert!(inner().is_ok(), "{device}");
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
