//! Each engine of products by itself, for those who measure or compare them: [`crate::gemm`] picks one.

#![allow(unsafe_code)]

use std::{fmt, sync::Arc};

use super::{
    Epilogue, cublaslt,
    cuda::{self, Problem},
    plan::{self, CANDIDATES, Engine, Shape},
    wgmma,
};
use crate::{Error, Mat, MatMut, Result, cuda::Gpu};

/// A way to compute a product on a CUDA device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmEngine {
    engine: Engine,
    candidate: bool,
}

/// Where an engine comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GemmFamily {
    /// Our kernels for any device: CUDA cores for f32, `mma.sync` for 16-bit types.
    Base,
    /// Our kernels for Hopper's tensor cores: wgmma and TMA.
    Wgmma,
    /// cuBLASLt.
    CublasLt,
}

impl GemmEngine {
    /// Where it comes from.
    pub fn family(&self) -> GemmFamily {
        match self.engine {
            Engine::Base => GemmFamily::Base,
            Engine::Wgmma(_) => GemmFamily::Wgmma,
            Engine::CublasLt(_) => GemmFamily::CublasLt,
        }
    }

    /// Whether [`crate::gemm`] tries it for the product that it was listed for.
    pub fn is_candidate(&self) -> bool {
        self.candidate
    }
}

/// `base`, `wgmma COLUMNSxCLUSTER` or `cublaslt RANK`.
impl fmt::Display for GemmEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.engine {
            Engine::Base => f.write_str("base"),
            Engine::Wgmma(variant) => write!(f, "wgmma {}x{}", variant.columns, variant.cluster),
            Engine::CublasLt(rank) => write!(f, "cublaslt {rank}"),
        }
    }
}

/// All engines that can compute `C = A·B` ([`crate::gemm`] with α = 1 and β = 0): those for Hopper, the most promising
/// first, ours for any device, and the proposals of cuBLASLt in its order, 8 at most, where the library is installed.
///
/// # Errors
/// [`Error::Cuda`] when the matrices lie on the host or the library fails; [`Error::DType`].
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn gemm_engines(a: Mat, b: Mat, c: MatMut) -> Result<Vec<GemmEngine>> {
    let (gpu, problem, tf32) = problem(a, b, c)?;
    let (shape, info) = (Shape::of(&problem, tf32), gpu.info());
    let hopper = wgmma::variants(info.compute_capability, info.multiprocessors, &shape);
    let listed = |(i, variant)| GemmEngine { engine: Engine::Wgmma(variant), candidate: i < CANDIDATES - 1 };
    let library = 0..cublaslt::proposals(&gpu, &shape)?.unwrap_or(0);
    Ok(hopper
        .into_iter()
        .enumerate()
        .map(listed)
        .chain([GemmEngine { engine: Engine::Base, candidate: true }])
        .chain(library.map(|rank| GemmEngine { engine: Engine::CublasLt(rank), candidate: true }))
        .collect())
}

/// `C = A·B` by one of the engines that [`gemm_engines`] lists for it.
///
/// # Errors
/// As [`gemm_engines`]; [`Error::Cuda`] for an engine that is not among those.
///
/// # Panics
/// As there.
pub fn gemm_by(engine: GemmEngine, a: Mat, b: Mat, c: MatMut) -> Result<()> {
    let (gpu, problem, tf32) = problem(a, b, c)?;
    let (shape, info) = (Shape::of(&problem, tf32), gpu.info());
    let known = match engine.engine {
        Engine::Base => return cuda::base(&gpu, &problem, tf32),
        Engine::Wgmma(v) => wgmma::variants(info.compute_capability, info.multiprocessors, &shape).contains(&v),
        Engine::CublasLt(rank) => cublaslt::proposals(&gpu, &shape)?.is_some_and(|n| rank < n),
    };
    match engine.engine {
        // SAFETY: the variant is one for this device and shape, which are those of the product.
        Engine::Wgmma(variant) if known => unsafe { wgmma::run(&gpu, &shape, variant, &problem) },
        // SAFETY: the shape is that of the product, whose matrices are live and of which C is uniquely borrowed.
        Engine::CublasLt(rank) if known => unsafe { cublaslt::run(&gpu, &shape, rank, &problem) },
        _ => Err(Error::Cuda { what: format!("{engine} cannot compute this product") }),
    }
}

fn problem<'a>(a: Mat<'a>, b: Mat<'a>, c: MatMut<'a>) -> Result<(Arc<Gpu>, Problem<'a>, bool)> {
    assert_eq!((a.rows(), a.cols(), b.cols()), (c.rows(), b.rows(), c.cols()), "gemm: [m, k]·[k, n] into [m, n]");
    super::check_types(a, b, &c);
    assert!(a.rows() > 0 && a.cols() > 0 && b.cols() > 0, "gemm: an empty product has no engine");
    let gpu = c.gpu().cloned();
    let gpu = gpu.ok_or_else(|| Error::Cuda { what: "the host has one engine for products".into() })?;
    Ok((gpu, Problem::single(1.0, a, b, 0.0, c, Epilogue::default()), plan::tf32()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType, Device,
        cuda::testing::{Bf16, F32, gpus},
        testing::{Padded, close, random, rounded},
    };

    /// A product: A and B on a device and, in f64, on the host.
    struct Case {
        device: [Padded; 2],
        host: [Padded; 2],
        transposed: [bool; 2],
        sizes: (usize, usize, usize),
    }

    impl Case {
        fn new(gpu: &Arc<Gpu>, dtype: DType, sizes: (usize, usize, usize), transposed: [bool; 2]) -> Case {
            let (m, n, k) = sizes;
            let stored = |seed, rows: usize, cols: usize, t: bool| {
                let (rows, cols) = if t { (cols, rows) } else { (rows, cols) };
                let values = rounded(dtype, &random(seed, rows * cols, 1.0));
                // Rows begin at multiples of 16 bytes, as TMA wants them; what lies between is no number.
                let ld = cols.next_multiple_of(8);
                let row = |row: &[f64]| row.iter().copied().chain(vec![f64::NAN; ld - cols]).collect::<Vec<_>>();
                let lines: Vec<f64> = values.chunks(cols).flat_map(row).collect();
                let device = Padded::on(&Device::Cuda(gpu.clone()), dtype, rows, ld, 0, &lines);
                (device, Padded::new(DType::F64, rows, cols, 0, &values))
            };
            let (a, b) = (stored(1, m, k, transposed[0]), stored(2, k, n, transposed[1]));
            Case { device: [a.0, b.0], host: [a.1, b.1], transposed, sizes }
        }

        fn operands(&self) -> (Mat<'_>, Mat<'_>) {
            let of = |i: usize| {
                let cols = self.host[i].mat().cols();
                self.device[i].mat().cols_in(0..cols).t_if(self.transposed[i])
            };
            (of(0), of(1))
        }

        /// A place for C that is no multiple of 16 bytes and holds no numbers.
        fn destination(&self, gpu: &Arc<Gpu>) -> Padded {
            let (m, n, _) = self.sizes;
            Padded::on(&Device::Cuda(gpu.clone()), F32, m, n, 3, &vec![f64::NAN; m * n])
        }

        fn engines(&self, gpu: &Arc<Gpu>) -> Vec<GemmEngine> {
            let (a, b) = self.operands();
            gemm_engines(a, b, self.destination(gpu).mat_mut()).unwrap()
        }

        fn reference(&self) -> Vec<f64> {
            let (m, n, _) = self.sizes;
            let mut c = Padded::poison(DType::F64, m, n, 0);
            let [a, b] = [0, 1].map(|i| self.host[i].mat().t_if(self.transposed[i]));
            crate::gemm(1.0, a, b, 0.0, c.mat_mut()).unwrap();
            c.get()
        }
    }

    /// Checks every engine whose name begins so, on every device that has one.
    fn engines_equal_the_reference(name: &str, dtype: DType) {
        for gpu in gpus() {
            let sizes: &[_] = match gpu.info().name.starts_with("emulated") {
                true => &[(9, 17, 33)],
                false => &[(128, 256, 64), (257, 129, 72), (1000, 520, 777), (64, 1031, 200), (2050, 2049, 136)],
            };
            let mut found = 0;
            for &sizes in sizes {
                for transposed in [[false, true], [false, false], [true, false]] {
                    let case = Case::new(&gpu, dtype, sizes, transposed);
                    let engines: Vec<_> =
                        case.engines(&gpu).into_iter().filter(|e| e.to_string().starts_with(name)).collect();
                    let want = if engines.is_empty() { Vec::new() } else { case.reference() };
                    for engine in engines {
                        let (mut c, (a, b)) = (case.destination(&gpu), case.operands());
                        gemm_by(engine, a, b, c.mat_mut()).unwrap();
                        // Sums of k products of factors below 1, in f32.
                        let what = format!("{engine} {sizes:?} {transposed:?} on {gpu:?}");
                        close(&what, &c.get(), &want, 1e-6 * sizes.2 as f64);
                        found += 1;
                    }
                }
            }
            println!("{name} on {gpu:?}: {found} products");
            let hopper = gpu.info().compute_capability == (9, 0);
            assert!(found > 0 || name == "cublaslt" || name.starts_with("wgmma") && !hopper, "no {name} on {gpu:?}");
        }
    }

    macro_rules! engines {
        ($($test:ident: $name:literal $dtype:ident,)*) => {
            $(#[test]
            fn $test() {
                engines_equal_the_reference($name, $dtype);
            })*
        };
    }

    engines! {
        base_in_f32: "base" F32,
        base_in_bf16: "base" Bf16,
        cublaslt_in_f32: "cublaslt" F32,
        cublaslt_in_bf16: "cublaslt" Bf16,
        wgmma_128x1: "wgmma 128x1" Bf16,
        wgmma_128x2: "wgmma 128x2" Bf16,
        wgmma_192x2: "wgmma 192x2" Bf16,
        wgmma_256x1: "wgmma 256x1" Bf16,
        wgmma_256x2: "wgmma 256x2" Bf16,
    }

    #[test]
    fn an_engine_that_cannot_is_refused() {
        for gpu in gpus() {
            let case = Case::new(&gpu, F32, (9, 17, 33), [false, true]);
            let wgmma = Engine::Wgmma(wgmma::Variant { columns: 128, cluster: 1 });
            for engine in [wgmma, Engine::CublasLt(100)] {
                let (mut c, (a, b)) = (case.destination(&gpu), case.operands());
                let e = gemm_by(GemmEngine { engine, candidate: true }, a, b, c.mat_mut()).unwrap_err();
                assert!(e.to_string().contains("cannot compute this product"), "{e}");
            }
        }
        let mut host = Padded::poison(F32, 1, 1, 0);
        let x = Padded::new(F32, 1, 1, 0, &[1.0]);
        assert!(gemm_engines(x.mat(), x.mat(), host.mat_mut()).is_err());
    }
}
