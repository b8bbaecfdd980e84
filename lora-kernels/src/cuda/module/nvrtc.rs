#![allow(unsafe_code)]

use std::{ffi::CString, fmt::Write as _, sync::OnceLock};

use cudarc::nvrtc::{result as nvrtc, sys};

use super::Module;
use crate::{Error, Result, cuda::driver::guard};

/// How every module is compiled. `-v` has the assembler report registers and spills; it changes no code.
pub(super) const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "--ptxas-options=-v"];

/// What turns a module's source into an image for an architecture.
pub(super) struct Compiler<'a> {
    /// Its version, such as (13, 0).
    pub(super) version: (i32, i32),
    /// The architectures that it knows, such as 80.
    pub(super) archs: Vec<u32>,
    /// Compiles a module for `sm_80` or the like to a cubin, for `compute_80` to PTX with a final 0.
    pub(super) compile: &'a dyn Fn(&Module, &str) -> Result<Vec<u8>>,
}

/// NVRTC.
///
/// # Errors
/// [`Error::Cuda`] when the library is not there, or `LORA_NVRTC=off` forbids it.
pub(super) fn compiler() -> Result<Compiler<'static>> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        // SAFETY: looks for a shared library by name.
        std::env::var_os("LORA_NVRTC").is_none_or(|v| v != "off") && unsafe { sys::is_culib_present() }
    });
    if !found {
        return Err(not_found());
    }
    let failed = |e: nvrtc::NvrtcError| Error::Cuda { what: format!("NVRTC: {e}") };
    guard(|| {
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: each call writes the numbers it is given room for.
        let archs = unsafe {
            sys::nvrtcVersion(&mut major, &mut minor).result().map_err(failed)?;
            sys::nvrtcGetNumSupportedArchs(&mut count).result().map_err(failed)?;
            let mut archs = vec![0; count as usize];
            sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()).result().map_err(failed)?;
            archs
        };
        let archs = archs.into_iter().map(|a| a as u32).collect();
        Ok(Compiler { version: (major, minor), archs, compile: &|module, arch| Ok(compile(module, arch)?.image()) })
    })
}

pub(super) fn not_found() -> Error {
    let what = "libnvrtc was not found, or LORA_NVRTC=off; install the CUDA toolkit 13, or the Python package \
                nvidia-cuda-nvrtc and name the folder of its libraries in LD_LIBRARY_PATH";
    Error::Cuda { what: what.into() }
}

/// What NVRTC made of a module.
pub(super) struct Compiled {
    /// Machine code; empty for an architecture of PTX.
    pub(super) cubin: Vec<u8>,
    /// PTX, with a final 0.
    pub(super) ptx: Vec<u8>,
    /// Registers, spills and warnings, as the assembler reports them.
    #[cfg_attr(not(test), allow(dead_code))] // read by the compile gate
    pub(super) log: String,
}

impl Compiled {
    fn image(self) -> Vec<u8> {
        if self.cubin.is_empty() { self.ptx } else { self.cubin }
    }
}

/// A program of NVRTC.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is used no more. That it cannot be freed harms nobody.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Compiles a module for `arch`: machine code for `sm_80` or the like, only PTX for `compute_80`.
///
/// # Errors
/// [`Error::Cuda`] with the compiler's messages when NVRTC refuses the source.
pub(super) fn compile(module: &Module, arch: &str) -> Result<Compiled> {
    let failed = |e: nvrtc::NvrtcError| Error::Cuda { what: format!("NVRTC, module {}: {e}", module.name) };
    guard(|| {
        let source = CString::new(module.text()).expect("sources have no 0 in them");
        let name = CString::new(format!("{}.cu", module.name)).expect("names have no 0 in them");
        let program = Program(nvrtc::create_program(&source, Some(&name)).map_err(failed)?);
        let mut options = vec![format!("--gpu-architecture={arch}")];
        options.extend(OPTIONS.map(String::from));
        // SAFETY: the program lives until the end of this function.
        let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.map_err(failed)?;
        let log = log.iter().map(|&c| c as u8 as char).collect::<String>().trim_end_matches('\0').to_owned();
        if let Err(e) = compiled {
            let mut what = format!("NVRTC cannot compile module {} for {arch}: {e}", module.name);
            for line in log.lines().filter(|l| l.contains("error")).take(5) {
                let _ = write!(what, "\n{line}");
            }
            return Err(Error::Cuda { what });
        }
        // SAFETY: the program is compiled; each buffer has the size that was asked for.
        unsafe {
            let mut size = 0;
            sys::nvrtcGetPTXSize(program.0, &mut size).result().map_err(failed)?;
            let mut ptx = vec![0u8; size];
            sys::nvrtcGetPTX(program.0, ptx.as_mut_ptr().cast()).result().map_err(failed)?;
            let mut cubin = Vec::new();
            if arch.starts_with("sm_") {
                sys::nvrtcGetCUBINSize(program.0, &mut size).result().map_err(failed)?;
                cubin.resize(size, 0);
                sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).result().map_err(failed)?;
            }
            Ok(Compiled { cubin, ptx, log })
        }
    })
}
