#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use cudarc::driver::sys;

use super::{Arguments, Captured, Driver, Function, GpuInfo, Module, emulator::Library};
use crate::{Error, Result};

/// A driver whose kernels run on the host, compiled by the C++ compiler against the emulation's header.
///
/// Unless asked for, nothing is pooled: every buffer ends at a guard page and begins poisoned.
pub(super) struct Emulated {
    pooled: bool,
    seed: u32,
    launches: AtomicU32,
    /// Replaces text of one module: the mutation check plants bugs with it.
    patch: Option<Patch>,
    libraries: Mutex<HashMap<&'static str, Arc<Library>>>,
    functions: Mutex<Vec<(Arc<Library>, String)>>,
    memory: Arc<Library>,
    /// The first write past the end of a buffer, found when it was freed.
    fault: Mutex<Option<String>>,
    /// The work so far, while it is recorded instead of done.
    recording: Mutex<Option<Vec<Work>>>,
}

/// Bytes that an emulated device has, and the most that it gives at once.
const MEMORY: usize = 1 << 30;

/// Recorded work.
pub(crate) struct Recording(Vec<Work>);

/// One thing that a device was asked for.
enum Work {
    Launch { function: Function, grid: [u32; 3], threads: u32, shared: u32, arguments: Arguments },
    Write { to: u64, bytes: Vec<u8> },
    Copy { to: u64, from: u64, bytes: usize },
    Zero { at: u64, bytes: usize },
}

/// A bug to plant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patch {
    pub(crate) module: &'static str,
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
}

/// An emulated device. It has few multiprocessors, so that what depends on their number has something to do in small
/// tests.
pub(super) fn open(seed: u32, patch: Option<Patch>, pooled: bool) -> Result<(GpuInfo, Box<dyn Driver>)> {
    let memory = Arc::new(Library::build("memory", "")?);
    let driver = Emulated {
        pooled,
        seed,
        launches: AtomicU32::new(0),
        patch,
        libraries: Mutex::default(),
        functions: Mutex::default(),
        memory,
        fault: Mutex::default(),
        recording: Mutex::default(),
    };
    let info = GpuInfo {
        ordinal: 0,
        name: "emulated on the host".into(),
        memory: MEMORY,
        compute_capability: (8, 0),
        multiprocessors: 4,
        shared_memory: 163 << 10,
    };
    Ok((info, Box::new(driver)))
}

impl Emulated {
    /// Whether work is recorded, to which this is then added.
    fn record(&self, work: impl FnOnce() -> Work) -> bool {
        match &mut *self.recording.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(recording) => {
                recording.push(work());
                true
            }
            None => false,
        }
    }

    fn library(&self, module: &'static Module) -> Result<Arc<Library>> {
        let mut libraries = self.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = libraries.get(module.name) {
            return Ok(library.clone());
        }
        let mut text = module.text();
        if let Some(patch) = self.patch.filter(|p| p.module == module.name) {
            let at = text.find(patch.from).unwrap_or_else(|| panic!("{}: there is no {:?}", module.name, patch.from));
            text.replace_range(at..at + patch.from.len(), patch.to);
        }
        let library = Arc::new(Library::build(module.name, &text)?);
        libraries.insert(module.name, library.clone());
        Ok(library)
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "the emulated device".into()
    }

    fn pooled(&self) -> bool {
        self.pooled
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        // Fresh memory is poisoned, and so taken from the host at once: the host must not be the one that runs out.
        if bytes > MEMORY {
            return Err(Error::OutOfMemory { bytes, device: self.name() });
        }
        match self.memory.alloc(bytes) {
            p if p.is_null() => Err(Error::OutOfMemory { bytes, device: self.name() }),
            p => Ok(p as u64),
        }
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        if let Err(what) = unsafe { self.memory.free(address as *mut c_void, bytes) } {
            self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        }
    }

    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        if self.record(|| Work::Write { to, bytes: from.to_vec() }) {
            return Ok(());
        }
        // SAFETY: the caller's promise; the device's memory is the host's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        if self.recording.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Err(Error::Cuda { what: "recorded work must not read anything back".into() });
        }
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        self.synchronize()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if self.record(|| Work::Copy { to, from, bytes }) {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        if self.record(|| Work::Zero { at, bytes }) {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn function(&self, module: &'static Module, kernel: &str) -> Result<Function> {
        let library = self.library(module)?;
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        functions.push((library, kernel.to_owned()));
        Ok(Function(functions.len() - 1))
    }

    unsafe fn launch(
        &self,
        function: Function,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut Arguments,
    ) -> Result<()> {
        if self.record(|| Work::Launch { function, grid, threads, shared, arguments: arguments.clone() }) {
            return Ok(());
        }
        let (library, kernel) = self.functions.lock().unwrap_or_else(PoisonError::into_inner)[function.0].clone();
        // Another order of threads for every launch, of the kind (ahead or in lockstep) that the seed chose.
        let seed = self.seed.wrapping_add(2 * self.launches.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the caller's promise.
        unsafe { library.launch(&kernel, grid, threads, shared, &mut arguments.pointers(), seed) }
            .map_err(|e| Error::Cuda { what: format!("{kernel} (grid {grid:?}, seed {seed}): {e}") })
    }

    fn synchronize(&self) -> Result<()> {
        match self.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(what) => Err(Error::Cuda { what }),
            None => Ok(()),
        }
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>> {
        work().map(|()| None)
    }

    fn begin_capture(&self) -> Result<()> {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured> {
        let work = self.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Captured::Emulated(Recording(work.unwrap_or_default())))
    }

    fn replay(&self, captured: &Captured) -> Result<()> {
        let Captured::Emulated(Recording(all)) = captured else {
            return Err(Error::Cuda { what: "a graph of another device".into() });
        };
        for work in all {
            // SAFETY: what was recorded was promised to be right, and the memory it uses is kept by its `Graph`.
            unsafe {
                match work {
                    Work::Launch { function, grid, threads, shared, arguments } => {
                        self.launch(*function, *grid, *threads, *shared, &mut arguments.clone())?;
                    }
                    Work::Write { to, bytes } => self.write(*to, bytes)?,
                    Work::Copy { to, from, bytes } => self.copy(*to, *from, *bytes)?,
                    Work::Zero { at, bytes } => self.zero(*at, *bytes)?,
                }
            }
        }
        Ok(())
    }

    fn stream(&self) -> Option<sys::CUstream> {
        None
    }
}
