//! Builds the kernels' sources for the host, with the emulation of CUDA in `emulator/emulator.h` (what it does and what
//! it finds is written there), loads them and launches them.

#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsString, c_char, c_int, c_uint, c_void},
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio, id},
    ptr,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{Error, Result, hash::fnv1a};

const HEADER: &str = include_str!("emulator/emulator.h");

/// How the header and a module are compiled. Pointers are cast between types as CUDA allows; the checks of `-fsanitize`
/// call functions of the header; everything is hidden but its four exported functions, so that modules loaded together
/// share nothing.
const COMPILE: &[&str] = &[
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-w",
    "-DLORA_EMU",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-asynchronous-unwind-tables",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-U_FORTIFY_SOURCE",
];
/// Without the startup files, whose variables would lie among the kernels' shared ones.
const LINK: &[&str] = &["-shared", "-nostartfiles", "-Wl,-z,defs", "-lm"];

/// Whether kernels can be built on this machine.
///
/// # Errors
/// What is missing and how to get it.
#[cfg(test)]
pub(crate) fn available() -> std::result::Result<(), String> {
    VERSION.as_ref().map(drop).map_err(Clone::clone)
}

/// The C++ compiler: that of the environment variable `CXX`, else g++.
fn compiler() -> OsString {
    std::env::var_os("CXX").filter(|c| !c.is_empty()).unwrap_or_else(|| "g++".into())
}

/// What the compiler says about itself.
static VERSION: LazyLock<std::result::Result<String, String>> = LazyLock::new(|| {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err("the emulation of CUDA runs on x86-64 Linux only".into());
    }
    let name = compiler();
    let failed = |what: String| format!("the C++ compiler {name:?} {what}; install g++, or set CXX to its path");
    match Command::new(&name).arg("--version").stdin(Stdio::null()).output() {
        Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Err(failed(format!("ends with {}", out.status))),
        Err(e) => Err(failed(format!("cannot be run ({e})"))),
    }
});

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held during a launch: the emulation's state and the signal handlers belong to the process.
static LAUNCHING: Mutex<()> = Mutex::new(());

/// The size of every living buffer, by its address, to say which one a faulting access was near.
static BUFFERS: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_uint,
    *mut *mut c_void,
    c_uint,
    *mut c_char,
    usize,
    *mut *const c_void,
) -> c_int;
type Parameters = unsafe extern "C" fn(*const c_char, *mut *const u8) -> c_int;
type Alloc = unsafe extern "C" fn(usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, usize) -> c_int;

/// A module of kernels, built for the host.
pub(crate) struct Library {
    launch: Launch,
    parameters: Parameters,
    alloc: Alloc,
    free: Free,
    /// Keeps the functions loaded.
    _library: libloading::Library,
}

impl Library {
    /// Builds a module from its text (common.cuh and the `.cu` file), or finds it in the cache, and loads it. The cache is
    /// a folder of the user's in the temporary directory, or `CARGO_TARGET_TMPDIR` where that is set.
    ///
    /// # Errors
    /// [`Error::Cuda`] when there is no compiler, the text does not compile (with the compiler's messages), or the cache
    /// cannot be written.
    pub(crate) fn build(module: &str, source: &str) -> Result<Library> {
        let error = |what: String| Error::Cuda { what: format!("module {module}, for the host: {what}") };
        let version = VERSION.as_ref().map_err(|e| error(e.clone()))?;
        let folder = cache_folder().map_err(error)?;
        let text = format!("#line 1 \"emulator.h\"\n{HEADER}\n#line 1 \"{module}.cu\"\n{source}\n");
        let key =
            [compiler().to_string_lossy().as_ref(), version, &COMPILE.join(" "), &LINK.join(" "), &text].join("\0");
        let path = folder.join(format!("{module}-{:016x}.so", fnv1a(key.bytes())));

        // One build of it at a time in this process; between processes the last rename wins.
        static BUILDING: LazyLock<Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>> = LazyLock::new(Mutex::default);
        let turn = lock(&BUILDING).entry(path.clone()).or_default().clone();
        let _turn = lock(&turn);
        if !path.exists() {
            compile(&text, &path).map_err(error)?;
        }
        load(&path).map_err(|e| error(format!("{} cannot be loaded: {e}; delete it", path.display())))
    }

    /// The sizes in bytes of a kernel's parameters; `None` for an unknown kernel.
    pub(crate) fn parameters(&self, kernel: &str) -> Option<Vec<usize>> {
        let name = CString::new(kernel).ok()?;
        let mut sizes = ptr::null();
        // SAFETY: the name ends with a zero, and `sizes` is written only on success.
        let count = usize::try_from(unsafe { (self.parameters)(name.as_ptr(), &mut sizes) }).ok()?;
        // SAFETY: the module's table has that many sizes, and lives as long as the library.
        Some((0..count).map(|i| usize::from(unsafe { *sizes.add(i) })).collect())
    }

    /// Runs a kernel in the order of threads that `seed` stands for. One launch runs at a time in the process.
    ///
    /// # Errors
    /// What the emulation found (see `emulator.h`), with the block and the thread; also an unknown kernel, another number
    /// of parameters than it has, and sizes that CUDA would refuse.
    ///
    /// # Safety
    /// Each parameter points to a value of the size and type that the kernel has in its place. The kernel's accesses need
    /// not be in bounds: those near buffers of [`Library::alloc`] are caught, but no others are safe.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        params: &mut [*mut c_void],
        seed: u32,
    ) -> std::result::Result<(), String> {
        let sizes = self.parameters(kernel).ok_or_else(|| format!("no kernel {kernel}"))?;
        if sizes.len() != params.len() {
            return Err(format!("{kernel} has {} parameters, not {}", sizes.len(), params.len()));
        }
        let name = CString::new(kernel).map_err(|e| e.to_string())?;
        let mut text = [0u8; 1024];
        let mut fault = ptr::null();
        let _launching = lock(&LAUNCHING);
        // SAFETY: the pointers are to arrays of the lengths that the function expects, it ends the text with a zero, and
        // the mutex makes it the only one running; for the parameters there is the caller's promise.
        let failed = unsafe {
            (self.launch)(
                name.as_ptr(),
                grid.as_ptr(),
                threads,
                shared,
                params.as_mut_ptr(),
                seed,
                text.as_mut_ptr().cast(),
                text.len(),
                &mut fault,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        let text = String::from_utf8_lossy(&text[..end]);
        Err(if fault.is_null() { text.into_owned() } else { format!("{text}; {}", nearest(fault as usize)) })
    }

    /// Memory that is poisoned with bytes 0xFF and ends, like it begins, as near to an inaccessible page as a multiple of
    /// 16 bytes can; null when there is none.
    pub(crate) fn alloc(&self, bytes: usize) -> *mut c_void {
        // SAFETY: may be called at any time.
        let p = unsafe { (self.alloc)(bytes) };
        if !p.is_null() {
            lock(&BUFFERS).insert(p as usize, bytes);
        }
        p
    }

    /// Gives memory back.
    ///
    /// # Errors
    /// Something wrote outside it, too near to fault.
    ///
    /// # Safety
    /// It came from [`Library::alloc`], of any module, with the same size, and nobody uses it any more.
    pub(crate) unsafe fn free(&self, p: *mut c_void, bytes: usize) -> std::result::Result<(), String> {
        lock(&BUFFERS).remove(&(p as usize));
        // SAFETY: the caller's promise.
        match unsafe { (self.free)(p, bytes) } {
            0 => Ok(()),
            _ => Err(format!("out-of-bounds write: something wrote just before or after a buffer of {bytes} bytes")),
        }
    }
}

/// Where an address lies relative to the buffer nearest to it.
fn nearest(at: usize) -> String {
    let buffers = lock(&BUFFERS);
    let before = buffers.range(..=at).next_back().map(|(p, n)| (at - (p + n), "past the end", n));
    let after = buffers.range(at..).next().map(|(p, n)| (p - at, "before the start", n));
    match [before, after].into_iter().flatten().min() {
        Some((far, side, bytes)) if far < 1 << 20 => format!("{far} bytes {side} of a buffer of {bytes} bytes"),
        _ => "no buffer is near".into(),
    }
}

/// The folder of built modules. Only this user can have written to it, for its contents are executed.
fn cache_folder() -> std::result::Result<PathBuf, String> {
    if let Some(folder) = std::env::var_os("CARGO_TARGET_TMPDIR").filter(|f| !f.is_empty()) {
        return Ok(folder.into());
    }
    let user = fs::metadata("/proc/self").map_err(|e| format!("/proc/self: {e}"))?.uid();
    let folder = std::env::temp_dir().join(format!("lora-kernels-emulator-{user}"));
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(format!("{}: {e}", folder.display())),
        _ => {}
    }
    let found = fs::symlink_metadata(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o022 != 0 {
        return Err(format!("{} is not a folder that only this user can write to; remove it", folder.display()));
    }
    Ok(folder)
}

/// Compiles a text to a shared object, which appears whole or not at all.
fn compile(text: &str, path: &Path) -> std::result::Result<(), String> {
    static BUILDS: AtomicUsize = AtomicUsize::new(0);
    let build = format!("{}-{}", id(), BUILDS.fetch_add(1, Ordering::Relaxed));
    let [object, library] = ["o", "tmp"].map(|kind| path.with_extension(format!("{build}.{kind}")));
    let built = (|| {
        // The kernels' names stand in the preprocessed text, where macros that define several are expanded.
        let scan = ["-std=c++17", "-E", "-P", "-w", "-DLORA_EMU", "-DLORA_EMU_SCAN", "-x", "c++", "-"];
        let preprocessed = run(Command::new(compiler()).args(scan), text)?;
        let text = format!("{text}\n{}", table(&preprocessed));
        run(Command::new(compiler()).args(COMPILE).args(["-x", "c++", "-c", "-", "-o"]).arg(&object), &text)?;
        run(Command::new(compiler()).arg(&object).args(LINK).arg("-o").arg(&library), "")?;
        fs::rename(&library, path).map_err(|e| format!("{}: {e}", path.display()))
    })();
    for file in [object, library] {
        // Not there unless something failed.
        let _ = fs::remove_file(file);
    }
    built
}

/// Runs a command on an input; its output, or its messages.
fn run(command: &mut Command, input: &str) -> std::result::Result<String, String> {
    let failed = |e: io::Error| format!("the C++ compiler: {e}");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let out = std::thread::scope(|s| {
        // A compiler that stops reading says why by its exit status.
        s.spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        child.wait_with_output()
    })
    .map_err(failed)?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let messages = String::from_utf8_lossy(&out.stderr);
    let first: Vec<&str> = messages.lines().take(40).collect();
    Err(format!("the C++ compiler ends with {}:\n{}", out.status, first.join("\n")))
}

/// The table of a module's kernels, from its preprocessed text: `LORA_EMU_BOUNDS(threads) name(`.
fn table(preprocessed: &str) -> String {
    let mut lines = vec!["EMU_KERNELS_BEGIN".to_owned()];
    for part in preprocessed.split("LORA_EMU_BOUNDS").skip(1) {
        let mut depth = 0;
        let end = part.find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0 && c == ')'
        });
        let Some((bounds, rest)) = end.map(|end| part.split_at(end + 1)) else { continue };
        if let Some((name, _)) = rest.split_once('(') {
            lines.push(format!("EMU_KERNEL({}, {})", name.trim(), bounds.trim()));
        }
    }
    lines.push("EMU_KERNELS_END\n".to_owned());
    lines.join("\n")
}

fn load(path: &Path) -> std::result::Result<Library, libloading::Error> {
    // SAFETY: the header and the kernels have no initialisers that run, and the types are those of the header.
    unsafe {
        let library = libloading::Library::new(path)?;
        Ok(Library {
            launch: *library.get(b"emu_launch\0")?,
            parameters: *library.get(b"emu_parameters\0")?,
            alloc: *library.get(b"emu_alloc\0")?,
            free: *library.get(b"emu_free\0")?,
            _library: library,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::testing::missing;

    const COMMON: &str = include_str!("common.cuh");

    /// Reverses the rows of a matrix of 256 columns through shared memory. MISTAKES hold a place each.
    const REVERSE: &str = r#"
template <class T> DEVICE void reverse(T* y, const T* x, int rows) {
  __shared__ T row[256];
  int t = threadIdx.x;
  for (int r = 0; r < rows; r++) {
    row[t] = x[r * 256 + t];
    __syncthreads();  // full
    y[r * 256 + t] = row[255 - t];
    __syncthreads();  // empty
  }
}
#define REVERSE(T, suffix) KERNEL(32 * 8) reverse_##suffix(T* y, const T* x, int rows) { reverse(y, x, rows); }
FOR_FLOATS(REVERSE)

// The same with two rows under way.
KERNEL(64) reverse_async(float* y, const float* x, int rows) {
  DYNAMIC_SHARED(memory);
  float4* ring = (float4*)memory;
  int t = threadIdx.x;
  auto load = [&](int r) {
    if (r < rows) cp_async_16(ring + r % 2 * 64 + t, x + r * 256 + 4 * t, 16);
    cp_async_commit();
  };
  load(0);
  for (int r = 0; r < rows; r++) {
    load(r + 1);
    cp_async_wait<1>();
    __syncthreads();
    float4 v = ring[r % 2 * 64 + 63 - t];
    ((float4*)y)[r * 64 + t] = make_float4(v.w, v.z, v.y, v.x);
    __syncthreads();  // ring
  }
}

KERNEL(256) sum(float* y, const float* x, int n) {
  DYNAMIC_SHARED(scratch);
  float s = 0.f;
  for (int i = threadIdx.x; i < n; i += 256) s += x[i];
  s = block_sum<256>(s, (float*)scratch);
  if (threadIdx.x == 0) *y = s;
}

KERNEL(96) wrong(float* y, const float* x, int n, int which) {
  __shared__ float small[8];
  DYNAMIC_SHARED(dynamic);
  int t = threadIdx.x;
  switch (which) {
    case 0: if (t < n) __syncthreads(); break;
    case 1:
      if (t < n) __syncthreads();
      else
        __syncthreads();
      break;
    case 2: if (t < n) y[0] = shfl_xor(1.f, 1); break;
    case 3: if (t % 2) warp_sync(); else y[0] = shfl_xor(1.f, 1); break;
    case 4: y[n] = 1.f; break;
    case 5: y[0] = x[n]; break;
    case 6: y[0] = (x - n)[0]; break;
    case 7: y[0] = ((const float4*)(x + 1))->x; break;
    case 8: small[n] = 1.f; y[0] = small[t % 8]; break;
    case 9: dynamic[n] = 1; break;
    case 10: y[0] = (float)(1000 / (n - n)); break;
    case 11: y[0] = (float)(1 << n); break;
    case 12: cp_async_16(dynamic + 4, x, 16); break;
    case 13: cp_async_16(y, x, 16); break;
    case 14: *(float*)((u64)n << 60) = 1.f; break;
    case 15: y[-1] = 1.f; break;
    case 16: u32 r[4]; ldmatrix_x4(r, x); break;
  }
}
"#;

    /// A buffer of the emulation.
    struct Floats<'a> {
        library: &'a Library,
        at: *mut f32,
        len: usize,
    }

    impl<'a> Floats<'a> {
        fn new(library: &'a Library, values: &[f32]) -> Self {
            let at = library.alloc(4 * values.len()).cast::<f32>();
            assert!(!at.is_null());
            // SAFETY: new memory of that size.
            unsafe { at.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
            Floats { library, at, len: values.len() }
        }

        fn get(&self) -> &[f32] {
            // SAFETY: initialised, and no launch runs.
            unsafe { std::slice::from_raw_parts(self.at, self.len) }
        }

        fn free(self) -> std::result::Result<(), String> {
            // SAFETY: from `alloc`, and not used again.
            unsafe { self.library.free(self.at.cast(), 4 * self.len) }
        }
    }

    /// Launches a kernel on two buffers and some integers, in one block.
    fn launch(
        kernel: &str,
        [threads, shared]: [u32; 2],
        y: &Floats<'_>,
        x: &Floats<'_>,
        ints: &[i32],
        seed: u32,
    ) -> std::result::Result<(), String> {
        let (mut pointers, mut ints) = ([y.at, x.at], ints.to_vec());
        let mut params: Vec<*mut c_void> = pointers.iter_mut().map(|p| ptr::from_mut(p).cast()).collect();
        params.extend(ints.iter_mut().map(|i| ptr::from_mut(i).cast::<c_void>()));
        // SAFETY: two pointers and integers, as all the kernels here have; their wrong accesses are near the buffers.
        unsafe { y.library.launch(kernel, [1, 1, 1], threads, shared, &mut params, seed) }
    }

    /// The module of the tests, with a mistake.
    fn build(mistake: Option<(&str, &str)>) -> Option<Library> {
        if let Err(e) = available() {
            missing(&e);
            return None;
        }
        let mut text = format!("{COMMON}\n#line 1 \"selftest.cu\"\n{REVERSE}");
        if let Some((from, to)) = mistake {
            assert!(text.contains(from), "{from}");
            text = text.replacen(from, to, 1);
        }
        Some(Library::build("selftest", &text).unwrap())
    }

    /// Under how many of eight seeds both ways of reversing rows give the right result.
    fn right(library: &Library) -> usize {
        let rows = 3;
        let values: Vec<f32> = (0..256 * rows).map(|i| i as f32).collect();
        let expected: Vec<f32> = values.chunks(256).flat_map(|row| row.iter().rev().copied()).collect();
        let right = |seed: &u32| {
            [("reverse_f32", [256, 0]), ("reverse_async", [64, 2048])].iter().all(|&(kernel, size)| {
                let [x, y] = [values.clone(), vec![f32::NAN; 256 * rows]].map(|v| Floats::new(library, &v));
                launch(kernel, size, &y, &x, &[rows as i32], *seed).unwrap();
                let equal = y.get() == expected;
                x.free().unwrap();
                y.free().unwrap();
                equal
            })
        };
        (0..8).filter(right).count()
    }

    #[test]
    fn right_kernels_give_the_right_result_under_every_schedule() {
        let Some(library) = build(None) else { return };
        assert_eq!(right(&library), 8);
        let [x, y] = [vec![1.0; 1000], vec![0.0]].map(|v| Floats::new(&library, &v));
        launch("sum", [256, 32], &y, &x, &[1000], 3).unwrap();
        assert_eq!(y.get(), [1000.0]);
        let sizes: Vec<_> = ["reverse_bf16", "wrong"].iter().map(|k| library.parameters(k)).collect();
        assert_eq!(sizes, [Some(vec![8, 8, 4]), Some(vec![8, 8, 4, 4])]);
    }

    #[test]
    fn a_missing_barrier_gives_wrong_values_under_some_schedule() {
        for mistake in [
            ("__syncthreads();  // full", ""),
            ("__syncthreads();  // empty", ""),
            ("__syncthreads();  // ring", ""),
            ("cp_async_wait<1>();", ""),
            ("cp_async_wait<1>()", "cp_async_wait<2>()"),
            ("cp_async_wait<1>();\n    __syncthreads();", "cp_async_wait<1>();"),
        ] {
            let Some(library) = build(Some(mistake)) else { return };
            let right = right(&library);
            assert!(right < 8, "{mistake:?} stays unseen");
        }
    }

    #[test]
    fn errors_are_found_and_described() {
        let Some(library) = build(None) else { return };
        let [x, y] = [[0.0; 10], [0.0; 10]].map(|v| Floats::new(&library, &v));
        let cases: &[(i32, i32, &[&str])] = &[
            (0, 50, &["selftest.cu:", "only part of the block", "has ended"]),
            (0, 32, &["only part of the block"]),
            (1, 50, &["different barriers", "selftest.cu:"]),
            (2, 50, &["__shfl_xor_sync", "only part of a warp", "has ended"]),
            (3, 0, &["different collectives", "__syncwarp"]),
            (4, 12, &["out-of-bounds access: write", "8 bytes past the end of a buffer of 40 bytes", "thread"]),
            (5, 12, &["out-of-bounds access: read", "8 bytes past the end of a buffer of 40 bytes"]),
            (6, 1100, &["out-of-bounds access: read", "4400 bytes before the start of a buffer of 40 bytes"]),
            (7, 0, &["misaligned", "float4", "selftest.cu:"]),
            (8, 8, &["out-of-bounds access: index 8", "selftest.cu:"]),
            (9, 48, &["out-of-bounds access: write", "8 bytes past the end of 40 bytes of dynamic shared memory"]),
            (9, 41, &["beside the dynamic shared memory"]),
            (10, 1, &["division by zero", "selftest.cu:"]),
            (11, 32, &["shift"]),
            (12, 0, &["cp.async", "multiple of 16"]),
            (13, 0, &["cp.async", "not in shared memory"]),
            (14, 1, &["out-of-bounds access", "block (0, 0, 0)"]),
            (16, 0, &["ldmatrix", "not in shared memory"]),
        ];
        for seed in 0..4 {
            for &(which, n, parts) in cases {
                let e = launch("wrong", [96, 40], &y, &x, &[n, which], seed).unwrap_err();
                for part in parts {
                    assert!(e.contains(part), "case {which}, {n}: {part:?} is not in {e:?}");
                }
            }
            // An error leaves nothing behind.
            launch("wrong", [96, 40], &y, &x, &[0, 4], seed).unwrap();
        }
        x.free().unwrap();
        y.free().unwrap();
    }

    #[test]
    fn writes_too_near_to_a_buffer_to_fault_are_found_when_it_is_freed() {
        let Some(library) = build(None) else { return };
        // The element after ten lies within the multiple of 16 bytes, as does the one before in the same page.
        for (which, n) in [(4, 10), (15, 0)] {
            let [x, y] = [[0.0; 10], [0.0; 10]].map(|v| Floats::new(&library, &v));
            launch("wrong", [96, 0], &y, &x, &[n, which], 0).unwrap();
            x.free().unwrap();
            assert!(y.free().unwrap_err().contains("40 bytes"));
        }
    }

    #[test]
    fn impossible_launches_are_errors() {
        let Some(library) = build(None) else { return };
        let [x, y] = [[0.0; 256], [0.0; 256]].map(|v| Floats::new(&library, &v));
        for (kernel, size, ints, part) in [
            ("unknown", [32, 0], &[0, 0][..], "no kernel unknown"),
            ("wrong", [32, 0], &[0], "4 parameters, not 3"),
            ("wrong", [0, 0], &[0, 99], "0 threads"),
            ("wrong", [128, 0], &[0, 99], "bounded to 96"),
            ("wrong", [96, 300 << 10], &[0, 99], "shared memory"),
        ] {
            let e = launch(kernel, size, &y, &x, ints, 0).unwrap_err();
            assert!(e.contains(part), "{part:?} is not in {e:?}");
        }
        let e = Library::build("selftest", "KERNEL_(x) oops(").err().unwrap().to_string();
        assert!(e.contains("selftest.cu:1"), "{e}");
    }

    /// The 16-bit types, against the crate `half`; every half exactly, floats around every half.
    #[test]
    fn conversions_round_to_nearest_even() {
        if let Err(e) = available() {
            return missing(&e);
        }
        let text = format!(
            "{COMMON}
KERNEL(1) convert(float* y, const float* x, int n) {{
  for (int i = 0; i < n; i++) {{
    y[4 * i] = to_f32(from_f32<f16>(x[i]));
    y[4 * i + 1] = to_f32(from_f32<bf16>(x[i]));
    u32 packed = pack(x[i], 1.f, f16{{}});
    y[4 * i + 2] = half_to_float((u16)packed);
    y[4 * i + 3] = half_to_float((u16)(packed >> 16));
  }}
}}"
        );
        let library = Library::build("conversions", &text).unwrap();
        let mut values = vec![0.0, -0.0, 65519.9, 65520.0, -1e30, f32::INFINITY, 1e-8, 2.9e-8, 3.1e-8, f32::MAX];
        for bits in 0..=u16::MAX {
            let v = half::f16::from_bits(bits).to_f32();
            let near = [v, v * (1.0 + 1.0 / 2048.0), v * (1.0 - 1.0 / 4096.0), v * 1.0002, v * 1.0e-3];
            values.extend(near.into_iter().filter(|v| !v.is_nan()));
        }
        let x = Floats::new(&library, &values);
        let y = Floats::new(&library, &vec![0.0; 4 * values.len()]);
        launch("convert", [1, 0], &y, &x, &[values.len() as i32], 0).unwrap();
        for (v, y) in values.iter().zip(y.get().chunks(4)) {
            let (f, b) = (half::f16::from_f32(*v).to_f32(), half::bf16::from_f32(*v).to_f32());
            assert_eq!([f, b, f, 1.0].map(f32::to_bits), [y[0], y[1], y[2], y[3]].map(f32::to_bits), "{v}");
        }
    }
}
