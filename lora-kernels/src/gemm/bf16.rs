//! Products in bf16 on the CPU, and how a processor without them gets the same numbers.
//!
//! Where there is `vdpbf16ps` and it is fast, they are twice as fast as those in f32 ([`blocked`](super::blocked)).
//!
//! Operands that are f32 are rounded to bf16 while they are packed; products of bf16 numbers are exact in f32, and sums
//! are taken in f32. So an element is off by at most about (2⁻⁸ + k·2⁻²⁴)·Σ|a||b|, of which the first term is what
//! rounding an f32 operand costs (none, for one that was bf16).

use half::bf16;
use rayon::prelude::*;

use crate::{Buffer, DType, Device, Element, Error, Mat, MatMut, Result, mat::HostMat};

/// A matrix of either type.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// Rounded to bf16 when it is packed.
    F32(HostMat<'a, f32>),
    /// As it is.
    Bf16(HostMat<'a, bf16>),
}

impl<'a> Operand<'a> {
    /// # Errors
    /// [`Error::DType`] for any other type.
    pub(super) fn of(x: Mat<'a>) -> Result<Operand<'a>> {
        match x.dtype() {
            DType::F32 => Ok(Operand::F32(x.host())),
            DType::Bf16 => Ok(Operand::Bf16(x.host())),
            dtype => Err(Error::DType { kernel: "gemm", dtype }),
        }
    }
}

/// `C = α·A·B + β·C` where the processor has no bf16: the operands are rounded and widened, and multiplied in f32 on the
/// threads of rayon's pool.
///
/// # Errors
/// [`Error::DType`] when C is not f32.
pub(super) fn product(alpha: f64, a: Operand, b: Operand, beta: f64, c: MatMut) -> Result<()> {
    if c.dtype() != DType::F32 {
        return Err(Error::DType { kernel: "gemm", dtype: c.dtype() });
    }
    let (a, b) = (Wide::of(a)?, Wide::of(b)?);
    super::parallel(alpha, a.mat(), b.mat(), beta, c.host::<f32>());
    Ok(())
}

/// Numbers of bf16 as f32, in the layout that they had.
struct Wide {
    data: Buffer,
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl Wide {
    fn of(x: Operand) -> Result<Wide> {
        match x {
            Operand::F32(x) => Wide::map(x, |v| bf16::from_f32(v).to_f32()),
            Operand::Bf16(x) => Wide::map(x, bf16::to_f32),
        }
    }

    fn map<T: Element>(x: HostMat<T>, f: impl Fn(T) -> f32 + Sync) -> Result<Wide> {
        /// Numbers that are worth waking another thread for.
        const WORTH: usize = 1 << 14;
        let (transposed, x) = (x.transposed, if x.transposed { x.t() } else { x });
        let mut data = Buffer::empty(&Device::Cpu, DType::F32, x.rows * x.cols)?;
        let rows = data.host_mut::<f32>().par_chunks_mut(x.cols.max(1)).enumerate();
        rows.with_min_len(1 + WORTH / x.cols.max(1)).for_each(|(i, to)| {
            to.iter_mut().zip(x.row(i)).for_each(|(y, &v)| *y = f(v));
        });
        Ok(Wide { data, rows: x.rows, cols: x.cols, transposed })
    }

    fn mat(&self) -> HostMat<'_, f32> {
        let x = HostMat::from_slice(self.data.host(), self.rows, self.cols);
        if self.transposed { x.t() } else { x }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "x86_64")]
    use crate::gemm::blocked;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// A matrix with a margin on the right that nobody may touch.
    struct Padded {
        buf: Buffer,
        rows: usize,
        cols: usize,
    }

    const MARGIN: usize = 3;

    impl Padded {
        /// Numbers of bf16, kept in either type.
        fn random(rng: &mut ChaCha8Rng, dtype: DType, rows: usize, cols: usize) -> Padded {
            let x: Vec<bf16> =
                (0..rows * (cols + MARGIN)).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect();
            let buf = match dtype {
                DType::Bf16 => Buffer::from_slice(&Device::Cpu, &x),
                _ => Buffer::from_slice(&Device::Cpu, &x.iter().map(|v| v.to_f32()).collect::<Vec<_>>()),
            };
            Padded { buf: buf.unwrap(), rows, cols }
        }

        fn mat(&self) -> Mat<'_> {
            Mat::new(&self.buf, 0, self.rows, self.cols + MARGIN).cols_in(0..self.cols)
        }

        fn at(&self, i: usize, j: usize) -> f64 {
            let i = i * (self.cols + MARGIN) + j;
            match self.buf.dtype() {
                DType::Bf16 => self.buf.host::<bf16>()[i].to_f64(),
                _ => self.buf.host::<f32>()[i].into(),
            }
        }
    }

    /// A way to compute a product.
    type Way = fn(f64, Operand, Operand, f64, MatMut) -> Result<()>;

    /// Those of this processor, of which it uses one.
    fn ways() -> Vec<Way> {
        let mut ways: Vec<Way> = vec![product];
        #[cfg(target_arch = "x86_64")]
        if blocked::available() {
            use blocked::{Bf16, Form, Widened, bf16_by};
            fn form(alpha: f64, beta: f64) -> Form<'static> {
                Form { alpha: alpha as f32, beta: beta as f32, bias: None }
            }
            ways.push(|alpha, a, b, beta, c| bf16_by::<Bf16>(form(alpha, beta), a, b, c.host()));
            ways.push(|alpha, a, b, beta, c| bf16_by::<Widened>(form(alpha, beta), a, b, c.host()));
        }
        ways
    }

    /// One product of numbers that bf16 holds, so that only the sums are rounded, against loops in f64; by `how`.
    fn check(
        rng: &mut ChaCha8Rng,
        (m, k, n): (usize, usize, usize),
        types: [DType; 2],
        [ta, tb]: [bool; 2],
        (alpha, beta): (f64, f64),
        how: Way,
    ) {
        let (a, b) = (
            if ta { Padded::random(rng, types[0], k, m) } else { Padded::random(rng, types[0], m, k) },
            if tb { Padded::random(rng, types[1], n, k) } else { Padded::random(rng, types[1], k, n) },
        );
        let mut c = Padded::random(rng, DType::F32, m, n);
        if beta == 0.0 {
            c.buf.host_mut::<f32>().fill(f32::NAN);
        }
        let was = c.buf.to_vec::<f32>(0..c.buf.len()).unwrap();
        let to = MatMut::new(&mut c.buf, 0, m, n + MARGIN).cols_in(0..n);
        let (x, y) = (a.mat().t_if(ta), b.mat().t_if(tb));
        how(alpha, Operand::of(x).unwrap(), Operand::of(y).unwrap(), beta, to).unwrap();
        for i in 0..m {
            for j in 0..n {
                let of = |x: &Padded, t: bool, i, j| if t { x.at(j, i) } else { x.at(i, j) };
                let sum: f64 = (0..k).map(|p| of(&a, ta, i, p) * of(&b, tb, p, j)).sum();
                let want = alpha * sum + if beta == 0.0 { 0.0 } else { beta * f64::from(was[i * (n + MARGIN) + j]) };
                let got = c.at(i, j);
                assert!(
                    (got - want).abs() <= 2e-7 * (k as f64 + 4.0),
                    "{m}×{k}×{n} {types:?} ta {ta} tb {tb} α {alpha} β {beta} at {i},{j}: {got} {want}"
                );
            }
            for j in n..n + MARGIN {
                let (got, was) = (c.at(i, j) as f32, was[i * (n + MARGIN) + j]);
                assert!(got.to_bits() == was.to_bits() || (got.is_nan() && was.is_nan()), "a neighbour was written");
            }
        }
    }

    const SHAPES: [(usize, usize, usize); 10] = [
        (1, 1, 1),
        (3, 7, 33),
        (33, 1, 8),
        (13, 31, 1),
        (129, 64, 31),
        (64, 770, 65),
        (17, 1000, 130),
        (250, 385, 40),
        (0, 3, 2),
        (3, 0, 2),
    ];

    #[test]
    fn equals_plain_loops_in_all_types_transposes_sizes_and_scalars() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for shape in SHAPES {
            for types in [[DType::F32, DType::Bf16], [DType::Bf16, DType::F32], [DType::Bf16, DType::Bf16]] {
                for t in [[false, false], [false, true], [true, false], [true, true]] {
                    for scalars in [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)] {
                        for how in ways() {
                            check(&mut rng, shape, types, t, scalars, how);
                        }
                    }
                }
            }
        }
    }

    /// Its products are those of [`super::super::parallel`], which f32 has there too.
    #[test]
    fn a_processor_without_bf16_has_the_same_bits_for_any_number_of_threads() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for (m, k, n) in [(400, 768, 520), (397, 768, 8), (8, 400, 768), (1, 768, 2304), (37, 768, 520)] {
            let (a, b) = (Padded::random(&mut rng, DType::F32, m, k), Padded::random(&mut rng, DType::Bf16, n, k));
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = Buffer::empty(&Device::Cpu, DType::F32, m * n).unwrap();
                let (a, b) = (Operand::of(a.mat()).unwrap(), Operand::of(b.mat().t()).unwrap());
                pool.install(|| product(1.0, a, b, 0.0, MatMut::new(&mut c, 0, m, n))).unwrap();
                c.to_vec::<f32>(0..m * n).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            let one = run(1);
            assert!([2, 3, 5].iter().all(|&threads| run(threads) == one), "{m}×{k}×{n}");
        }
    }

    #[test]
    fn an_f32_operand_is_rounded_to_the_nearest() {
        // 1 + 2⁻⁸ lies between two numbers of bf16, and goes to the even one; a little more goes up.
        let x = [1.0 + 2f32.powi(-8), 1.0 + 2f32.powi(-8) + 2f32.powi(-20)];
        let one = Buffer::from_slice(&Device::Cpu, &[bf16::ONE]).unwrap();
        let x = Buffer::from_slice(&Device::Cpu, &x).unwrap();
        for how in ways() {
            let mut y = Buffer::empty(&Device::Cpu, DType::F32, 2).unwrap();
            let to = MatMut::new(&mut y, 0, 2, 1);
            let [x, one] = [Mat::new(&x, 0, 2, 1), Mat::new(&one, 0, 1, 1)].map(|m| Operand::of(m).unwrap());
            how(1.0, x, one, 0.0, to).unwrap();
            assert_eq!(y.to_vec::<f32>(0..2).unwrap(), [1.0, 1.0 + 2f32.powi(-7)]);
        }
    }

    #[test]
    fn other_types_are_refused() {
        let half = Buffer::zeros(&Device::Cpu, DType::F16, 4).unwrap();
        let (full, mut c) =
            (Buffer::zeros(&Device::Cpu, DType::F32, 4).unwrap(), Buffer::zeros(&Device::Cpu, DType::F32, 4).unwrap());
        let e = super::super::gemm(
            1.0,
            Mat::new(&full, 0, 2, 2),
            Mat::new(&half, 0, 2, 2),
            0.0,
            MatMut::new(&mut c, 0, 2, 2),
        );
        assert!(matches!(e, Err(Error::DType { dtype: DType::F16, .. })), "{e:?}");
    }
}
