#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{
    CudaContext,
    result::{self, DriverError},
    sys,
};

use super::{Arguments, Module, module};
use crate::{Error, Result};

/// What a CUDA device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub memory: usize,
    /// Its compute capability, such as (9, 0).
    pub compute_capability: (u32, u32),
    /// Its number of multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that one block may have.
    pub shared_memory: usize,
}

/// A kernel that is loaded on a device; a handle of its driver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(super) usize);

/// Recorded work.
pub(crate) enum Captured {
    Cuda(CudaGraph),
    #[cfg(feature = "emulator")]
    Emulated(super::emulated::Recording),
}

/// What a device can do: CUDA's driver, or its emulation. All work is done in the order it was asked for.
pub(crate) trait Driver: Send + Sync {
    /// The device's name in messages.
    fn name(&self) -> String;
    /// Whether freed memory is kept for reuse.
    fn pooled(&self) -> bool {
        true
    }
    /// New memory, aligned for every access (256 bytes on a device).
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// # Safety
    /// The memory came from `allocate` and nobody uses it any more.
    unsafe fn free(&self, address: u64, bytes: usize);
    /// Copies from the host.
    ///
    /// # Safety
    /// The bytes lie in live memory of the device.
    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<()>;
    /// Copies to the host, when all work before is done.
    ///
    /// # Safety
    /// The bytes lie in live memory of the device.
    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Copies within the device.
    ///
    /// # Safety
    /// Both ranges lie in live memory of the device and do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Sets bytes to zero.
    ///
    /// # Safety
    /// The bytes lie in live memory of the device.
    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()>;
    /// Loads a kernel, compiling its module if need be.
    fn function(&self, module: &'static Module, kernel: &str) -> Result<Function>;
    /// Starts a kernel.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and all it accesses with them lies in live memory that it may touch.
    unsafe fn launch(
        &self,
        function: Function,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut Arguments,
    ) -> Result<()>;
    /// Waits until all work is done.
    fn synchronize(&self) -> Result<()>;
    /// Milliseconds that the device spends on what `work` asks of it; `None` where time means nothing.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>>;
    /// From here on work is recorded instead of done.
    fn begin_capture(&self) -> Result<()>;
    /// Ends the recording.
    fn end_capture(&self) -> Result<Captured>;
    /// Does recorded work once more. What it uses is still there: a [`super::Graph`] sees to that.
    fn replay(&self, captured: &Captured) -> Result<()>;
    /// The CUDA stream, for libraries that take one.
    fn stream(&self) -> Option<sys::CUstream>;
}

/// The CUDA devices of this machine.
///
/// # Errors
/// [`Error::Cuda`] when there is no driver, or it cannot be used. No device is an empty list.
pub fn devices() -> Result<Vec<GpuInfo>> {
    guard(|| {
        init()?;
        let count = CudaContext::device_count().map_err(failed)?;
        (0..count).map(|i| info(i).map_err(failed)).collect()
    })
}

/// Opens the device of that number.
pub(super) fn open(ordinal: usize) -> Result<(GpuInfo, Box<dyn Driver>)> {
    let devices = devices()?;
    let Some(info) = devices.get(ordinal) else {
        let what = match devices.len() {
            0 => "the driver finds no device; check nvidia-smi, or use --device cpu".to_owned(),
            1 => format!("there is no device {ordinal}; the only one is cuda:0"),
            n => format!("there is no device {ordinal}; there are cuda:0 to cuda:{}", n - 1),
        };
        return Err(Error::Cuda { what });
    };
    let (major, minor) = info.compute_capability;
    if major < 8 {
        let what = format!(
            "{} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later; use --device cpu",
            info.name
        );
        return Err(Error::Cuda { what });
    }
    guard(|| {
        let context = CudaContext::new(ordinal).map_err(failed)?;
        context.bind_to_thread().map_err(failed)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let events = Mutex::new([event()?, event()?]);
        let driver =
            Cuda { context, stream, events, info: info.clone(), modules: Mutex::default(), staged: Mutex::default() };
        Ok((info.clone(), Box::new(driver) as Box<dyn Driver>))
    })
}

/// Runs calls into a CUDA library. cudarc panics when the library, or a function that it should have, cannot be found:
/// that is an error of the machine, not of the program.
pub(crate) fn guard<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("a CUDA library failed").lines().next().unwrap_or_default();
        Err(Error::Cuda { what: format!("{text}; reinstall the NVIDIA driver, or use --device cpu") })
    })
}

fn init() -> Result<()> {
    // Asked first, because cudarc panics on the first call into a library that is not there.
    // SAFETY: looks for a shared library by name; the driver's initialisers run if it is found.
    if !unsafe { sys::is_culib_present() } {
        let what = "no CUDA driver was found; install the NVIDIA driver, or use --device cpu".into();
        return Err(Error::Cuda { what });
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            Err(Error::Cuda { what: "the driver finds no device; check nvidia-smi, or use --device cpu".into() })
        }
        other => other.map_err(failed),
    }?;
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
    if version < 13000 {
        let what = format!(
            "the driver supports CUDA {}.{}; install driver 580 or later (CUDA 13.0), or use --device cpu",
            version / 1000,
            version % 1000 / 10
        );
        return Err(Error::Cuda { what });
    }
    Ok(())
}

fn failed(e: DriverError) -> Error {
    use sys::CUresult::*;
    let hint = match e.0 {
        CUDA_ERROR_ILLEGAL_ADDRESS | CUDA_ERROR_LAUNCH_FAILED | CUDA_ERROR_MISALIGNED_ADDRESS => {
            "a kernel failed: run again with LORA_CUDA_SYNC=1 to see which, and report it"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE => "another process holds the device exclusively",
        CUDA_ERROR_ECC_UNCORRECTABLE => "the device's memory is faulty",
        _ => "see nvidia-smi for the state of the driver",
    };
    Error::Cuda { what: format!("{e}; {hint}") }
}

fn event() -> Result<sys::CUevent> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed)
}

fn info(ordinal: i32) -> std::result::Result<GpuInfo, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    let attribute = |a: Attribute| {
        // SAFETY: `device` was just given out by the driver.
        unsafe { result::device::get_attribute(device, a) }.map(|v| v as usize)
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device)? };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        name: result::device::get_name(device)?,
        memory,
        compute_capability: (major as u32, minor as u32),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// A device through CUDA's driver.
struct Cuda {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    /// The ends of a measured time: one measurement at a time.
    events: Mutex<[sys::CUevent; 2]>,
    info: GpuInfo,
    modules: Mutex<Vec<(&'static str, Loaded)>>,
    /// While work is recorded, the host's side of its copies to the device.
    staged: Mutex<Option<Vec<Staged>>>,
}

/// Bytes of the host that a graph copies to the device each time; in memory that the device reads by itself.
struct Staged(*mut c_void);

// SAFETY: plain memory with a single owner.
unsafe impl Send for Staged {}

impl Staged {
    /// A copy of `bytes`, which are some.
    fn new(bytes: &[u8]) -> std::result::Result<Staged, DriverError> {
        // SAFETY: the memory is written before anybody reads it.
        let to = unsafe { result::malloc_host(bytes.len(), 0)? };
        // SAFETY: the fresh memory holds as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len()) };
        Ok(Staged(to))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // SAFETY: the memory came from `malloc_host`, and its graph is gone.
        let _ = unsafe { result::free_host(self.0) };
    }
}

/// A graph of CUDA's, ready to run.
pub(crate) struct CudaGraph {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    graph: sys::CUgraph,
    run: sys::CUgraphExec,
    /// Read by its copies; freed after it.
    _staged: Vec<Staged>,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for CudaGraph {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Sync for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // The staged bytes must not go while the device still runs the graph.
        // SAFETY: the stream lives as long as the device.
        let done = self.context.bind_to_thread().and_then(|()| unsafe { result::stream::synchronize(self.stream) });
        if done.is_ok() {
            // SAFETY: both were made together, and nobody uses them any more.
            let _ = unsafe { result::graph::exec_destroy(self.run).and_then(|()| result::graph::destroy(self.graph)) };
        }
    }
}

/// A loaded module; never unloaded, like the device itself.
#[derive(Clone, Copy)]
struct Loaded(sys::CUmodule);

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Makes the device's context that of the calling thread, as every call needs.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)
    }

    fn module(&self, module: &'static Module) -> Result<sys::CUmodule> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, loaded)) = modules.iter().find(|(name, _)| *name == module.name) {
            return Ok(loaded.0);
        }
        let image = module::image(module, self.info.compute_capability, &|image| {
            // SAFETY: the image is a whole cubin or PTX text with its final 0, made for this device.
            unsafe { result::module::load_data(image.as_ptr().cast()) }.map(Loaded).map_err(failed)
        })?;
        modules.push((module.name, image));
        Ok(image.0)
    }
}

impl Driver for Cuda {
    fn name(&self) -> String {
        format!("cuda:{}", self.info.ordinal)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: the memory is not used before it was written; its size is not 0 (the pool rounds up).
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes, device: self.name() },
            _ => failed(e),
        })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // An error here is one of the work before, which the next call reports as well.
        if self.bind().is_ok() {
            // SAFETY: the caller's promise; the driver waits for work that still uses the memory.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        if let Some(staged) = &mut *self.staged.lock().unwrap_or_else(PoisonError::into_inner) {
            let bytes = Staged::new(from).map_err(failed)?;
            // SAFETY: the staged bytes live as long as the graph.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.0, from.len(), self.stream) }.result().map_err(failed)?;
            staged.push(bytes);
            return Ok(());
        }
        // SAFETY: the caller's promise. Pageable memory of the host is read before the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(failed)
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise; the bytes have arrived when the stream is done.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(failed)?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(failed)
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(failed)
    }

    fn function(&self, module: &'static Module, kernel: &str) -> Result<Function> {
        self.bind()?;
        let loaded = self.module(module)?;
        let name = CString::new(kernel).expect("names of kernels have no 0 in them");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(loaded, name) }.map_err(failed)?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // What a block may have, less what the kernel declares itself.
        let shared = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function was just given out.
        unsafe {
            let own = result::function::get_function_attribute(function, shared).map_err(failed)?;
            result::function::set_function_attribute(function, attribute, self.info.shared_memory as i32 - own)
                .map_err(failed)?;
        }
        Ok(Function(function as usize))
    }

    unsafe fn launch(
        &self,
        function: Function,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut Arguments,
    ) -> Result<()> {
        self.bind()?;
        let mut params = arguments.pointers();
        let (grid, block) = ((grid[0], grid[1], grid[2]), (threads, 1, 1));
        // SAFETY: the handle came from `function`; the rest is the caller's promise.
        unsafe { result::launch_kernel(function.0 as sys::CUfunction, grid, block, shared, self.stream, &mut params) }
            .map_err(failed)
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f32>> {
        self.bind()?;
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let [start, end] = *events;
        // SAFETY: events and stream live as long as the device.
        unsafe {
            result::event::record(start, self.stream).map_err(failed)?;
            work()?;
            result::event::record(end, self.stream).map_err(failed)?;
            result::event::synchronize(end).map_err(failed)?;
            result::event::elapsed(start, end).map(Some).map_err(failed)
        }
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        // Relaxed: the pool may have to ask for memory meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed)?;
        *self.staged.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured> {
        let staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        self.bind()?;
        // SAFETY: the stream lives as long as the device; the graph was just made.
        let (graph, run) = unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(failed)?;
            let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let run = result::graph::instantiate(graph, flags).map_err(|e| {
                let _ = result::graph::destroy(graph);
                failed(e)
            })?;
            (graph, run)
        };
        let (context, stream) = (self.context.clone(), self.stream);
        Ok(Captured::Cuda(CudaGraph { context, stream, graph, run, _staged: staged }))
    }

    fn replay(&self, captured: &Captured) -> Result<()> {
        self.bind()?;
        match captured {
            // SAFETY: graph and stream are alive; the memory it uses is kept by its `Graph`.
            Captured::Cuda(graph) => unsafe { result::graph::launch(graph.run, self.stream) }.map_err(failed),
            #[cfg(feature = "emulator")]
            Captured::Emulated(_) => Err(Error::Cuda { what: "a graph of another device".into() }),
        }
    }

    fn stream(&self) -> Option<sys::CUstream> {
        Some(self.stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_an_error_and_no_panic() {
        match devices() {
            Ok(gpus) => println!("{gpus:?}"),
            Err(e) => {
                println!("skipped: no CUDA device ({e})");
                assert!(matches!(e, Error::Cuda { .. }) && e.to_string().contains("driver"), "{e}");
            }
        }
    }

    #[test]
    fn a_panic_of_the_bindings_is_an_error() {
        let e = guard::<()>(|| panic!("no library\nmore text")).unwrap_err();
        assert!(e.to_string().contains("no library; reinstall"), "{e}");
    }
}
