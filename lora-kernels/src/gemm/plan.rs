//! Which engine computes a product: measured when a shape comes up for the first time, then remembered.

#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::sys;

use super::{
    cublaslt,
    cuda::Problem,
    wgmma::{self, Variant},
};
use crate::{Activation, Buffer, DType, Device, Error, Mat, MatMut, Result, cuda::Gpu};

/// A way to compute a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    /// Our kernels for any device, which choose among themselves.
    Base,
    /// Our kernels for Hopper's tensor cores.
    Wgmma(Variant),
    /// cuBLASLt, with the algorithm of that rank among those that it proposes.
    CublasLt(usize),
}

/// A product `C = act(α·A·B + β·C + bias) + residual`, but for addresses and scalars: what decides how it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Rows of C.
    pub(super) m: usize,
    /// Columns of C.
    pub(super) n: usize,
    /// Columns of A and rows of B.
    pub(super) k: usize,
    /// Whether A is stored as [k, m].
    pub(super) ta: bool,
    /// Whether B is stored as [n, k].
    pub(super) tb: bool,
    /// The type of A and B.
    pub(super) dtype: DType,
    /// The type of C and of the residual.
    pub(super) out: DType,
    /// Elements from one stored row to the next of A, B, C and the residual (0 without one).
    pub(super) ld: [usize; 4],
    /// The largest power of two, at most 16, that divides the addresses of A, B, C and the residual (16 without one).
    pub(super) alignment: [usize; 4],
    /// Whether β is not 0: C is read.
    pub(super) beta: bool,
    /// The type of the bias.
    pub(super) bias: Option<DType>,
    /// The activation.
    pub(super) activation: Option<Activation>,
    /// Products in a batch, 1 or more.
    pub(super) count: usize,
    /// Elements from one matrix of a batch to the next, for A, B and C.
    pub(super) step: [usize; 3],
    /// Whether f32 operands may be rounded to tf32.
    pub(super) tf32: bool,
}

impl Shape {
    /// The shape of a product.
    pub(crate) fn of(p: &Problem, tf32: bool) -> Shape {
        let (c, residual) = (p.c.as_mat(), p.epilogue.residual);
        let aligned = |x: Mat| alignment(x.address());
        Shape {
            m: p.m,
            n: p.n,
            k: p.k,
            ta: p.a.is_transposed(),
            tb: p.b.is_transposed(),
            dtype: p.a.dtype(),
            out: c.dtype(),
            ld: [p.a.ld(), p.b.ld(), c.ld(), residual.map_or(0, |x| x.ld())],
            alignment: [aligned(p.a), aligned(p.b), aligned(c), residual.map_or(16, aligned)],
            beta: p.beta != 0.0,
            bias: p.epilogue.bias.map(|x| x.dtype()),
            activation: p.epilogue.activation,
            count: p.count,
            step: p.step,
            tf32,
        }
    }

    /// Whether a residual is added.
    pub(super) fn residual(&self) -> bool {
        self.ld[3] != 0
    }
}

/// The largest power of two, at most 16, that divides an address.
pub(super) fn alignment(address: u64) -> usize {
    1 << address.trailing_zeros().min(4)
}

/// Shapes that share a plan: sizes in eight steps per octave, so that batches of ever different lengths do not each begin
/// with measurements, and leading dimensions by what they mean for alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: usize,
    shape: Shape,
}

impl Key {
    fn new(device: usize, s: &Shape) -> Key {
        let size = |dtype: DType| dtype.size();
        let class = |ld: usize, dtype| if ld == 0 { 0 } else { alignment((ld * size(dtype)) as u64) };
        let shape = Shape {
            m: step(s.m),
            n: step(s.n),
            k: step(s.k),
            ld: [class(s.ld[0], s.dtype), class(s.ld[1], s.dtype), class(s.ld[2], s.out), class(s.ld[3], s.out)],
            count: step(s.count),
            step: [class(s.step[0], s.dtype), class(s.step[1], s.dtype), class(s.step[2], s.out)],
            ..*s
        };
        Key { device, shape }
    }
}

/// Rounds up to a number with four significant bits.
fn step(x: usize) -> usize {
    let shift = x.checked_ilog2().unwrap_or(0).saturating_sub(3);
    x.div_ceil(1 << shift) << shift
}

/// What `LORA_GEMM` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Fastest,
    Own,
    CublasLt,
}

fn choice(value: Option<&str>) -> Result<Choice> {
    match value {
        None | Some("") => Ok(Choice::Fastest),
        Some("own") => Ok(Choice::Own),
        Some("cublaslt") => Ok(Choice::CublasLt),
        Some(other) => Err(Error::Cuda {
            what: format!("LORA_GEMM={other}: it must be own or cublaslt, or not set for the faster"),
        }),
    }
}

fn flag(name: &str, value: Option<&str>) -> Result<bool> {
    match value {
        None | Some("" | "0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => Err(Error::Cuda { what: format!("{name}={other}: it must be 1 or 0") }),
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|v| v.to_string_lossy().into_owned())
}

/// Whether products of f32 matrices may round their operands to tf32 (10 bits): `LORA_TF32=1`.
///
/// # Errors
/// [`Error::Cuda`] when the variable is neither 0 nor 1.
pub(crate) fn tf32() -> Result<bool> {
    static TF32: LazyLock<Option<String>> = LazyLock::new(|| variable("LORA_TF32"));
    flag("LORA_TF32", TF32.as_deref())
}

/// What is known of a shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settled {
    /// The fastest engine.
    pub(crate) engine: Engine,
    /// The fastest that can add low-rank terms on the way: ours, unless the library is faster by more than the pass over C
    /// costs that adding them afterwards takes.
    pub(crate) with_terms: Engine,
}

type Plans = HashMap<Key, Settled>;

fn plans() -> MutexGuard<'static, Plans> {
    static PLANS: LazyLock<Mutex<Plans>> = LazyLock::new(Mutex::default);
    PLANS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kernels of one family that are measured against each other.
pub(super) const CANDIDATES: usize = 3;

/// The engine that is fastest for a product: `base` launches our kernels for any device; those for Hopper join where they
/// can compute it, and cuBLASLt where it is installed. `LORA_GEMM` restricts the choice: `own` to the most promising of our
/// kernels by their shapes alone, so that the same work gives the same bits in every process; `cublaslt` to cuBLASLt
/// wherever it can.
///
/// What is fastest is measured when such a product comes up for the first time, and C then holds it if β = 0; not while a
/// graph is captured, nor where time means nothing: then it is the most promising of our kernels.
///
/// # Errors
/// [`Error::Cuda`] for a bad `LORA_GEMM`, for `LORA_GEMM=cublaslt` without the library, and what the engines return.
pub(super) fn engine(
    gpu: &Arc<Gpu>,
    p: &Problem,
    tf32: bool,
    base: &mut dyn FnMut(&Problem) -> Result<()>,
) -> Result<Settled> {
    static CHOICE: LazyLock<Option<String>> = LazyLock::new(|| variable("LORA_GEMM"));
    let choice = choice(CHOICE.as_deref())?;
    let shape = Shape::of(p, tf32);
    let info = gpu.info();
    let hopper = wgmma::variants(info.compute_capability, info.multiprocessors, &shape);
    let possible: Vec<Engine> = hopper.into_iter().map(Engine::Wgmma).collect();
    let own: Vec<Engine> = possible.iter().copied().take(CANDIDATES - 1).chain([Engine::Base]).collect();
    // SAFETY: the engine is one of those for this device and shape, which are those of the product.
    let mut run = |engine: Engine, p: &Problem| unsafe { run(gpu, &shape, engine, p, base) };
    let key = Key::new(info.ordinal, &shape);
    // Shapes that share a plan need not have the same kernels of ours at the top of their lists.
    let fits = |e: Engine| !matches!(e, Engine::Wgmma(_)) || possible.contains(&e);
    let known = plans().get(&key).copied().filter(|s| fits(s.engine) && fits(s.with_terms));
    let proposed = match (choice, known) {
        (Choice::Own, _) | (_, Some(Settled { engine: Engine::Base | Engine::Wgmma(_), .. })) => 0,
        (Choice::Fastest, _) => cublaslt::proposals(gpu, &shape)?.unwrap_or(0),
        (Choice::CublasLt, _) => cublaslt::proposals(gpu, &shape)?.ok_or_else(cublaslt::missing)?,
    };
    let mut scratch = None;
    let mut trial = |engine| {
        // Where C is read, repeating the product would change it: the trials have a C of their own.
        if p.beta != 0.0 && scratch.is_none() {
            let c = p.c.as_mat();
            scratch = Some(Buffer::zeros(&Device::Cuda(gpu.clone()), c.dtype(), c.rows() * c.ld())?);
        }
        match &mut scratch {
            None => timed(gpu, engine, p, &mut run),
            Some(buffer) => {
                let (rows, cols, ld) = (p.c.rows(), p.c.cols(), p.c.as_mat().ld());
                let c = MatMut::new(buffer, 0, rows, ld).cols_in(0..cols);
                let Problem { m, n, k, alpha, a, b, beta, epilogue, count, step, .. } = *p;
                timed(gpu, engine, &Problem { m, n, k, alpha, a, b, beta, c, epilogue, count, step }, &mut run)
            }
        }
    };
    // The lock is not held while a plan is measured: whoever comes at the same time measures as well.
    let plan = choose(choice, &own, proposed, known, capturing(gpu)?, &mut trial)?;
    if plan.measured {
        plans().insert(key, plan.settled);
    }
    Ok(plan.settled)
}

/// Computes a product with the [`engine`] that is fastest for it.
///
/// # Errors
/// As [`engine`].
pub(super) fn gemm(
    gpu: &Arc<Gpu>,
    p: &Problem,
    tf32: bool,
    base: &mut dyn FnMut(&Problem) -> Result<()>,
) -> Result<()> {
    let engine = engine(gpu, p, tf32, base)?.engine;
    // SAFETY: the engine is one for this device and shape, which are those of the product.
    unsafe { run(gpu, &Shape::of(p, tf32), engine, p, base) }
}

/// Puts a product into the stream.
///
/// # Safety
/// The shape is that of the product, but for where C lies, and the engine one that computes it on this device.
unsafe fn run(
    gpu: &Arc<Gpu>,
    shape: &Shape,
    engine: Engine,
    p: &Problem,
    base: &mut dyn FnMut(&Problem) -> Result<()>,
) -> Result<()> {
    match engine {
        Engine::Base => base(p),
        // SAFETY: the caller's promise.
        Engine::Wgmma(variant) => unsafe { wgmma::run(gpu, shape, variant, p) },
        // SAFETY: the shape is that of the product, whose matrices are live and of which C is uniquely borrowed.
        Engine::CublasLt(rank) => unsafe { cublaslt::run(gpu, shape, rank, p) },
    }
}

/// Milliseconds of a product, once its kernel is loaded and warm.
fn timed(
    gpu: &Gpu,
    engine: Engine,
    p: &Problem,
    run: &mut dyn FnMut(Engine, &Problem) -> Result<()>,
) -> Result<Option<f32>> {
    run(engine, p)?;
    let time = gpu.timed(&mut || (0..REPEATS).try_for_each(|_| run(engine, p)))?;
    Ok(time.map(|ms| ms / REPEATS as f32))
}

/// Whether the device's stream is being captured into a graph.
fn capturing(gpu: &Gpu) -> Result<bool> {
    let Some(stream) = gpu.driver().stream() else { return Ok(false) };
    crate::cuda::guard(|| {
        let mut status = sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives as long as the device; the call writes one number.
        let asked = unsafe { sys::cuStreamIsCapturing(stream, &mut status) }.result();
        asked.map_err(|e| Error::Cuda { what: format!("{e}, asking whether a graph is captured") })?;
        Ok(status != sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE)
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Plan {
    settled: Settled,
    measured: bool,
}

/// How much longer than the library's a product of ours may take and still be faster together with low-rank terms, which
/// the library would leave to a pass of their own: one more pass over C was measured at about an eighth of a 4096² product.
const PASS: f32 = 1.1;

/// Timings of each engine; the shortest counts.
const TRIALS: usize = 3;

/// Products in one timing: what the host does to start them then hides behind the one before.
const REPEATS: usize = 4;

fn choose(
    choice: Choice,
    own: &[Engine],
    proposed: usize,
    known: Option<Settled>,
    capturing: bool,
    trial: &mut dyn FnMut(Engine) -> Result<Option<f32>>,
) -> Result<Plan> {
    let library = (0..proposed).map(Engine::CublasLt);
    let candidates: Vec<Engine> = match choice {
        Choice::Own => own[..1].to_vec(),
        // What cuBLASLt cannot express is ours all the same.
        Choice::CublasLt if proposed > 0 => library.collect(),
        Choice::CublasLt => own.to_vec(),
        Choice::Fastest => own.iter().copied().chain(library).collect(),
    };
    let plan = |engine, with_terms, measured| Ok(Plan { settled: Settled { engine, with_terms }, measured });
    let unmeasured = |engine| plan(engine, engine, false);
    // Shapes that share a plan need not have equally many proposals.
    let clamped = |engine| match engine {
        Engine::CublasLt(rank) => Engine::CublasLt(rank.min(proposed.saturating_sub(1))),
        ours => ours,
    };
    match known {
        Some(Settled { engine: Engine::CublasLt(_), .. }) if proposed == 0 => {}
        Some(s) => return plan(clamped(s.engine), clamped(s.with_terms), false),
        None => {}
    }
    if capturing || candidates.len() == 1 {
        return unmeasured(candidates[0]);
    }
    let mut best: Option<(f32, Engine)> = None;
    let mut best_of_ours = best;
    for &engine in &candidates {
        let mut shortest = f32::INFINITY;
        for _ in 0..TRIALS {
            match trial(engine) {
                Ok(Some(time)) => shortest = shortest.min(time),
                Ok(None) => return unmeasured(candidates[0]),
                // The library may refuse at run time what it proposed; there are others.
                Err(_) if matches!(engine, Engine::CublasLt(_)) && candidates.len() > 1 => break,
                Err(e) => return Err(e),
            }
        }
        let faster = |than: Option<(f32, Engine)>| shortest.is_finite() && than.is_none_or(|(time, _)| shortest < time);
        if faster(best) {
            best = Some((shortest, engine));
        }
        if !matches!(engine, Engine::CublasLt(_)) && faster(best_of_ours) {
            best_of_ours = Some((shortest, engine));
        }
    }
    let Some((time, engine)) = best else { return unmeasured(candidates[0]) };
    let near = best_of_ours.filter(|&(ours, _)| ours <= PASS * time);
    plan(engine, near.map_or(engine, |(_, ours)| ours), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [Engine; 2] = [Engine::Base, Engine::Wgmma(Variant { columns: 256, cluster: 2 })];

    /// A clock on which each engine takes its time.
    fn clock(engine: Engine) -> Result<Option<f32>> {
        Ok(Some(match engine {
            Engine::Base => 3.0,
            Engine::Wgmma(_) => 2.0,
            Engine::CublasLt(rank) => 2.5 - rank as f32,
        }))
    }

    fn settled(engine: Engine) -> Settled {
        Settled { engine, with_terms: engine }
    }

    fn engine(choice: Choice, proposed: usize, known: Option<Engine>, capturing: bool) -> (Engine, bool) {
        let plan = choose(choice, &OWN, proposed, known.map(settled), capturing, &mut clock).unwrap();
        (plan.settled.engine, plan.measured)
    }

    #[test]
    fn terms_go_with_ours_unless_the_library_is_faster_by_more_than_their_pass() {
        let with_terms = |library: f32, choice| {
            let mut clock = |e| Ok(Some(if matches!(e, Engine::CublasLt(_)) { library } else { 2.0 }));
            choose(choice, &OWN, 2, None, false, &mut clock).unwrap().settled.with_terms
        };
        assert_eq!(with_terms(1.9, Choice::Fastest), OWN[0]);
        assert_eq!(with_terms(1.5, Choice::Fastest), Engine::CublasLt(0));
        assert_eq!(with_terms(1.9, Choice::CublasLt), Engine::CublasLt(0));
    }

    #[test]
    fn the_fastest_is_taken_once_it_was_measured() {
        use Choice::*;
        assert_eq!(engine(Fastest, 0, None, false), (OWN[1], true));
        assert_eq!(engine(Fastest, 1, None, false), (OWN[1], true));
        assert_eq!(engine(Fastest, 3, None, false), (Engine::CublasLt(2), true));
        assert_eq!(engine(Own, 3, None, false), (OWN[0], false), "ours alone need no clock");
        assert_eq!(engine(CublasLt, 1, None, false), (Engine::CublasLt(0), false), "one candidate needs no clock");
        assert_eq!(engine(CublasLt, 0, None, false), (OWN[1], true), "what cuBLASLt cannot do");
    }

    #[test]
    fn what_is_known_is_not_measured_again() {
        let mut never = |_| -> Result<Option<f32>> { panic!("measured") };
        let mut pick = |proposed, known: Option<Engine>, capturing| {
            choose(Choice::Fastest, &OWN, proposed, known.map(settled), capturing, &mut never).unwrap().settled.engine
        };
        assert_eq!(pick(2, Some(Engine::Base), false), Engine::Base);
        assert_eq!(pick(2, Some(Engine::CublasLt(7)), false), Engine::CublasLt(1), "fewer proposals for this shape");
        assert_eq!(pick(2, Some(Engine::Base), true), Engine::Base, "a plan holds under capture as well");
        assert_eq!(pick(2, None, true), OWN[0], "nothing is measured under capture");
    }

    #[test]
    fn a_plan_that_does_not_fit_is_made_again() {
        assert_eq!(engine(Choice::Fastest, 0, Some(Engine::CublasLt(1)), false), (OWN[1], true));
        // A kernel of ours that is not at the top of this shape's list is as good as known.
        let other = Engine::Wgmma(Variant { columns: 64, cluster: 1 });
        assert_eq!(engine(Choice::Fastest, 0, Some(other), false), (other, false));
    }

    #[test]
    fn without_a_clock_the_first_of_ours_is_taken_and_not_remembered() {
        let plan = choose(Choice::Fastest, &OWN, 2, None, false, &mut |_| Ok(None)).unwrap();
        assert_eq!(plan, Plan { settled: settled(OWN[0]), measured: false });
    }

    #[test]
    fn only_the_library_may_refuse() {
        let refuse = |bad: Engine| {
            choose(Choice::Fastest, &OWN, 2, None, false, &mut |e| {
                if e == bad { Err(Error::Cuda { what: "refused".into() }) } else { clock(e) }
            })
        };
        assert_eq!(refuse(Engine::CublasLt(1)).unwrap().settled.engine, OWN[1]);
        assert!(refuse(Engine::Base).is_err());
    }

    #[test]
    fn a_bad_variable_is_named() {
        assert_eq!(choice(None).unwrap(), Choice::Fastest);
        assert_eq!(choice(Some("own")).unwrap(), Choice::Own);
        assert_eq!(choice(Some("cublaslt")).unwrap(), Choice::CublasLt);
        assert!(choice(Some("cublas")).unwrap_err().to_string().contains("LORA_GEMM=cublas"));
        assert!(!flag("LORA_TF32", None).unwrap() && flag("LORA_TF32", Some("1")).unwrap());
        assert!(flag("LORA_TF32", Some("yes")).unwrap_err().to_string().contains("LORA_TF32=yes"));
    }

    #[test]
    fn neighbouring_sizes_share_a_plan_and_alignment_does_not() {
        for (x, rounded) in
            [(0, 0), (1, 1), (7, 7), (15, 15), (16, 16), (17, 18), (768, 768), (8191, 8192), (50257, 53248)]
        {
            assert_eq!(step(x), rounded, "{x}");
        }
        let shape = Shape {
            m: 1000,
            n: 768,
            k: 768,
            ta: false,
            tb: true,
            dtype: DType::Bf16,
            out: DType::F32,
            ld: [768, 768, 768, 0],
            alignment: [16; 4],
            beta: false,
            bias: None,
            activation: None,
            count: 1,
            step: [0; 3],
            tf32: false,
        };
        let key = |shape: &Shape| Key::new(0, shape);
        assert_eq!(key(&shape), key(&Shape { m: 1024, ld: [776, 1536, 772, 0], ..shape }));
        for other in [
            Shape { m: 1025, ..shape },
            Shape { ld: [769, 768, 768, 0], ..shape },
            Shape { ld: [768, 768, 769, 0], ..shape },
            Shape { ld: [768; 4], ..shape },
            Shape { alignment: [16, 2, 16, 16], ..shape },
            Shape { beta: true, ..shape },
            Shape { out: DType::Bf16, ..shape },
            Shape { tb: false, ..shape },
            Shape { bias: Some(DType::F32), ..shape },
            Shape { activation: Some(Activation::GeluTanh), ..shape },
        ] {
            assert_ne!(key(&shape), key(&other));
        }
        assert_ne!(key(&shape), Key::new(1, &shape));
        assert_eq!([0u64, 2, 4, 24, 48].map(alignment), [16, 2, 4, 8, 16]);
    }
}
