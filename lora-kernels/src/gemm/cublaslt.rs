//! Products through cuBLASLt, where it is installed: a second engine, and what ours is measured against.
//!
//! cuBLASLt thinks in columns: a row-major [m, n] matrix is its [n, m] matrix. So it is asked for `Cᵀ = Bᵀ·Aᵀ`, with our B
//! as its first operand and our A as its second.

#![allow(unsafe_code)]

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    mem::MaybeUninit,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys,
    },
    driver::CudaContext,
};

use super::{cuda::Problem, plan::Shape};
use crate::{
    Activation, Buffer, DType, Device, Error, Result,
    cuda::{Gpu, guard},
};

/// Algorithms that are asked for per shape.
const PROPOSALS: usize = 8;
/// Bytes of scratch memory that an algorithm may use: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Shapes that are remembered; beyond, all are forgotten and asked for again.
const REMEMBERED: usize = 1024;

/// The library cannot be found.
pub(super) fn missing() -> Error {
    let what = "libcublasLt was not found, and LORA_GEMM=cublaslt asks for it; install the CUDA toolkit 13 or the \
                package nvidia-cublas, or set LORA_GEMM=own";
    Error::Cuda { what: what.into() }
}

/// How many algorithms there are for a product on a device: 0 when the library cannot compute it, `None` when there is no
/// library (or the device is emulated).
///
/// # Errors
/// [`Error::Cuda`] when the library fails.
pub(super) fn proposals(gpu: &Gpu, shape: &Shape) -> Result<Option<usize>> {
    if gpu.driver().stream().is_none() || !present() {
        return Ok(None);
    }
    let Some(form) = Form::new(shape) else { return Ok(Some(0)) };
    let _turn = gpu.turn();
    guard(|| {
        let mut all = libraries();
        let library = Library::of(&mut all, gpu)?;
        Ok(Some(library.known(shape, &form)?.algorithms.len()))
    })
}

/// Puts a product into the device's stream, computed by the algorithm of that rank.
///
/// # Errors
/// [`Error::Cuda`] when the library fails or refuses.
///
/// # Panics
/// When there are not that many [`proposals`].
///
/// # Safety
/// The shape is that of the product, whose matrices lie on this device.
pub(super) unsafe fn run(gpu: &Arc<Gpu>, shape: &Shape, rank: usize, p: &Problem) -> Result<()> {
    let form = Form::new(shape).expect("a product that cuBLASLt has proposals for");
    let stream = gpu.driver().stream().expect("a device that cuBLASLt knows");
    // Before the lock of the libraries, which a recording may want.
    let _turn = gpu.turn();
    guard(|| {
        let mut all = libraries();
        let library = Library::of(&mut all, gpu)?;
        let workspace = library.workspace(gpu)?;
        let handle = library.handle;
        library.context.bind_to_thread().map_err(|e| Error::Cuda { what: format!("cuBLASLt: {e}") })?;
        let known = library.known(shape, &form)?;
        let algorithm = known.algorithms[rank];
        if let Some(bias) = p.epilogue.bias.map(|x| x.address()) {
            use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            // SAFETY: the attribute is an address.
            unsafe { set_desc(known.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias) }?;
        }
        // A residual enters as the C of `D = α·A·B + 1·C`.
        let c = p.c.as_mat().address();
        let alpha = p.alpha as f32;
        let (added, beta) = p.epilogue.residual.map_or((c, p.beta as f32), |x| (x.address(), 1.0));
        // SAFETY: descriptor and layouts are alive and were made for this shape, whose matrices the caller vouches for;
        // the workspace is of the promised size, and used in the order of one stream.
        unsafe {
            result::matmul(
                handle,
                known.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                p.b.address() as *const c_void,
                known.layouts[0],
                p.a.address() as *const c_void,
                known.layouts[1],
                added as *const c_void,
                known.layouts[2],
                c as *mut c_void,
                known.layouts[3],
                &algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed)
    })
}

fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: looks for a shared library by name.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

fn failed(e: CublasError) -> Error {
    Error::Cuda { what: format!("cuBLASLt: {e}; set LORA_GEMM=own to do without it") }
}

/// A matrix as the library sees it: stored by columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stored {
    rows: usize,
    cols: usize,
    ld: usize,
    /// Elements from one matrix of a batch to the next.
    step: usize,
}

/// A product in the library's terms: `D = op(first)·op(second)` with n rows and m columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Form {
    /// Our B, our A, what is added (C or the residual), and C.
    stored: [Stored; 4],
    /// Whether our B and our A are transposed on the way.
    transposed: [bool; 2],
    types: [sys::cudaDataType; 4],
    compute: sys::cublasComputeType_t,
    epilogue: sys::cublasLtEpilogue_t,
    bias: Option<sys::cudaDataType>,
}

impl Form {
    /// `None` when the library has no such product: it adds β·C before the activation and knows neither a residual
    /// together with either of them, nor other activations than GELU (by tanh) and ReLU.
    fn new(s: &Shape) -> Option<Form> {
        use sys::{cublasComputeType_t::*, cublasLtEpilogue_t::*};
        if s.m == 0 || s.n == 0 || s.k == 0 || s.residual() && (s.beta || s.activation.is_some() || s.count > 1) {
            return None;
        }
        let (ab, c) = (data_type(s.dtype)?, data_type(s.out)?);
        if s.out != s.dtype && s.out != DType::F32 {
            return None;
        }
        let epilogue = match (s.activation, s.bias.is_some()) {
            (None, false) => CUBLASLT_EPILOGUE_DEFAULT,
            (None, true) => CUBLASLT_EPILOGUE_BIAS,
            (Some(Activation::GeluTanh), false) => CUBLASLT_EPILOGUE_GELU,
            (Some(Activation::GeluTanh), true) => CUBLASLT_EPILOGUE_GELU_BIAS,
            (Some(Activation::Relu), false) => CUBLASLT_EPILOGUE_RELU,
            (Some(Activation::Relu), true) => CUBLASLT_EPILOGUE_RELU_BIAS,
            _ => return None,
        };
        // A row-major [rows, cols] matrix is a column-major [cols, rows] one. Stored as [k, n], our B is thus the wanted
        // [n, k] matrix Bᵀ; stored as [n, k], it is [k, n] and to be transposed. The same holds for A, [k, m].
        let b = if s.tb { (s.k, s.n) } else { (s.n, s.k) };
        let a = if s.ta { (s.m, s.k) } else { (s.k, s.m) };
        let stored = |(rows, cols): (usize, usize), ld, step| Stored { rows, cols, ld, step };
        let c_stored = stored((s.n, s.m), s.ld[2], s.step[2]);
        let added = if s.residual() { stored((s.n, s.m), s.ld[3], 0) } else { c_stored };
        let bias = match s.bias {
            Some(dtype) => Some(data_type(dtype)?),
            None => None,
        };
        Some(Form {
            stored: [stored(b, s.ld[1], s.step[1]), stored(a, s.ld[0], s.step[0]), added, c_stored],
            transposed: [s.tb, s.ta],
            types: [ab, ab, c, c],
            compute: if s.tf32 && s.dtype == DType::F32 { CUBLAS_COMPUTE_32F_FAST_TF32 } else { CUBLAS_COMPUTE_32F },
            epilogue,
            bias,
        })
    }
}

fn data_type(dtype: DType) -> Option<sys::cudaDataType> {
    use sys::cudaDataType_t::*;
    match dtype {
        DType::F32 => Some(CUDA_R_32F),
        DType::Bf16 => Some(CUDA_R_16BF),
        DType::F16 => Some(CUDA_R_16F),
        _ => None,
    }
}

/// The library on one device.
struct Library {
    handle: sys::cublasLtHandle_t,
    /// The library works in the context that is current for the calling thread.
    context: Arc<CudaContext>,
    workspace: Option<Buffer>,
    known: HashMap<Shape, Known>,
}

// SAFETY: handles of the library, which are used by one thread at a time: they lie behind a mutex.
unsafe impl Send for Library {}

/// By the number of the device. They live as long as the process, like the devices.
fn libraries() -> MutexGuard<'static, HashMap<usize, Library>> {
    static LIBRARIES: OnceLock<Mutex<HashMap<usize, Library>>> = OnceLock::new();
    LIBRARIES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Library {
    fn of<'a>(all: &'a mut HashMap<usize, Library>, gpu: &Gpu) -> Result<&'a mut Library> {
        let ordinal = gpu.info().ordinal;
        Ok(match all.entry(ordinal) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let failed_context = |e| Error::Cuda { what: format!("cuBLASLt: {e}") };
                let context = CudaContext::new(ordinal).map_err(failed_context)?;
                context.bind_to_thread().map_err(failed_context)?;
                let handle = result::create_handle().map_err(failed)?;
                place.insert(Library { handle, context, workspace: None, known: HashMap::new() })
            }
        })
    }

    fn workspace(&mut self, gpu: &Arc<Gpu>) -> Result<u64> {
        if self.workspace.is_none() {
            self.workspace = Some(Buffer::empty(&Device::Cuda(gpu.clone()), DType::F32, WORKSPACE / 4)?);
        }
        Ok(self.workspace.as_ref().map_or(0, |buffer| buffer.ptr() as u64))
    }

    fn known(&mut self, shape: &Shape, form: &Form) -> Result<&Known> {
        if self.known.len() >= REMEMBERED && !self.known.contains_key(shape) {
            self.known.clear();
        }
        if !self.known.contains_key(shape) {
            self.context.bind_to_thread().map_err(|e| Error::Cuda { what: format!("cuBLASLt: {e}") })?;
            let known = Known::new(self.handle, shape, form)?;
            self.known.insert(*shape, known);
        }
        Ok(&self.known[shape])
    }
}

/// What the library keeps for one shape, and its proposals, the most promising first.
struct Known {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
}

impl Known {
    fn new(handle: sys::cublasLtHandle_t, shape: &Shape, form: &Form) -> Result<Known> {
        use sys::{cublasLtMatmulDescAttributes_t::*, cublasLtMatmulPreferenceAttributes_t::*};
        let desc = result::create_matmul_desc(form.compute, sys::cudaDataType_t::CUDA_R_32F).map_err(failed)?;
        // From here on a failure frees what was made.
        let mut known = Known { desc, layouts: [std::ptr::null_mut(); 4], algorithms: Vec::new() };
        for i in 0..4 {
            known.layouts[i] = layout(form.types[i], &form.stored[i], shape.count)?;
        }
        // CUBLAS_OP_N and CUBLAS_OP_T, which the bindings of this library leave out.
        let op = i32::from;
        // SAFETY: the attributes have these types.
        unsafe {
            set_desc(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op(form.transposed[0]))?;
            set_desc(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op(form.transposed[1]))?;
            set_desc(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &form.epilogue)?;
            if let Some(bias) = form.bias {
                set_desc(desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias)?;
            }
        }
        let preference = Preference(result::create_matmul_pref().map_err(failed)?);
        let alignment = |i: usize| shape.alignment[i] as u32;
        let added = if shape.residual() { alignment(3) } else { alignment(2) };
        // SAFETY: as above.
        unsafe {
            preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
            preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment(1))?;
            preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment(0))?;
            preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &added)?;
            preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment(2))?;
        }
        let mut found: [MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>; PROPOSALS] =
            [MaybeUninit::uninit(); PROPOSALS];
        let mut count = 0;
        // SAFETY: descriptor, layouts and preference are alive; there is room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                desc,
                known.layouts[0],
                known.layouts[1],
                known.layouts[2],
                known.layouts[3],
                preference.0,
                PROPOSALS as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            // It says so when it has no kernel for a combination of types, alignment and epilogue.
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE => {
                return Ok(known);
            }
            status => return Err(failed(CublasError(status))),
        }
        for result in &found[..count.clamp(0, PROPOSALS as i32) as usize] {
            // SAFETY: the library filled in as many results as it says.
            let result = unsafe { result.assume_init_ref() };
            if result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE {
                known.algorithms.push(result.algo);
            }
        }
        Ok(known)
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        // SAFETY: made by the library, destroyed once. A failure to destroy cannot be helped.
        unsafe {
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            let _ = result::destroy_matmul_desc(self.desc);
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// # Safety
    /// The attribute's value is a `T`.
    unsafe fn set<T>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the caller's promise; the value is copied.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
        .map_err(failed)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by the library, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// # Safety
/// The attribute's value is a `T`, and the descriptor is alive.
unsafe fn set_desc<T>(
    desc: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<()> {
    // SAFETY: the caller's promise; the value is copied.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(failed)
}

fn layout(dtype: sys::cudaDataType, m: &Stored, count: usize) -> Result<sys::cublasLtMatrixLayout_t> {
    use sys::cublasLtMatrixLayoutAttribute_t::*;
    // A single column may come with any distance to the next, which the library would check all the same.
    let ld = m.ld.max(m.rows);
    let layout = result::create_matrix_layout(dtype, m.rows as u64, m.cols as u64, ld as i64).map_err(failed)?;
    if count > 1 {
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: the layout is alive; the values below have the attributes' types.
            unsafe { result::set_matrix_layout_attribute(layout, attribute, value, size) }.map_err(failed)
        };
        let (count, step) = (count as i32, m.step as i64);
        let batch =
            set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), size_of::<i32>()).and_then(|()| {
                set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const step).cast(), size_of::<i64>())
            });
        if let Err(e) = batch {
            // SAFETY: made above, destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
            return Err(e);
        }
    }
    Ok(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(ta: bool, tb: bool) -> Shape {
        Shape {
            m: 5,
            n: 7,
            k: 3,
            ta,
            tb,
            dtype: DType::Bf16,
            out: DType::Bf16,
            ld: [if ta { 6 } else { 4 }, if tb { 4 } else { 8 }, 9, 0],
            alignment: [16; 4],
            beta: false,
            bias: None,
            activation: None,
            count: 1,
            step: [0; 3],
            tf32: false,
        }
    }

    /// Element (i, j) of `op(x)`, as the library computes addresses: by columns.
    fn at(x: &[f64], s: &Stored, transposed: bool, i: usize, j: usize) -> f64 {
        let (row, col) = if transposed { (j, i) } else { (i, j) };
        assert!(row < s.rows && col < s.cols && s.ld >= s.rows);
        x[col * s.ld + row]
    }

    #[test]
    fn the_library_computes_our_product_in_its_own_terms() {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let s = shape(ta, tb);
            let form = Form::new(&s).unwrap();
            let number =
                |seed: usize, len| -> Vec<f64> { (0..len).map(|i| ((i * 37 + seed) % 11) as f64 - 5.0).collect() };
            let (a, b) = (number(1, 100), number(2, 100));
            // Our terms: row-major, element (i, p) of A at i·ld + p, or at p·ld + i when transposed.
            let ours =
                |x: &[f64], ld: usize, t: bool, i: usize, j: usize| if t { x[j * ld + i] } else { x[i * ld + j] };
            let mut c = vec![f64::NAN; s.m * s.ld[2]];
            let [first, second, _, d] = &form.stored;
            assert_eq!((d.rows, d.cols), (s.n, s.m));
            for col in 0..d.cols {
                for row in 0..d.rows {
                    c[col * d.ld + row] = (0..s.k)
                        .map(|p| at(&b, first, form.transposed[0], row, p) * at(&a, second, form.transposed[1], p, col))
                        .sum();
                }
            }
            for i in 0..s.m {
                for j in 0..s.n {
                    let want: f64 = (0..s.k).map(|p| ours(&a, s.ld[0], ta, i, p) * ours(&b, s.ld[1], tb, p, j)).sum();
                    assert_eq!(c[i * s.ld[2] + j], want, "ta {ta} tb {tb} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn f32_is_true_f32_unless_tf32_is_asked_for() {
        use sys::cublasComputeType_t::*;
        let compute =
            |dtype, tf32| Form::new(&Shape { dtype, out: dtype, tf32, ..shape(false, false) }).unwrap().compute;
        assert_eq!(compute(DType::F32, false), CUBLAS_COMPUTE_32F);
        assert_eq!(compute(DType::F32, true), CUBLAS_COMPUTE_32F_FAST_TF32);
        assert_eq!(compute(DType::Bf16, true), CUBLAS_COMPUTE_32F);
    }

    #[test]
    fn epilogues_are_those_that_the_library_has() {
        use sys::cublasLtEpilogue_t::*;
        let base = shape(false, true);
        let form = |activation, bias| Form::new(&Shape { activation, bias, ..base }).map(|f| f.epilogue);
        assert_eq!(form(None, None), Some(CUBLASLT_EPILOGUE_DEFAULT));
        assert_eq!(form(None, Some(DType::F32)), Some(CUBLASLT_EPILOGUE_BIAS));
        assert_eq!(form(Some(Activation::GeluTanh), Some(DType::Bf16)), Some(CUBLASLT_EPILOGUE_GELU_BIAS));
        assert_eq!(form(Some(Activation::Relu), None), Some(CUBLASLT_EPILOGUE_RELU));
        assert_eq!(form(Some(Activation::GeluErf), None), None, "its GELU is the one by tanh");
        assert_eq!(form(Some(Activation::Silu), None), None);
        // A residual takes the place of C, so C cannot be read as well; nor does it come after an activation.
        let with = Shape { ld: [4, 4, 9, 11], ..base };
        assert_eq!(Form::new(&with).unwrap().stored[2], Stored { rows: 7, cols: 5, ld: 11, step: 0 });
        assert_eq!(Form::new(&Shape { beta: true, ..with }), None);
        assert_eq!(Form::new(&Shape { activation: Some(Activation::Relu), ..with }), None);
        assert_eq!(Form::new(&Shape { k: 0, ..base }), None);
        assert_eq!(Form::new(&Shape { dtype: DType::F32, out: DType::Bf16, ..base }), None);
        assert!(Form::new(&Shape { out: DType::F32, ..base }).is_some(), "16-bit operands into f32");
    }

    #[test]
    fn a_machine_without_the_library_is_told_what_to_do() {
        assert!(missing().to_string().contains("libcublasLt was not found") && missing().to_string().contains("own"));
        // Asked again and again: no panic, the same answer.
        assert_eq!(present(), present());
    }
}
