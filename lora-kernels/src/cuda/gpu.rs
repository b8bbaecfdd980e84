#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{Arguments, Driver, Function, GpuInfo, Launch, Module, driver, graph};
use crate::{Error, PoolStats, Result, pool::Pool};

/// One CUDA device: its stream, its memory and the kernels loaded on it. Opened once per process and then shared.
pub struct Gpu {
    info: GpuInfo,
    driver: Box<dyn Driver>,
    pool: Mutex<Pool<u64>>,
    /// The memory that graphs hold.
    pub(super) memory: graph::Memory,
    /// The loaded kernels by module and name.
    functions: Mutex<HashMap<&'static str, HashMap<String, Function>>>,
    /// Whether every launch is waited for, so that an error names its kernel (`LORA_CUDA_SYNC=1`).
    synchronous: bool,
    /// Copies to the host, and from it.
    pub(super) transfers: [AtomicU64; 2],
}

impl Gpu {
    /// The device of that number.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] when there is no driver, no such device, or one of compute capability below 8.0.
    pub fn open(ordinal: usize) -> Result<Arc<Gpu>> {
        static OPEN: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let (info, driver) = driver::open(ordinal)?;
        let gpu = Arc::new(Gpu::new(info, driver));
        open.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    /// A device whose kernels run on the host, under the emulation that the kernels are checked with: slow, exact, and
    /// unforgiving. `seed` chooses the order in which threads run.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] when there is no C++ compiler.
    #[cfg(feature = "emulator")]
    pub fn emulated(seed: u32) -> Result<Arc<Gpu>> {
        Gpu::emulated_with(seed, None)
    }

    /// An emulated device with a bug planted in its kernels.
    #[cfg(feature = "emulator")]
    pub(crate) fn emulated_with(seed: u32, patch: Option<super::emulated::Patch>) -> Result<Arc<Gpu>> {
        let (info, driver) = super::emulated::open(seed, patch, false)?;
        Ok(Arc::new(Gpu::new(info, driver)))
    }

    /// An emulated device that keeps freed memory for reuse, as a real one does: for tests of memory. It finds fewer
    /// errors than [`Gpu::emulated`], whose every buffer begins poisoned and ends at a guard page.
    ///
    /// # Errors
    /// As of [`Gpu::emulated`].
    #[cfg(feature = "emulator")]
    pub fn emulated_pooled() -> Result<Arc<Gpu>> {
        let (info, driver) = super::emulated::open(0, None, true)?;
        Ok(Arc::new(Gpu::new(info, driver)))
    }

    pub(crate) fn new(info: GpuInfo, driver: Box<dyn Driver>) -> Gpu {
        let synchronous = std::env::var_os("LORA_CUDA_SYNC").is_some_and(|v| v == "1");
        Gpu {
            info,
            driver,
            pool: Mutex::default(),
            memory: graph::Memory::default(),
            functions: Mutex::default(),
            synchronous,
            transfers: Default::default(),
        }
    }

    /// What the device is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Waits until everything asked of the device is done.
    ///
    /// # Errors
    /// What a kernel did wrong since the last call.
    pub fn synchronize(&self) -> Result<()> {
        let _turn = self.turn();
        self.driver.synchronize()
    }

    /// The time that the device spends on what `work` asks of it, by two events in its stream; `None` where time means
    /// nothing, on an emulated device. Does `work` in any case, once. One such measurement at a time.
    ///
    /// # Errors
    /// Those of `work`, and what a kernel did wrong.
    pub fn time<E: From<Error>>(
        &self,
        mut work: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Duration>, E> {
        let mut failed = None;
        let milliseconds = self.timed(&mut || {
            work().map_err(|e| {
                failed = Some(e);
                Error::Cuda { what: "the measured work failed".into() }
            })
        });
        match failed {
            Some(e) => Err(e),
            None => Ok(milliseconds?.map(|ms| Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))),
        }
    }

    /// [`Gpu::time`] in milliseconds.
    pub(crate) fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>> {
        let _turn = self.turn();
        self.driver.time(work)
    }

    /// Waits for a recording of another thread ([`graph::Memory::turn`]): held around whatever is asked of the device.
    pub(crate) fn turn(&self) -> Option<graph::Turn<'_>> {
        self.memory.turn(self)
    }

    /// A launch uses this address.
    pub(crate) fn note(&self, address: u64) {
        self.memory.note(address);
    }

    /// The state of the device's memory pool.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool().stats
    }

    /// How often something was copied to the host since the device was opened. Each time the host waited for all that
    /// the device had to do: a loop that is to keep the device busy reads rarely.
    pub fn reads(&self) -> u64 {
        self.transfers[0].load(Ordering::Relaxed)
    }

    /// How often something was copied from the host since the device was opened.
    pub fn writes(&self) -> u64 {
        self.transfers[1].load(Ordering::Relaxed)
    }

    /// Gives idle memory back to the device.
    pub fn release_idle_memory(&self) {
        let _turn = self.turn();
        self.pool().release(&*self.driver);
    }

    pub(super) fn pool(&self) -> MutexGuard<'_, Pool<u64>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a block that its owner has given up: for a graph that uses it, else for whoever asks next.
    pub(super) fn give_back(&self, address: u64, bytes: usize) {
        let pooled = self.driver.pooled();
        if self.memory.keep(address, bytes, pooled) {
            return;
        }
        match pooled {
            true => self.pool().put(address, bytes),
            // SAFETY: nobody holds the block any more.
            false => unsafe { self.driver.free(address, bytes) },
        }
    }

    /// Whether work is only recorded now, to be done later or never: what it writes must not be kept for other work.
    pub(crate) fn is_recording(&self) -> bool {
        self.memory.is_recording(self)
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Prepares the launch of one kernel, which is compiled and loaded when it is used first.
    pub(crate) fn launch<'g>(&'g self, module: &'static Module, kernel: &str) -> Result<Launch<'g>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let functions = functions.entry(module.name).or_default();
        let function = match functions.get(kernel) {
            Some(function) => *function,
            None => *functions.entry(kernel.into()).or_insert(self.driver.function(module, kernel)?),
        };
        Ok(Launch::new(self, function))
    }

    /// # Safety
    /// As [`Driver::launch`].
    pub(super) unsafe fn run(
        &self,
        function: Function,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut Arguments,
    ) -> Result<()> {
        let _turn = self.turn();
        // SAFETY: the caller's promise.
        unsafe { self.driver.launch(function, grid, threads, shared, arguments)? };
        if self.synchronous && !self.is_recording() { self.driver.synchronize() } else { Ok(()) }
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Gpu) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Gpu {}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.info.ordinal)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({self}, {})", self.info.name)
    }
}
